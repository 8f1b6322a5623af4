"""`NNEstimator` trains a Keras model on a DataFrame; `NNModel` is what comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import keras
from pyspark.ml import Estimator, Model
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from tfspark.errors import InvalidInputError
from tfspark.graph.program import Prediction
from tfspark.nnframes.params import ColumnParams, TrainingParams
from tfspark.nnframes.persistence import StageIO
from tfspark.nnframes.scoring import Scoring, load_keras
from tfspark.nnframes.summary import TrainingSummary
from tfspark.nnframes.training import Fitted, fit


class NNModel(Model, ColumnParams, StageIO):
    """A model as a Spark ML transformer: adds its predictions to a DataFrame.

    A model with one output of one number per row makes a column of doubles, which Spark's
    evaluators read; other outputs make arrays of floats. The columns that a DataFrame has stay as
    they are, and rows keep their order. Works on a streaming DataFrame, too.

    Args:
        model: a Keras model, or the path of one.
        feature_preprocessing: see `NNEstimator`.
        **params: such as `featuresCol`; a setter for each.

    Raises:
        InvalidInputError: `model` is no model, or there is no such param.

    Example:
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        >>> scorer = NNModel(model, featuresCol="x").setPredictionCol("y")
        >>> scorer.transform(frame)  # doctest: +SKIP
    """

    __module__ = "tfspark.nnframes"  # where saved stages look for it

    def __init__(self, model: Any, feature_preprocessing: Any = None, **params: Any):
        super().__init__()
        self._scoring = Scoring.of(model, feature_preprocessing)
        self._summary: TrainingSummary | None = None
        self.setParams(**params)

    @classmethod
    def _of(cls, scoring: Scoring, summary: TrainingSummary | None = None) -> Any:
        made = cls.__new__(cls)
        super(NNModel, made).__init__()
        made._scoring, made._summary = scoring, summary
        return made

    @property
    def hasSummary(self) -> bool:
        """Whether there is a summary: after `fit`, and not after `load`."""
        return self._summary is not None

    @property
    def summary(self) -> TrainingSummary:
        """What the training was like.

        Raises:
            InvalidInputError: this model was not trained here.
        """
        if self._summary is None:
            raise InvalidInputError(
                "A model has a summary after fit. Received: one that was loaded or made of a "
                "Keras model. Look at hasSummary first."
            )
        return self._summary

    def getModel(self, custom_objects: Any = None, safe_mode: bool = True) -> keras.Model:
        """The Keras model with its weights, for example to train it further.

        Args:
            custom_objects: classes and functions by name, for a stage that was loaded.
            safe_mode: whether to refuse code in its file.

        Raises:
            InvalidInputError: it cannot be loaded without these.
        """
        return self._scoring.keras_model(custom_objects, safe_mode)

    def _transform(self, dataset: DataFrame) -> DataFrame:
        names = self.getPredictionCol()
        frame = self._scoring.predicted(
            dataset, self.getFeaturesCol(), names, self.getBatchSize(), _unchanged, None
        )
        for name in [names] if isinstance(names, str) else names:
            if isinstance(frame.schema[name].dataType, T.FloatType):
                frame = frame.withColumn(name, F.col(f"`{name}`").cast("double"))
        return frame

    def _write_files(self, folder: Path) -> None:
        """Of the model; see `StageIO`."""
        self._scoring.write_files(folder)

    @classmethod
    def _from_files(cls, folder: Path) -> Any:
        """Of its files; see `StageIO`."""
        return cls._of(Scoring.from_files(folder))


def _unchanged(prediction: Prediction) -> Prediction:
    return prediction


class NNEstimator(Estimator[Any], TrainingParams, StageIO):
    """Trains a Keras model on the columns of a DataFrame, as a stage of Spark ML.

    `fit` trains a copy: the estimator and its model stay as they are, so that the folds of a
    `CrossValidator` start from the same weights. Every value is a param, with a setter, and can be
    given by keyword.

    | column | becomes |
    |---|---|
    | numbers, arrays, ML vectors, text | tensors; numbers in dtype and shape of the model's input |
    | several columns | one input each, matched by name or order; with one input, one vector |
    | image struct | RGB, resized to the model's input, values from 0 to 255 |

    Args:
        model: a Keras model, compiled or not; or a function that makes one, called by every `fit`.
        criterion: a Keras loss, its name or a function; None: the compiled one.
        feature_preprocessing: a function of a row's features, one argument per column, as
            `TFDataset.map` takes it; a Keras layer; a shape to lay numbers out in; or a list of
            these, applied one after the other. It is a part of the trained model.
        label_preprocessing: likewise, of labels; of the training only.
        **params: `featuresCol`, `labelCol`, `predictionCol`, `batchSize` …; `explainParams()` lists
            them.

    Raises:
        InvalidInputError: there is no such param, or a value is wrong.

    Example:
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        >>> estimator = NNEstimator(model, "mse", batchSize=64, maxEpoch=5)
        >>> estimator.setFeaturesCol("x").setLabelCol("y").fit(frame)  # doctest: +SKIP
    """

    __module__ = "tfspark.nnframes"  # where saved stages look for it

    unsaved: ClassVar = ("validationData",)
    in_files: ClassVar = ("model",)
    _model_class: ClassVar = NNModel

    def __init__(
        self,
        model: Any,
        criterion: Any = None,
        feature_preprocessing: Any = None,
        label_preprocessing: Any = None,
        **params: Any,
    ):
        super().__init__()
        if not callable(model):  # a Keras model is, too
            raise InvalidInputError(
                "An estimator trains a Keras model, or what a function returns. "
                f"Received: {type(model).__name__}."
            )
        self.setParams(
            model=model,
            criterion=criterion,
            featurePreprocessing=feature_preprocessing,
            labelPreprocessing=label_preprocessing,
            **params,
        )

    # -- training -------------------------------------------------------------------------------

    def _fit(self, dataset: DataFrame) -> Any:
        return self._model(fit(self, dataset, self._criterion, self._num_classes))

    def _model(self, fitted: Fitted) -> Any:
        scoring = Scoring.trained(fitted)
        return self._copyValues(self._model_class._of(scoring, fitted.summary))

    def _criterion(self, model: keras.Model) -> Any:
        """The loss of a model."""
        given = self.value_of("criterion")
        if given is None and model.compiled:
            return model.loss
        return given

    def _num_classes(self, model: keras.Model) -> int | None:
        return None

    # -- persistence ----------------------------------------------------------------------------

    def _write_files(self, folder: Path) -> None:
        """Of the model; see `StageIO`."""
        model = self.value_of("model")
        if not isinstance(model, keras.Model):
            raise InvalidInputError(
                "A stage is saved without code. Received: a function that makes the model. "
                "Save the fitted model, or give the estimator a Keras model."
            )
        model.save(folder / "model.keras")

    @classmethod
    def _from_files(cls, folder: Path) -> Any:
        """Of its files; see `StageIO`."""
        return cls(load_keras(folder / "model.keras"))

    # -- setters --------------------------------------------------------------------------------

    def getLabelCol(self) -> Any:
        """The column of labels, or a list of columns."""
        return self.getOrDefault(self.labelCol)

    def setLabelCol(self, value: Any) -> Any:
        """Sets the column of labels; of a model with several outputs, a list."""
        return self._set(labelCol=value)

    def setWeightCol(self, value: str) -> Any:
        """Sets the column of the weights of rows in the loss."""
        return self._set(weightCol=value)

    def setSeed(self, value: int) -> Any:
        """Sets the seed of the order of rows."""
        return self._set(seed=value)

    def setShuffle(self, value: bool) -> Any:
        """Sets whether rows are drawn at random."""
        return self._set(shuffle=value)

    def setMaxEpoch(self, value: int) -> Any:
        """Sets the epochs to train."""
        return self._set(maxEpoch=value)

    def getMaxEpoch(self) -> int:
        """Epochs to train."""
        return self.getOrDefault(self.maxEpoch)

    def setEndWhen(self, trigger: Any) -> Any:
        """Sets the trigger that ends training, instead of `maxEpoch`."""
        return self._set(endWhen=trigger)

    def setOptimMethod(self, value: Any) -> Any:
        """Sets the optimizer: of Keras, its name, or a dict by prefix of a weight's path."""
        return self._set(optimMethod=value)

    def setLearningRate(self, value: float) -> Any:
        """Sets the learning rate, instead of the optimizer's own."""
        return self._set(learningRate=value)

    def getLearningRate(self) -> float | None:
        """The learning rate, or None: the optimizer's own."""
        return self.value_of("learningRate")

    def setLearningRateDecay(self, value: float) -> Any:
        """Sets d in `learningRate / (1 + d * step)`."""
        return self._set(learningRateDecay=value)

    def setCachingSample(self, value: bool) -> Any:
        """Of Analytics Zoo, without effect: rows are stored on disk, and mapped."""
        return self._set(cachingSample=value)

    def setDataCacheLevel(self, level: str, numSlice: int | None = None) -> Any:
        """Of Analytics Zoo, without effect: rows are stored on disk, and mapped."""
        return self._set(dataCacheLevel=level)

    def setTrainSummary(self, value: Any) -> Any:
        """Sets where loss, rate and speed of every step are written."""
        return self._set(trainSummary=value)

    def setValidationSummary(self, value: Any) -> Any:
        """Sets where the scores of validations are written."""
        return self._set(validationSummary=value)

    def setValidation(
        self, trigger: Any, val_df: DataFrame, val_method: Any, batch_size: int | None = None
    ) -> Any:
        """Validates on rows of their own.

        Args:
            trigger: when.
            val_df: with the same columns.
            val_method: metrics of Keras or tfspark, or their names.
            batch_size: most rows of one call of the model.
        """
        self._set(validationTrigger=trigger, validationData=val_df, validationMethods=val_method)
        return self if batch_size is None else self._set(validationBatchSize=batch_size)

    def setValidationIndicatorCol(self, value: str) -> Any:
        """Sets a column of booleans: True for the rows of a DataFrame to validate on.

        Unlike `setValidation` it goes with a `Pipeline`, whose former stages see these rows too.
        """
        return self._set(validationIndicatorCol=value)

    def setValidationMethods(self, value: Any) -> Any:
        """Sets the metrics of a validation; default: the compiled ones."""
        return self._set(validationMethods=value)

    def setValidationTrigger(self, value: Any) -> Any:
        """Sets when to validate; default: after every epoch."""
        return self._set(validationTrigger=value)

    def setEarlyStopping(
        self, patience: int, monitor: str = "val_loss", min_delta: float = 0.0, mode: str = "auto"
    ) -> Any:
        """Ends training when a score has not improved; the model then has its best weights.

        Source: `keras.callbacks.EarlyStopping`, which is asked after every epoch.

        Args:
            patience: epochs without improvement.
            monitor: "loss", or "val_" and the name of a metric of a validation.
            min_delta: the least that counts as improvement.
            mode: "min", "max", or "auto", which Keras tells by the name.
        """
        return self._set(
            earlyStopping={
                "patience": patience,
                "monitor": monitor,
                "min_delta": min_delta,
                "mode": mode,
            }
        )

    def setConstantGradientClipping(self, min: float, max: float) -> Any:
        """Sets bounds of every element of the gradient."""
        return self._set(constantGradientClipping=[min, max])

    def setGradientClippingByL2Norm(self, clip_norm: float) -> Any:
        """Sets a bound of the L2 norm of the whole gradient."""
        return self._set(gradientClippingByL2Norm=clip_norm)

    def setCheckpoint(self, path: str, trigger: Any, isOverWrite: bool = True) -> Any:
        """Writes checkpoints while training; every `fit` into a folder of its own.

        Args:
            path: a folder or fsspec URL that driver and executors share.
            trigger: when.
            isOverWrite: keep only the newest of a fit, else the five newest.
        """
        return self._set(
            checkpointPath=path, checkpointTrigger=trigger, checkpointOverwrite=isOverWrite
        )

    def setResume(self, value: bool) -> Any:
        """Sets whether `fit` goes on from the newest fit in the checkpoint path.

        For a run that was interrupted. Not for a `CrossValidator`, whose fits are different ones.
        """
        return self._set(resume=value)

    def setSamplePreprocessing(self, feature: Any, label: Any = None) -> Any:
        """Sets the preprocessing of features and labels; see the class."""
        self._set(featurePreprocessing=feature)
        return self if label is None else self._set(labelPreprocessing=label)

    def setSettings(self, **settings: Any) -> Any:
        """Sets more settings of `TFOptimizer`, such as `engine="gang"` and `num_ranks=4`.

        Raises:
            InvalidInputError: there is no such setting.
        """
        return self._set(settings=settings)
