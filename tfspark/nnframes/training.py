"""What `fit` of an estimator does: rows and a copy of the model to `TFOptimizer`, and back."""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import fsspec
import keras
import tensorflow as tf
from pyspark.sql import DataFrame

from tfspark.data.columns import column_named
from tfspark.data.dataset import TFDataset
from tfspark.data.mapping import RowMapping
from tfspark.data.spec import RowSpec
from tfspark.errors import InvalidInputError
from tfspark.graph.from_keras import check_model, is_keras_model, view_of
from tfspark.graph.metrics import metrics_from
from tfspark.graph.prediction import declared_inputs, prediction_from_keras, with_preprocessing
from tfspark.graph.program import Prediction
from tfspark.nnframes.features import FeatureColumns, Prepare, Preprocessing
from tfspark.nnframes.summary import TrainingSummary
from tfspark.train.checkpoint import Retention
from tfspark.train.optimizer import TFOptimizer
from tfspark.train.triggers import EveryEpoch, MaxEpoch, TriggerOr

# Keras names layers by a count that all threads share, and builds the user's one model.
_KERAS = threading.Lock()

_RUN = re.compile(r"\d{8}-\d{6}-\d{6}-[0-9a-f]{8}")
"""Names of the folders of checkpoints, which sort by time."""


@dataclass(frozen=True)
class Fitted:
    """What came of a training.

    Attributes:
        model: a Keras model with the weights.
        prediction: of the columns of a DataFrame, preprocessing included.
        columns: that it was trained on.
        summary: of the training.
        criterion: that it was trained with.
    """

    model: keras.Model
    prediction: Prediction
    columns: FeatureColumns
    summary: TrainingSummary
    criterion: Any


def fit(
    estimator: Any,
    frame: DataFrame,
    criterion: Callable[[keras.Model], Any],
    num_classes: Callable[[keras.Model], int | None],
) -> Fitted:
    """Trains a copy of an estimator's model.

    Args:
        estimator: with `TrainingParams`.
        frame: training rows, and where a column says so rows to validate on.
        criterion: the loss of a model.
        num_classes: of labels, which then are numbers of classes; None: they are not.

    Raises:
        DataError, InvalidInputError, ProgramError: model, columns and params do not fit together.
        TFSparkError: as of `TFOptimizer.optimize`.
    """
    columns = FeatureColumns.of(frame, estimator.getFeaturesCol())
    train, held = _split(estimator, frame)
    stopping = estimator.value_of("earlyStopping")
    if stopping is not None and held is None and stopping["monitor"].startswith("val_"):
        raise _not_monitored(stopping["monitor"], ["loss"])
    original = _model_of(estimator)
    loss = criterion(original)
    with _KERAS:
        prepare = Prepare(
            columns, estimator.value_of("featurePreprocessing") or (), declared_inputs(original)
        )
        dataset = _dataset(estimator, train, held, columns, prepare, num_classes(original))
        model = _copied(original, dataset.row_spec)
        optimizer = TFOptimizer.from_keras(
            model,
            dataset,
            model_dir=_folder(estimator),
            metrics=_metrics(estimator, original),
            optimizer=_optimizer(estimator, original),
            loss=loss,
            loss_weights=_loss_weights(original),
            clip_norm=estimator.value_of("gradientClippingByL2Norm"),
            clip_value=_pair(estimator.value_of("constantGradientClipping")),
            **_settings(estimator),
        )
    optimizer.train_summary = estimator.value_of("trainSummary")
    optimizer.val_summary = estimator.value_of("validationSummary")
    try:
        _train(estimator, optimizer, model)
        summary = TrainingSummary(optimizer.history, optimizer.step)
    finally:
        optimizer.close()
    with _KERAS:
        features = _features(dataset)
        mapping = RowMapping.identity(features).then(prepare)
        prediction = with_preprocessing(prediction_from_keras(model, mapping.target), mapping)
    return Fitted(model, prediction, columns, summary, loss)


def _train(estimator: Any, optimizer: TFOptimizer, model: keras.Model) -> None:
    """Trains to the end, or until the score has not improved for a while."""
    end = estimator.value_of("endWhen") or MaxEpoch(estimator.getOrDefault("maxEpoch"))
    checkpoint = estimator.value_of("checkpointTrigger")
    validation = estimator.value_of("validationTrigger") or EveryEpoch()
    stopping = estimator.value_of("earlyStopping")
    if stopping is None:
        optimizer.optimize(end, checkpoint, validation)
        return
    callback = keras.callbacks.EarlyStopping(**stopping, restore_best_weights=True)
    callback.set_model(model)
    callback.on_train_begin()
    epoch = optimizer.start().step // optimizer.steps_per_epoch
    model.stop_training = False
    while not model.stop_training:
        optimizer.optimize(TriggerOr(end, MaxEpoch(epoch + 1)), checkpoint, validation)
        if len(optimizer.history.losses) <= epoch:
            break  # the other trigger has fired
        callback.on_epoch_end(epoch, _logs(optimizer, stopping["monitor"]))
        epoch += 1
    callback.on_train_end()


