"""`NNClassifier` and its model: classes, probabilities and raw predictions, named as Spark ML's."""

from __future__ import annotations

from typing import Any, ClassVar

import keras
import tensorflow as tf
from pyspark.ml.functions import array_to_vector
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from tfspark.errors import InvalidInputError, ProgramError
from tfspark.graph.prediction import with_postprocessing
from tfspark.graph.program import Prediction
from tfspark.nnframes.estimator import NNEstimator, NNModel
from tfspark.nnframes.params import ClassifierParams
from tfspark.nnframes.training import Fitted


class NNClassifierModel(NNModel, ClassifierParams):
    """A classifier as a Spark ML transformer.

    Adds three columns: `rawPrediction`, a vector of what the model returns for each class;
    `probability`, a vector; and `prediction`, the class as a double. Where the model returns one
    number per row, p, the two classes have the probabilities (1 - p, p); where that is a logit z,
    their raw predictions are (-z, z).

    Args:
        model: a Keras model with one output: of one number per class, or of a single one.
        feature_preprocessing: see `NNEstimator`.
        **params: such as `thresholds`; a setter for each.

    Raises:
        ProgramError: the model has another output.

    Example:
        >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3, "softmax")])
        >>> NNClassifierModel(model, thresholds=[0.2, 0.5, 0.3]).numClasses
        3
    """

    __module__ = "tfspark.nnframes"  # where saved stages look for it

    def __init__(self, model: Any, feature_preprocessing: Any = None, **params: Any):
        super().__init__(model, feature_preprocessing, **params)
        _ = self.numClasses  # refuses what is no classifier

    @property
    def numClasses(self) -> int:
        """How many classes there are."""
        fields = self._scoring.outputs
        if len(fields) != 1 or len(fields[0].shape) > 1 or fields[0].shape == (None,):
            shapes = ", ".join(f"{field.name} {list(field.shape)}" for field in fields)
            raise ProgramError(
                "A classifier has one output, of one number per class or of a single one. "
                f"Received: {shapes}."
            )
        size = fields[0].shape[0] if fields[0].shape else 1
        return max(2, size)

    def _transform(self, dataset: DataFrame) -> DataFrame:
        # Spark ML's way to leave out a column is to give it no name.
        names = [self.getRawPredictionCol(), self.getProbabilityCol(), self.getPredictionCol()]
        kept = {name: index for index, name in enumerate(names) if name}
        finish = _Finish(self.getFromLogits(), self._weights(), tuple(kept.values()))
        frame = self._scoring.predicted(
            dataset, self.getFeaturesCol(), list(kept), self.getBatchSize(), finish, finish.key
        )
        vectors = {
            name: array_to_vector(F.col(f"`{name}`")) for name, index in kept.items() if index < 2
        }
        return frame.withColumns(vectors)

    def _weights(self) -> tuple[float, ...]:
        """What probabilities are divided by before the largest is taken."""
        classes = self.numClasses
        if self.isSet(self.thresholds):
            thresholds = tuple(self.getThresholds())
            if len(thresholds) != classes:
                raise InvalidInputError(
                    f"There is a threshold for each of {classes} classes. "
                    f"Received: {list(thresholds)}."
                )
            return thresholds
        if not self.isSet(self.threshold):
            return (1.0,) * classes
        if classes != 2:
            raise InvalidInputError(
                "threshold is for two classes. "
                f"Received: threshold={self.getThreshold()} for {classes}. Use setThresholds."
            )
        return (1 - self.getThreshold(), self.getThreshold())


class _Finish:
    """Raw predictions, probabilities and classes of what a model returns.

    Args:
        from_logits: whether that are logits.
        thresholds: one per class.
        kept: which of the three are wanted.
    """

    def __init__(self, from_logits: bool, thresholds: tuple[float, ...], kept: tuple[int, ...]):
        self.key = (from_logits, thresholds, kept)

    def __call__(self, prediction: Prediction) -> Prediction:
        return with_postprocessing(prediction, self._outputs)

    def _outputs(self, output: Any) -> dict[str, Any]:
        from_logits, thresholds, kept = self.key
        raw = tf.cast(output, tf.float32)
        if raw.shape.rank == 1:
            raw = raw[:, tf.newaxis]
        if raw.shape[-1] == 1:
            raw = tf.concat([-raw if from_logits else 1 - raw, raw], axis=-1)
            probability = tf.sigmoid(raw) if from_logits else raw
        else:
            probability = tf.nn.softmax(raw) if from_logits else raw
        scaled = probability / tf.constant(thresholds, tf.float32)
        # A threshold of 0 takes every row whose probability is not 0 (p / 0 is infinite).
        scaled = tf.where(tf.math.is_nan(scaled), 0.0, scaled)
        chosen = tf.cast(tf.argmax(scaled, axis=-1), tf.float64)
        named = {"raw": raw, "probability": probability, "prediction": chosen}
        return {name: named[name] for index, name in enumerate(named) if index in kept}


class NNClassifier(NNEstimator, ClassifierParams):
    """Trains a Keras classifier on the columns of a DataFrame, as a stage of Spark ML.

    Labels are numbers of classes from 0, as a `StringIndexer` makes them; another one is refused
    before training starts. What it says of `NNEstimator` holds here too.

    Args:
        model: with one output, of one number per class, or of a single one for two classes.
        criterion: a Keras loss, its name or a function; None: the compiled one, or cross entropy
            of probabilities.
        feature_preprocessing: see `NNEstimator`.
        **params: see `NNEstimator`; and `probabilityCol`, `rawPredictionCol`, `thresholds`.

    Example:
        >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3, "softmax")])
        >>> classifier = NNClassifier(model, maxEpoch=20, batchSize=32, learningRate=1e-2)
        >>> classifier.fit(frame).transform(frame)  # doctest: +SKIP
    """

    __module__ = "tfspark.nnframes"  # where saved stages look for it

    _model_class: ClassVar = NNClassifierModel

    def __init__(
        self, model: Any, criterion: Any = None, feature_preprocessing: Any = None, **params: Any
    ):
        super().__init__(model, criterion, feature_preprocessing, **params)

    def _model(self, fitted: Fitted) -> Any:
        made = super()._model(fitted)
        if not self.isSet(self.fromLogits):
            made.setFromLogits(bool(getattr(fitted.criterion, "from_logits", False)))
        return made

    def _criterion(self, model: keras.Model) -> Any:
        chosen = super()._criterion(model)
        if chosen is not None:
            return chosen
        return "binary_crossentropy" if _outputs(model) == 1 else "sparse_categorical_crossentropy"

    def _num_classes(self, model: keras.Model) -> int | None:
        size = _outputs(model)
        return None if size is None else max(2, size)


def _outputs(model: keras.Model) -> int | None:
    """Numbers that a model returns per row; None: not known before it is built."""
    outputs = getattr(model, "outputs", None)
    if not outputs:
        return None
    if len(outputs) != 1:
        raise ProgramError(
            f"A classifier has one output. Received: {len(outputs)}, of {model.name!r}."
        )
    return outputs[0].shape[-1] if len(outputs[0].shape) > 1 else 1
