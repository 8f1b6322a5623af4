"""Params of the stages, with their converters; setters are where the stages are."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import keras
from pyspark.ml.param import Param, Params, TypeConverters
from pyspark.ml.param.shared import HasSeed, HasValidationIndicatorCol, HasWeightCol
from pyspark.sql import DataFrame

from tfspark.errors import InvalidInputError
from tfspark.graph.metrics import metrics_from
from tfspark.nnframes.features import preprocessing_of
from tfspark.train.recipe import Settings
from tfspark.train.summary import TrainSummary, ValidationSummary
from tfspark.train.triggers import check_trigger


def _at_least_one(name: str) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        number = TypeConverters.toInt(value)
        if number < 1:
            raise InvalidInputError(f"{name} is at least 1. Received: {number}.")
        return number

    return convert


def _positive(name: str) -> Callable[[Any], float]:
    def convert(value: Any) -> float:
        number = TypeConverters.toFloat(value)
        if not number > 0:
            raise InvalidInputError(f"{name} is above 0. Received: {number}.")
        return number

    return convert


def _columns(value: Any) -> Any:
    """A column's name, or a list of some."""
    if isinstance(value, str):
        return value
    names = TypeConverters.toListString(value)
    if not names:
        raise InvalidInputError(f"At least one column is named. Received: {value!r}.")
    return names


def _of_type(name: str, kind: type) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if not isinstance(value, kind):
            raise InvalidInputError(
                f"{name} is a {kind.__name__}. Received: {type(value).__name__}."
            )
        return value

    return convert


def _trigger(name: str) -> Callable[[Any], Any]:
    return lambda value: check_trigger(value, name)


def _optimizer(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(prefix): keras.optimizers.get(each) for prefix, each in value.items()}
    return keras.optimizers.get(value)


def _metrics(value: Any) -> Any:
    metrics_from(value)  # refuses what is none
    return value if isinstance(value, (list, tuple, dict)) else [value]


def _bounds(value: Any) -> list[float]:
    bounds = TypeConverters.toListFloat(value)
    if len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise InvalidInputError(
            f"constantGradientClipping is (smallest, largest). Received: {value!r}."
        )
    return bounds


def _early_stopping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != {"patience", "monitor", "min_delta", "mode"}:
        raise InvalidInputError(f"Use setEarlyStopping(patience, …). Received: {value!r}.")
    return value


def _settings(value: Any) -> dict[str, Any]:
    Settings.of(**value)  # refuses what is none
    return dict(value)


def param(name: str, doc: str, converter: Callable[[Any], Any]) -> Any:
    """A param of a stage."""
    return Param(Params._dummy(), name, doc, typeConverter=converter)


class StageParams(Params):
    """Base of the params of all stages: set by keyword, unknown ones are refused by name."""

    def setParams(self, **values: Any) -> Any:
        """Sets params by name.

        Raises:
            InvalidInputError: there is no such param; names those there are.
        """
        known = [param.name for param in self.params]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                meant = f" Did you mean {close[0]}?" if close else ""
                raise InvalidInputError(
                    f"Params of {type(self).__name__} are {', '.join(known)}. "
                    f"Received: {name}.{meant}"
                )
        given = {name: value for name, value in values.items() if value is not None}
        return self._set(**given)

    def value_of(self, name: str) -> Any:
        """A param's value, or None where it has none."""
        param = self.getParam(name)
        return self.getOrDefault(param) if self.isDefined(param) else None


class ColumnParams(StageParams):
    """Columns that a model reads and writes, and how many rows at once.

    `featuresCol` and `predictionCol` name one column or several.
    """

    featuresCol = param("featuresCol", "column of features, or a list of columns", _columns)
    predictionCol = param(
        "predictionCol", "column of predictions, or a list of one for each output", _columns
    )
    batchSize = param(
        "batchSize",
        "rows of a global batch in training, most rows of one call in prediction (> 0)",
        _at_least_one("batchSize"),
    )

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(featuresCol="features", predictionCol="prediction", batchSize=32)

    def getFeaturesCol(self) -> Any:
        """The column of features, or a list of columns."""
        return self.getOrDefault(self.featuresCol)

    def setFeaturesCol(self, value: Any) -> Any:
        """Sets the column of features, or a list of columns."""
        return self._set(featuresCol=value)

    def getPredictionCol(self) -> Any:
        """The column of predictions, or a list of columns."""
        return self.getOrDefault(self.predictionCol)

    def setPredictionCol(self, value: Any) -> Any:
        """Sets the column of predictions; of a model with several outputs, a list."""
        return self._set(predictionCol=value)

    def getBatchSize(self) -> int:
        """Rows of a batch."""
        return self.getOrDefault(self.batchSize)

    def setBatchSize(self, value: int) -> Any:
        """Sets the rows of a global batch in training, or the most rows of one call in use."""
        return self._set(batchSize=value)


