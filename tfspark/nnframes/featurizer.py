"""`NNFeaturizer`: a Keras application model without its top, as a Spark ML transformer."""

from __future__ import annotations

from typing import Any

import keras
from pyspark.ml.functions import array_to_vector
from pyspark.ml.param import TypeConverters
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from tfspark.errors import InvalidInputError, ProgramError
from tfspark.nnframes.estimator import NNModel
from tfspark.nnframes.params import param


class NNFeaturizer(NNModel):
    """Adds what a layer of a model returns as a column of vectors: an embedding of each row.

    The model stays as it was trained; what follows, such as Spark's `LogisticRegression` or an
    `NNClassifier` of two layers, learns from the vectors. It is transfer learning at the price of
    one prediction per row.

    Args:
        model: a functional or Sequential Keras model, such as one of `keras.applications`, or the
            path of one.
        feature_preprocessing: see `NNEstimator`; an application's own `preprocess_input`, for one.
        layer: name of the layer whose output is wanted; default: what the last Dense layer gets.
            An output `[height, width, channels]` is averaged over height and width.
        **params: `featuresCol`, `outputCol` ("embedding"), `batchSize`.

    Raises:
        InvalidInputError: the model has no such layer; names those it has.
        ProgramError: the output is neither a vector nor an image.

    Example:
        >>> model = keras.applications.MobileNetV2(weights=None, input_shape=(96, 96, 3))
        >>> scale = keras.applications.mobilenet_v2.preprocess_input
        >>> embed = NNFeaturizer(model, scale, featuresCol="image")  # doctest: +SKIP
        >>> embed.transform(photos).select("embedding")  # doctest: +SKIP
    """

    __module__ = "tfspark.nnframes"  # where saved stages look for it

    outputCol = param("outputCol", "column of vectors", TypeConverters.toString)

    def __init__(
        self,
        model: Any,
        feature_preprocessing: Any = None,
        layer: str | None = None,
        **params: Any,
    ):
        super().__init__(_without_top(model, layer), feature_preprocessing)
        self._setDefault(outputCol="embedding")
        self.setParams(**params)

    @classmethod
    def _of(cls, scoring: Any, summary: Any = None) -> Any:
        made = super()._of(scoring, summary)
        return made._setDefault(outputCol="embedding")

    def getOutputCol(self) -> str:
        """The column of vectors."""
        return self.getOrDefault(self.outputCol)

    def setOutputCol(self, value: str) -> Any:
        """Sets the column of vectors."""
        return self._set(outputCol=value)

    def _transform(self, dataset: DataFrame) -> DataFrame:
        name = self.getOutputCol()
        frame = self._scoring.predicted(
            dataset, self.getFeaturesCol(), name, self.getBatchSize(), lambda each: each, None
        )
        return frame.withColumn(name, array_to_vector(F.col(f"`{name}`")))


def _without_top(model: Any, layer: str | None) -> keras.Model:
    """A model that returns what a layer of another returns, as a vector."""
    if isinstance(model, str):
        model = keras.models.load_model(model, compile=False)
    if not isinstance(model, keras.Model) or not getattr(model, "outputs", None):
        raise InvalidInputError(
            "A featurizer takes a functional or Sequential Keras model. "
            f"Received: {type(model).__name__}."
        )
    names = [each.name for each in model.layers]
    if layer is None:
        dense = [each for each in model.layers if isinstance(each, keras.layers.Dense)]
        if not dense:
            raise InvalidInputError(
                "A model without a Dense layer has no top to drop. "
                f"Received: {model.name!r}. Say layer=; there are {', '.join(names[-8:])}."
            )
        output = dense[-1].input
    elif layer in names:
        output = model.get_layer(layer).output
    else:
        raise InvalidInputError(
            f"A layer of the model is named. Received: {layer!r}; the last ones are "
            f"{', '.join(names[-8:])}."
        )
    if len(output.shape) == 4:
        output = keras.layers.GlobalAveragePooling2D()(output)
    if len(output.shape) != 2 or output.shape[1] is None:
        raise ProgramError(
            "An embedding is a vector of known length per row. "
            f"Received: {list(output.shape[1:])}. Choose another layer."
        )
    return keras.Model(model.inputs, output, name=f"{model.name}_features")