def _logs(optimizer: TFOptimizer, monitor: str) -> dict[str, float]:
    scores = {f"val_{name}": value for name, value in optimizer.scores.items()}
    logs = {"loss": optimizer.history.losses[-1], **scores}
    if monitor not in logs:
        raise _not_monitored(monitor, list(logs))
    return logs


def _not_monitored(monitor: str, there: list[str]) -> InvalidInputError:
    return InvalidInputError(
        f"Early stopping looks at {', '.join(there)}. Received: monitor={monitor!r}. "
        "Use setValidation, or validationIndicatorCol, for scores of a validation."
    )


# -- rows ---------------------------------------------------------------------------------------


class _Rows:
    """A row of a DataFrame as `(x, y)` or `(x, y, sample_weight)`; for `TFDataset.map`.

    Args:
        prepare: makes the model's inputs of the features.
        preprocessing: of labels.
        as_classes: whether labels are numbers of classes.
    """

    def __init__(self, prepare: Prepare, preprocessing: Preprocessing, as_classes: bool):
        self._prepare, self._preprocessing = prepare, preprocessing
        self._as_classes = as_classes

    @tf.autograph.experimental.do_not_convert
    def __call__(self, features: Any, labels: Any, weight: Any = None) -> tuple[Any, ...]:
        x, y = self._prepare(features), labels
        for function in self._preprocessing:
            y = function(*y) if isinstance(y, (list, tuple)) else function(y)
        y = tf.nest.map_structure(self._typed, y)
        return (x, y) if weight is None else (x, y, tf.cast(weight, tf.float32))

    def _typed(self, label: Any) -> Any:
        if self._as_classes and not self._preprocessing and label.shape.rank == 0:
            return tf.cast(label, tf.int64)
        return tf.cast(label, tf.float32) if label.dtype == tf.float64 else label


def _split(estimator: Any, frame: DataFrame) -> tuple[DataFrame, DataFrame | None]:
    """Rows to train and rows to validate on."""
    held, name = estimator.value_of("validationData"), estimator.value_of("validationIndicatorCol")
    if name is None:
        return frame, held
    if held is not None:
        raise InvalidInputError(
            "Rows to validate on are told by a column, or are a DataFrame. "
            f"Received: validationIndicatorCol={name!r} and validationData. Use one of them."
        )
    told = column_named(frame, name).cast("boolean")
    return frame.filter(~told), frame.filter(told)


def _dataset(
    estimator: Any,
    train: DataFrame,
    held: DataFrame | None,
    columns: FeatureColumns,
    prepare: Prepare,
    num_classes: int | None,
) -> TFDataset:
    labels, weight = estimator.getLabelCol(), estimator.value_of("weightCol")
    preprocessing = estimator.value_of("labelPreprocessing") or ()
    classes = {labels: num_classes} if num_classes and not preprocessing else {}

    def rows_of(frame: DataFrame, **batching: Any) -> TFDataset:
        return TFDataset.from_dataframe(
            frame,
            columns.flat,
            labels,
            weights_col=weight,
            shuffle=estimator.getOrDefault("shuffle"),
            seed=estimator.getSeed(),
            num_classes=classes,
            **batching,
        )

    rows = estimator.getBatchSize()
    validation_rows = estimator.value_of("validationBatchSize")
    if held is None or validation_rows is None:
        dataset = rows_of(train, batch_size=rows, validation_df=held)
    else:
        validation = rows_of(held, batch_per_thread=validation_rows)
        dataset = rows_of(train, batch_size=rows).validated_on(validation)
    return dataset.map(_Rows(prepare, preprocessing, num_classes is not None))


def _features(dataset: TFDataset) -> RowSpec:
    """Of the columns of features as they are stored."""
    return RowSpec.of(dataset.spec.structure()[0])


# -- the model ----------------------------------------------------------------------------------


def _model_of(estimator: Any) -> keras.Model:
    """The estimator's model, or what its function returns."""
    model = estimator.value_of("model")
    if callable(model) and not is_keras_model(model):
        model = model()
    check_model(model)
    if not isinstance(model, keras.Model):
        raise InvalidInputError(
            "Stages of Spark ML train and save models of Keras 3. Received: "
            f"{type(model).__module__}.{type(model).__qualname__}. Use KerasModel, which takes it."
        )
    return model


