"""`TFEstimator`: a model function of TensorFlow 1 that trains, is evaluated and predicts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import optree
import tensorflow as tf
from pyspark import SparkContext
from pyspark.rdd import RDD
from tensorflow.python.eager import context

from tfspark.data.dataset import TFDataset
from tfspark.errors import InvalidInputError
from tfspark.graph.from_graph import initialize, name_of
from tfspark.graph.metrics import metrics_from
from tfspark.graph.prediction import prediction_from_graph
from tfspark.inference.evaluation import evaluate_outputs
from tfspark.inference.models import BATCH_SIZE
from tfspark.inference.rows import predict_dataset
from tfspark.train.checkpoint import CheckpointStore
from tfspark.train.frontends import check_dataset
from tfspark.train.optimizer import TFOptimizer
from tfspark.train.recipe import Settings
from tfspark.train.saving import newest_whole
from tfspark.train.triggers import MaxIteration, Trigger


class ModeKeys:
    """What a model function is called for, with the values of `tf.estimator`."""

    TRAIN = "train"
    EVAL = "eval"
    PREDICT = "infer"


@dataclass(frozen=True)
class TFEstimatorSpec:
    """What a model function returns; `tf.estimator.EstimatorSpec` without what is of no use here.

    Attributes:
        mode: as received.
        predictions: a tensor `[rows, …]`, or a dict of them; for prediction, and for metrics.
        loss: a scalar, the mean over rows; for training and evaluation.
        train_op: of a `tf.compat.v1.train.Optimizer`: `minimize(loss)`.
        optimizer: of Keras, or its name, instead of `train_op`.
        metrics: by name, a scalar tensor, a mean over rows, or a Keras metric of labels and
            predictions; for evaluation.
    """

    mode: str
    predictions: Any = None
    loss: Any = None
    train_op: Any = None
    optimizer: Any = None
    metrics: Mapping[str, Any] | None = None


class TFEstimator:
    """Trains, evaluates and uses what a model function builds, on the rows of data sets.

    Make one with `from_model_fn`. Each call builds a graph of its own; the weights are carried from
    one to the next by the names of their variables.

    Attributes:
        step: finished steps of training.
    """

    def __init__(
        self,
        model_fn: Callable[..., TFEstimatorSpec],
        model_dir: str | None,
        config: Any,
        params: Any,
        settings: Settings,
    ):
        self._model_fn, self._model_dir = model_fn, model_dir
        self._config, self._params = config, params
        self._settings = settings
        self._values: dict[str, np.ndarray] | None = None
        self.step = 0

    @classmethod
    def from_model_fn(
        cls,
        model_fn: Callable[..., TFEstimatorSpec],
        model_dir: str | None = None,
        config: Any = None,
        params: Any = None,
        **settings: Any,
    ) -> TFEstimator:
        """An estimator of a model function.

        Args:
            model_fn: called with `features, labels` and, where it takes them, `mode`, `params` and
                `config`, in a graph of its own; returns a `TFEstimatorSpec`. In prediction labels
                are None.
            model_dir: a folder or fsspec URL for checkpoints. Training goes on from the newest one,
                with all its optimizer's slots, also in another process. Without it weights are kept
                in memory, and every `train` begins with new slots.
            config: passed on to the functions.
            params: passed on to the functions, for hyperparameters.
            **settings: of `TFOptimizer`, such as `engine` and `num_ranks`.

        Example:
            >>> import tensorflow.compat.v1 as tf1
            >>> def model_fn(features, labels, mode):
            ...     outputs = tf1.matmul(features, tf1.get_variable("kernel", [3, 1]))
            ...     if mode == ModeKeys.PREDICT:
            ...         return TFEstimatorSpec(mode, predictions=outputs)
            ...     loss = tf1.losses.mean_squared_error(labels, outputs)
            ...     return TFEstimatorSpec(mode, outputs, loss, optimizer="adam")
            >>> x, y = np.ones([8, 3], np.float32), np.ones([8, 1], np.float32)
            >>> estimator = TFEstimator.from_model_fn(model_fn, engine="local", num_ranks=1)
            >>> estimator.train(lambda: TFDataset.from_ndarrays((x, y), batch_size=4), steps=3).step
            3
        """
        chosen = Settings.of(model_dir=model_dir, **{"progress": False, **settings})
        return cls(model_fn, model_dir, config, params, chosen)

    def train(
        self,
        input_fn: Callable[..., TFDataset],
        steps: int | None = None,
        end_trigger: Trigger | None = None,
        checkpoint_trigger: Trigger | None = None,
    ) -> TFEstimator:
        """Trains for some steps more.

        Args:
            input_fn: returns a `TFDataset` of rows `(features, labels)` with a batch size; called
                with `mode`, `params` and `config` where it takes them.
            steps: how many; default: those that use every row once.
            end_trigger: when to stop, instead of `steps`; with `model_dir` its counts include the
                steps of former calls.
            checkpoint_trigger: when to write checkpoints; one more is written at the end.

        Returns:
            This estimator.

        Raises:
            InvalidInputError: the function returns no loss, or nothing to train with.
        """
        if steps is not None and end_trigger is not None:
            raise InvalidInputError(
                "Training ends by a count of steps or by a trigger. "
                f"Received: steps={steps} and {end_trigger!r}. Use one of them."
            )
        with tf.Graph().as_default() as graph:
            dataset, spec = self._built(input_fn, ModeKeys.TRAIN)
            _needed(spec, "loss")
            session = tf.compat.v1.Session(graph=graph)
            self._fill(session, self._values)
            optimizer = self._optimizer(spec, session, dataset)
            try:
                before = optimizer.start().step
                count = optimizer.steps_per_epoch if steps is None else steps
                optimizer.optimize(end_trigger or MaxIteration(before + count), checkpoint_trigger)
                self.step = optimizer.step if self._model_dir else self.step + optimizer.step
            finally:
                optimizer.close()
                self._values = _values(session)
        return self

    def evaluate(
        self,
        input_fn: Callable[..., TFDataset],
        eval_methods: Any = None,
        checkpoint_path: str | None = None,
    ) -> dict[str, float]:
        """The loss and metrics over all rows.

        Args:
            input_fn: as of `train`; the data set may have `batch_per_thread` instead.
            eval_methods: Keras metrics of labels and predictions, or their names, besides those of
                the function.
            checkpoint_path: the `model_dir` of the weights; default: those at hand.

        Returns:
            By name: `"loss"`, the metrics, and `"global_step"`.

        Raises:
            InvalidInputError: nothing was trained.
        """
        with tf.Graph().as_default() as graph:
            dataset, spec = self._built(input_fn, ModeKeys.EVAL)
            _needed(spec, "loss")
            given = dict(spec.metrics or {})
            tensors = {"loss": spec.loss}
            tensors |= {name: each for name, each in given.items() if tf.is_tensor(each)}
            others = {name: each for name, each in given.items() if name not in tensors}
            compares = bool(others or eval_methods)
            predictions = optree.tree_leaves(spec.predictions) if compares else []
            session = tf.compat.v1.Session(graph=graph)
            step = self._restore(session, checkpoint_path)
            means = {name: _rows_of(tensor, dataset) for name, tensor in tensors.items()}
            prediction = prediction_from_graph(
                [*means.values(), *predictions], session=session, inputs=dataset.tensors
            )
        with context.eager_mode():
            compared = metrics_from(_each(others)) | metrics_from(_each(eval_methods))
            found = evaluate_outputs(
                prediction,
                dataset,
                compared,
                _batch_of(dataset),
                means=list(means),
                local=self._settings.engine == "local",
            )
        return {**found, "global_step": step}

    def predict(
        self,
        input_fn: Callable[..., TFDataset],
        predict_keys: Sequence[str] | None = None,
        checkpoint_path: str | None = None,
    ) -> RDD:
        """Predictions of all rows.

        Args:
            input_fn: returns a `TFDataset` of features, or of rows whose labels are left out.
            predict_keys: of a dict of predictions those that are wanted.
            checkpoint_path: the `model_dir` of the weights; default: those at hand.

        Returns:
            RDD of arrays `[*shape]` in the structure of the predictions, in the order of the rows.

        Raises:
            InvalidInputError: nothing was trained, or there is no such key.
        """
        with tf.Graph().as_default() as graph:
            dataset, spec = self._built(input_fn, ModeKeys.PREDICT)
            _needed(spec, "predictions")
            predictions = _chosen(spec.predictions, predict_keys)
            session = tf.compat.v1.Session(graph=graph)
            self._restore(session, checkpoint_path)
            prediction = prediction_from_graph(
                predictions, session=session, inputs=dataset.feature_tensors
            )
        return predict_dataset(prediction, dataset, _batch_of(dataset))

    # -- inside ---------------------------------------------------------------------------------

    def _built(self, input_fn: Callable[..., Any], mode: str) -> tuple[TFDataset, TFEstimatorSpec]:
        """What the two functions make, in the default graph."""
        known = {"mode": mode, "params": self._params, "config": self._config}
        dataset = _called(input_fn, known)
        check_dataset(dataset)
        features = dataset.feature_tensors
        labels = None if mode == ModeKeys.PREDICT else dataset.label_tensors
        spec = _called(self._model_fn, known, features, labels)
        if not isinstance(spec, TFEstimatorSpec):
            raise InvalidInputError(
                "A model function returns a TFEstimatorSpec. "
                f"Received: {type(spec).__name__} in mode {mode!r}."
            )
        return dataset, spec

    def _optimizer(self, spec: TFEstimatorSpec, session: Any, dataset: TFDataset) -> TFOptimizer:
        settings = {name: getattr(self._settings, name) for name in vars(self._settings)}
        if spec.train_op is not None:
            return TFOptimizer.from_train_op(
                spec.train_op, spec.loss, sess=session, dataset=dataset, **settings
            )
        if spec.optimizer is None:
            raise InvalidInputError(
                "In mode 'train' a spec has a train_op or an optimizer. Received: neither."
            )
        return TFOptimizer.from_loss(
            spec.loss, spec.optimizer, session=session, dataset=dataset, **settings
        )

    def _restore(self, session: Any, checkpoint_path: str | None) -> int:
        """Gives the variables of a graph the values that were trained; returns their step."""
        path = checkpoint_path or (self._model_dir if self._values is None else None)
        values, step = self._values, self.step
        if path is not None:
            store = CheckpointStore(path)
            manifest = newest_whole(store, SparkContext._active_spark_context)
            if manifest is not None:
                state = zip(manifest.state, store.read_state(manifest), strict=True)
                values = store.read_weights(manifest) | {slot.name: v for slot, v in state}
                step = manifest.step
        if values is None:
            raise InvalidInputError(
                "A model is used after it was trained. Received: no call of train(), and "
                f"{'no model_dir' if path is None else f'no checkpoint in {path!r}'}."
            )
        self._fill(session, values)
        return step

    @staticmethod
    def _fill(session: Any, values: Mapping[str, np.ndarray] | None) -> None:
        for variable in session.graph.get_collection(tf.compat.v1.GraphKeys.GLOBAL_VARIABLES):
            if values and name_of(variable) in values:
                variable.load(values[name_of(variable)], session)
        initialize(session)


def _called(function: Callable[..., Any], known: Mapping[str, Any], *arguments: Any) -> Any:
    """Calls a function with those of the known arguments that it names."""
    names = inspect.signature(function).parameters
    return function(*arguments, **{name: v for name, v in known.items() if name in names})


def _needed(spec: TFEstimatorSpec, name: str) -> None:
    if getattr(spec, name) is None:
        raise InvalidInputError(
            f"In mode {spec.mode!r} a spec has {name}. Received: none. "
            f"Return TFEstimatorSpec(mode, {name}=…)."
        )


def _values(session: Any) -> dict[str, np.ndarray]:
    variables = session.graph.get_collection(tf.compat.v1.GraphKeys.GLOBAL_VARIABLES)
    return dict(zip(map(name_of, variables), session.run(variables), strict=True))


def _rows_of(tensor: Any, dataset: TFDataset) -> Any:
    """A tensor with a value for each row: a scalar mean stands for all of them."""
    if tensor.shape.rank:
        return tensor
    first = optree.tree_leaves(dataset.tensors)[0]
    return tf.fill(tf.shape(first)[:1], tensor)


def _each(metrics: Any) -> Any:
    """The metrics anew: one that a function has made has its variables in that function's graph."""
    if isinstance(metrics, keras.Metric):
        return type(metrics).from_config(metrics.get_config())
    if isinstance(metrics, dict):
        return {name: _each(metric) for name, metric in metrics.items()}
    return [_each(each) for each in metrics] if isinstance(metrics, (list, tuple)) else metrics


def _batch_of(dataset: TFDataset) -> int:
    return dataset.batch_per_thread or dataset.batch_size or BATCH_SIZE


def _chosen(predictions: Any, keys: Sequence[str] | None) -> Any:
    if keys is None:
        return predictions
    unknown = [key for key in keys if not isinstance(predictions, dict) or key not in predictions]
    if unknown:
        there = ", ".join(predictions) if isinstance(predictions, dict) else "no keys"
        raise InvalidInputError(
            f"predict_keys name predictions of a dict. Received: {unknown[0]!r}; there are {there}."
        )
    return {key: predictions[key] for key in keys}