class ClassifierParams(StageParams):
    """Columns and thresholds of classifiers, named as Spark ML names them."""

    rawPredictionCol = param(
        "rawPredictionCol",
        'column of what the model returns for each class; "": none',
        TypeConverters.toString,
    )
    probabilityCol = param(
        "probabilityCol",
        'column of probabilities of the classes; "": none',
        TypeConverters.toString,
    )
    threshold = param(
        "threshold",
        "of two classes: the probability above which a row is of class 1, in [0, 1]",
        TypeConverters.toFloat,
    )
    thresholds = param(
        "thresholds",
        "the class with the largest p/t is predicted, with p its probability and t its threshold; "
        "one per class, at most one of them 0",
        TypeConverters.toListFloat,
    )
    fromLogits = param(
        "fromLogits",
        "whether the model returns logits, of which a softmax or sigmoid makes probabilities",
        TypeConverters.toBoolean,
    )

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(
            rawPredictionCol="rawPrediction",
            probabilityCol="probability",
            threshold=0.5,
            fromLogits=False,
        )

    def getRawPredictionCol(self) -> str:
        """The column of what the model returns for each class."""
        return self.getOrDefault(self.rawPredictionCol)

    def setRawPredictionCol(self, value: str) -> Any:
        """Sets the column of what the model returns for each class."""
        return self._set(rawPredictionCol=value)

    def getProbabilityCol(self) -> str:
        """The column of probabilities."""
        return self.getOrDefault(self.probabilityCol)

    def setProbabilityCol(self, value: str) -> Any:
        """Sets the column of probabilities."""
        return self._set(probabilityCol=value)

    def getThreshold(self) -> float:
        """The probability above which a row is of class 1."""
        return self.getOrDefault(self.threshold)

    def setThreshold(self, value: float) -> Any:
        """Sets the probability above which a row is of class 1; of two classes only."""
        if not 0 <= value <= 1:
            raise InvalidInputError(f"A threshold is from 0 to 1. Received: {value}.")
        return self._set(threshold=value)

    def getThresholds(self) -> list[float]:
        """The threshold of each class."""
        return self.getOrDefault(self.thresholds)

    def setThresholds(self, value: list[float]) -> Any:
        """Sets the threshold of each class; the class with the largest p/t is predicted."""
        if min(value) < 0 or sum(each == 0 for each in value) > 1:
            raise InvalidInputError(
                f"Thresholds are above 0, but for at most one of them. Received: {value}."
            )
        return self._set(thresholds=value)

    def getFromLogits(self) -> bool:
        """Whether the model returns logits."""
        return self.getOrDefault(self.fromLogits)

    def setFromLogits(self, value: bool) -> Any:
        """Sets whether the model returns logits; an estimator reads it from its criterion."""
        return self._set(fromLogits=value)


class TrainingParams(ColumnParams, HasWeightCol, HasSeed, HasValidationIndicatorCol):
    """What an estimator trains, and how."""

    model = param("model", "a Keras model, or a function that makes one", lambda value: value)
    criterion = param("criterion", "a Keras loss, its name, or a function", lambda value: value)
    featurePreprocessing = param(
        "featurePreprocessing",
        "functions of a row's features, applied before the model",
        lambda value: preprocessing_of(value, "feature_preprocessing"),
    )
    labelPreprocessing = param(
        "labelPreprocessing",
        "functions of a row's label, applied in training",
        lambda value: preprocessing_of(value, "label_preprocessing"),
    )
    labelCol = param("labelCol", "column of labels, or a list of columns", _columns)
    maxEpoch = param("maxEpoch", "epochs to train (> 0)", _at_least_one("maxEpoch"))
    endWhen = param(
        "endWhen", "trigger that ends training, instead of maxEpoch", _trigger("endWhen")
    )
    optimMethod = param(
        "optimMethod", "a Keras optimizer, its name, or a dict by prefix of a weight", _optimizer
    )
    learningRate = param(
        "learningRate", "instead of the optimizer's own (> 0)", _positive("learningRate")
    )
    learningRateDecay = param(
        "learningRateDecay",
        "d in learningRate / (1 + d * step); goes with learningRate",
        TypeConverters.toFloat,
    )
    constantGradientClipping = param(
        "constantGradientClipping", "bounds of every element of the gradient", _bounds
    )
    gradientClippingByL2Norm = param(
        "gradientClippingByL2Norm",
        "bound of the L2 norm of the whole gradient (> 0)",
        _positive("gradientClippingByL2Norm"),
    )
    shuffle = param("shuffle", "whether to draw rows at random", TypeConverters.toBoolean)
    cachingSample = param(
        "cachingSample",
        "of Analytics Zoo; rows are stored on disk in any case",
        TypeConverters.toBoolean,
    )
    dataCacheLevel = param(
        "dataCacheLevel",
        "of Analytics Zoo; rows are stored on disk in any case",
        TypeConverters.toString,
    )
    checkpointPath = param(
        "checkpointPath",
        "folder or URL for a folder of checkpoints per fit",
        TypeConverters.toString,
    )
    checkpointTrigger = param(
        "checkpointTrigger", "when to write a checkpoint", _trigger("checkpointTrigger")
    )
    checkpointOverwrite = param(
        "checkpointOverwrite", "keep only the newest checkpoint of a fit", TypeConverters.toBoolean
    )
    resume = param(
        "resume", "go on from the newest fit in checkpointPath", TypeConverters.toBoolean
    )
    validationTrigger = param(
        "validationTrigger", "when to validate", _trigger("validationTrigger")
    )
    validationData = param(
        "validationData", "a DataFrame to validate on", _of_type("validationData", DataFrame)
    )
    validationMethods = param("validationMethods", "metrics of a validation", _metrics)
    validationBatchSize = param(
        "validationBatchSize",
        "most rows of one call in a validation",
        _at_least_one("validationBatchSize"),
    )
    trainSummary = param(
        "trainSummary", "curves of the training", _of_type("trainSummary", TrainSummary)
    )
    validationSummary = param(
        "validationSummary",
        "curves of validations",
        _of_type("validationSummary", ValidationSummary),
    )
    earlyStopping = param("earlyStopping", "see setEarlyStopping", _early_stopping)
    settings = param("settings", "more settings of TFOptimizer", _settings)

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(
            labelCol="label",
            maxEpoch=50,
            shuffle=True,
            checkpointOverwrite=True,
            resume=False,
            seed=0,
        )