def _copied(model: keras.Model, row_spec: RowSpec) -> keras.Model:
    """A model of its own for this training, with the same weights: `fit` changes no estimator."""
    view_of(model).build(row_spec)
    kinds = {type(layer).__name__: type(layer) for layer in model._flatten_layers()}
    try:
        with keras.saving.custom_object_scope(kinds):
            copy = type(model).from_config(model.get_config())
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InvalidInputError(
            "An estimator trains a copy of its model, made from its configuration. "
            f"Received: {type(model).__name__} {model.name!r}, which cannot be made so: "
            f"{str(error).splitlines()[0]:.200} Give it get_config and from_config, or pass a "
            "function that makes the model instead."
        ) from error
    view_of(copy).build(row_spec)
    for old, new in zip(model._flatten_layers(), copy._flatten_layers(), strict=True):
        new.trainable = old.trainable
    metrics = {id(variable) for variable in model.metrics_variables}
    kept = [variable for variable in model.variables if id(variable) not in metrics]
    for old, new in zip(kept, copy.variables, strict=True):
        new.assign(old)
    return copy


def _loss_weights(model: keras.Model) -> Any:
    return (model.get_compile_config() or {}).get("loss_weights") if model.compiled else None


def _metrics(estimator: Any, model: keras.Model) -> Any:
    methods = estimator.value_of("validationMethods")
    if methods is not None:
        copies = _each(methods, lambda m: _fresh(m) if isinstance(m, keras.Metric) else m)
        return list(metrics_from(copies).values())
    if not model.compiled:
        return None
    return keras.saving.deserialize_keras_object(model.get_compile_config().get("metrics"))


def _each(structure: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(structure, dict):
        return {name: function(value) for name, value in structure.items()}
    return [function(value) for value in structure]


def _optimizer(estimator: Any, model: keras.Model) -> Any:
    method = estimator.value_of("optimMethod")
    if method is None:
        method = model.optimizer if model.compiled else keras.optimizers.get("adam")
    rate, decay = estimator.value_of("learningRate"), estimator.value_of("learningRateDecay")
    if decay is not None and rate is None:
        raise InvalidInputError(
            "learningRateDecay lowers the learningRate of the estimator. Received: "
            f"learningRateDecay={decay} without learningRate. Use setLearningRate."
        )
    if isinstance(method, Mapping):
        if rate is not None:
            raise InvalidInputError(
                "Several optimizers have rates of their own. Received: learningRate="
                f"{rate} with optimMethod for {', '.join(method)}. Set it in each of them."
            )
        return {prefix: _fresh(each) for prefix, each in method.items()}
    if rate is None:
        return _fresh(method)
    if decay:
        rate = keras.optimizers.schedules.InverseTimeDecay(rate, 1, decay)
    return _fresh(method, learning_rate=rate)


def _fresh(value: Any, **changes: Any) -> Any:
    """A Keras object as it was made, without the state that it has gathered."""
    return type(value).from_config({**value.get_config(), **changes})


# -- settings -----------------------------------------------------------------------------------


def _settings(estimator: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"progress": False}
    if estimator.getOrDefault("checkpointOverwrite"):
        settings["retention"] = Retention(keep_last=1)
    return {**settings, **(estimator.value_of("settings") or {})}


def _pair(bounds: Sequence[float] | None) -> tuple[float, float] | None:
    return None if bounds is None else (bounds[0], bounds[1])


def _folder(estimator: Any) -> str | None:
    """Where this fit writes its checkpoints: a folder of its own, or that of the newest one."""
    path = estimator.value_of("checkpointPath")
    if path is None:
        if estimator.getOrDefault("resume"):
            raise InvalidInputError(
                "A fit goes on from checkpoints. Received: resume=True without checkpointPath. "
                "Use setCheckpoint(path, trigger)."
            )
        return None
    path = path.rstrip("/")
    if estimator.getOrDefault("resume"):
        system, root = fsspec.core.url_to_fs(path)
        found = system.ls(root, detail=False) if system.exists(root) else []
        runs = sorted(
            name
            for name in (each.rstrip("/").rsplit("/", 1)[-1] for each in found)
            if _RUN.fullmatch(name)
        )
        if runs:
            return f"{path}/{runs[-1]}"
    return f"{path}/{datetime.now():%Y%m%d-%H%M%S-%f}-{uuid.uuid4().hex[:8]}"
