"""`TFOptimizer`: trains a TensorFlow graph, a Keras model or a function over a `TFDataset`."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from py4j.protocol import Py4JError
from pyspark import SparkContext

from tfspark.context import slots, task_threads
from tfspark.data.dataset import TFDataset
from tfspark.data.order import BatchOrder
from tfspark.errors import CheckpointError, InvalidInputError, TFSparkError
from tfspark.graph.assembly import BoundProgram
from tfspark.graph.clipping import Clipping
from tfspark.graph.evaluation import results
from tfspark.graph.update import clipping_of, update_program
from tfspark.sync.engine import Engine, Run
from tfspark.train.checkpoint import CheckpointStore, Retention
from tfspark.train.engines import choose_engine, make_engine, materialise
from tfspark.train.frontends import (
    FrontEnd,
    FunctionFrontEnd,
    GraphFrontEnd,
    KerasFrontEnd,
    graph_metrics,
)
from tfspark.train.groups import ParameterGroups, parameter_groups
from tfspark.train.leftovers import release_with
from tfspark.train.loop import TrainingLoop, progress_at, score_of
from tfspark.train.manifest import Manifest, compare_tensors
from tfspark.train.progress import planned_steps, progress_reporter
from tfspark.train.saving import (
    FromCheckpoint,
    FromValues,
    Here,
    Trained,
    check_resumable,
    newest_whole,
)
from tfspark.train.summary import TrainSummary, ValidationSummary
from tfspark.train.triggers import EveryEpoch, MaxEpoch, Trigger, check_trigger

logger = logging.getLogger("tfspark")


@dataclass(frozen=True)
class Settings:
    """How a training runs, whatever it trains.

    Attributes:
        engine: "auto", "local" or "shuffle".
        num_ranks: None: the slots of the application.
        accumulation_steps: parts in which a rank computes its rows of a batch.
        clip_norm: the most that the L2 norm of the whole gradient may be.
        clip_value: (smallest, largest) of every element of the gradient.
        model_dir: where checkpoints go, and where a rerun goes on from; None: nowhere.
        retention: which checkpoints stay.
        progress: whether to show progress.
    """

    engine: str = "auto"
    num_ranks: int | None = None
    accumulation_steps: int = 1
    clip_norm: float | None = None
    clip_value: tuple[float, float] | None = None
    model_dir: str | None = None
    retention: Retention = field(default_factory=Retention)
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("num_ranks", "accumulation_steps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InvalidInputError(
                    f"{name} is a whole number of at least 1. Received: {value!r}."
                )
        # The one place that knows what a valid clipping is.
        Clipping(value=self.clip_value, global_norm=self.clip_norm)


class TFOptimizer:
    """Trains a model where the data is: in Spark.

    Make one with `from_loss` (a TensorFlow graph), `from_keras`, `from_function` or
    `from_train_op`, then call `optimize`. Afterwards the session, the model or the variables hold
    the trained weights.

    Every constructor takes these keywords:

    * `engine`: `"auto"` (default), `"shuffle"` (Spark stages), or `"local"` (this process).
    * `num_ranks`: tasks that train side by side; default: the slots of the application.
    * `accumulation_steps`: each rank computes its rows of a batch in so many parts, one after the
      other; the result is the same and needs less memory.
    * `clip_norm`, `clip_value`: see `set_gradient_clipping_by_l2_norm` and
      `set_constant_gradient_clipping`.
    * `model_dir`: a folder or fsspec URL that driver and executors share. Checkpoints are written
      there, and a rerun with the same folder goes on from the newest whole one.
    * `retention`: which checkpoints stay; `Retention(keep_last=5)`.
    * `progress`: False hides the progress bar.

    Attributes:
        train_summary, val_summary: as set, or None.
    """

    def __init__(
        self, front_end: FrontEnd, dataset: TFDataset, optim_method: Any, settings: Settings
    ):
        if dataset.batch_size is None:
            raise InvalidInputError(
                "Training needs a global batch size. Received: a TFDataset without batch_size "
                "(batch_per_thread is for evaluation and prediction). Pass batch_size=…."
            )
        self._front_end = front_end
        self._dataset = dataset
        self._batch_size: int = dataset.batch_size
        self._settings = settings
        names, variables = front_end.trainable()
        self._groups: ParameterGroups = parameter_groups(optim_method, names, variables)
        self._bound: BoundProgram = front_end.program(self._groups.group_of)
        self._updates = self._make_updates()
        self._evaluation = front_end.evaluation()
        if dataset.validation is not None and self._evaluation is None:
            raise InvalidInputError(
                "A validation set needs something to measure. Received: a TFDataset with "
                "validation data, but no metrics. Pass metrics=…, or val_outputs, val_labels and "
                "val_method."
            )
        self._store = CheckpointStore(settings.model_dir) if settings.model_dir else None
        if self._store is not None:
            self._store.check_writable()
        self._requested: FromCheckpoint | None = None
        self._training: TrainingLoop | None = None
        self.train_summary: TrainSummary | None = None
        self.val_summary: ValidationSummary | None = None

    # -- constructors ---------------------------------------------------------------------------

    @classmethod
    def from_keras(
        cls,
        keras_model: Any,
        dataset: TFDataset,
        session_config: Any = None,
        model_dir: str | None = None,
        metrics: Any = None,
        optimizer: Any = None,
        *,
        loss: Any = None,
        loss_weights: Any = None,
        **settings: Any,
    ) -> TFOptimizer:
        """Trains a Keras 3 model; afterwards the model holds the weights.

        Args:
            keras_model: Sequential, functional or subclassed.
            dataset: rows `(x, y)` or `(x, y, sample_weight)`, as `fit` takes them.
            session_config: of Analytics Zoo; has no meaning here.
            model_dir: see the class.
            metrics: instead of the compiled ones: Keras metrics or their names, for validation.
            optimizer: instead of the compiled one: a Keras optimizer, its name, or a dict of
                variable-path prefix to optimizer.
            loss, loss_weights: instead of the compiled ones.
            **settings: see the class.

        Example:
            >>> x, y = np.ones([8, 3], np.float32), np.ones([8, 1], np.float32)
            >>> dataset = TFDataset.from_ndarrays((x, y), batch_size=4)
            >>> model = keras.Sequential([keras.layers.Dense(1)])
            >>> model.compile("adam", "mse", metrics=["mae"])
            >>> TFOptimizer.from_keras(model, dataset).optimize(MaxEpoch(5))
        """
        front_end = KerasFrontEnd(keras_model, dataset, loss, loss_weights, metrics)
        chosen = optimizer if optimizer is not None else front_end.compiled_optimizer()
        return cls(front_end, dataset, chosen, Settings(model_dir=model_dir, **settings))

    @classmethod
    def from_loss(
        cls,
        loss: Any,
        optim_method: Any,
        session: Any = None,
        inputs: Any = None,
        dataset: TFDataset | None = None,
        val_outputs: Any = None,
        val_labels: Any = None,
        val_method: Any = None,
        clip_norm: float | None = None,
        clip_value: float | tuple[float, float] | None = None,
        metrics: Any = None,
        tensor_with_value: Mapping[Any, Any] | None = None,
        session_config: Any = None,
        model_dir: str | None = None,
        updates: Sequence[Any] | None = None,
        *,
        loss_reduction: str = "mean",
        **settings: Any,
    ) -> TFOptimizer:
        """Trains a TensorFlow graph; afterwards `sess` holds the weights.

        Args:
            loss: a scalar tensor of a graph over `dataset.tensors`.
            optim_method: a Keras optimizer, its name, or a dict of variable-name prefix to
                optimizer.
            session: of the loss's graph; default: a new one. Variables that have no value yet are
                initialized.
            inputs: placeholders of your own for the fields of the data set, in its structure.
            dataset: default: the one whose tensors the loss depends on.
            val_outputs, val_labels: tensors that `val_method` and `metrics` compare.
            val_method: a Keras metric, its name, or a list of them.
            clip_norm: bound of the L2 norm of the whole gradient.
            clip_value: bounds of every element of the gradient, or one number for both.
            metrics: a dict of name to scalar tensor of the graph (its mean over rows is taken) or
                to Keras metric of `val_labels` and `val_outputs`.
            tensor_with_value: a dict of placeholder to (value in training, value in evaluation).
            session_config: `tf.compat.v1.ConfigProto` of the new session.
            model_dir: see the class.
            updates: operations to run in every step, besides the collection UPDATE_OPS.
            loss_reduction: how the loss reduces over rows, "mean" or "sum".
            **settings: see the class.

        Raises:
            ProgramError: the loss is no scalar, depends on no trainable variable or no tensor of
                the data set, or is of another graph; names the remedy.

        Example:
            >>> x, y = np.ones([8, 3], np.float32), np.ones([8, 1], np.float32)
            >>> dataset = TFDataset.from_ndarrays((x, y), batch_size=4)
            >>> import tensorflow.compat.v1 as tf
            >>> with tf.Graph().as_default():
            ...     inputs, labels = dataset.tensors
            ...     outputs = tf.matmul(inputs, tf.get_variable("kernel", [3, 1]))
            ...     loss = tf.losses.mean_squared_error(labels, outputs)
            ...     optimizer = TFOptimizer.from_loss(loss, Adam(1e-3))
            ...     optimizer.optimize(end_trigger=MaxEpoch(5))
            ...     tf.train.Saver().save(optimizer.sess, "model")
        """
        front_end = GraphFrontEnd(
            loss,
            session=session,
            session_config=session_config,
            dataset=dataset,
            inputs=inputs,
            updates=updates,
            tensor_with_value=tensor_with_value,
            val_outputs=val_outputs,
            val_labels=val_labels,
            metrics=graph_metrics(metrics, val_method),
            reduction=loss_reduction,
        )
        chosen = Settings(
            model_dir=model_dir,
            clip_norm=clip_norm,
            clip_value=_bounds(clip_value),
            **settings,
        )
        return cls(front_end, front_end.dataset, optim_method, chosen)

    @classmethod
    def from_train_op(
        cls,
        train_op: Any,
        loss: Any,
        *,
        inputs: Any = None,
        labels: Any = None,
        metrics: Any = None,
        updates: Sequence[Any] | None = None,
        sess: Any = None,
        dataset: TFDataset | None = None,
        tensor_with_value: Mapping[Any, Any] | None = None,
        session_config: Any = None,
        loss_reduction: str = "mean",
        **settings: Any,
    ) -> TFOptimizer:
        """Trains a TensorFlow graph by its own training operation; `sess` then holds the weights.

        The gradients are those that the operation applies; its rule runs on shards as the Keras
        optimizer of the same formula.

        Args:
            train_op: what `tf.compat.v1.train.Optimizer.minimize` or `apply_gradients` returned.
            loss: the scalar tensor.
            inputs, labels: placeholders of your own for the fields of the data set; together they
                have the structure of its rows `(inputs, labels)`.
            metrics: a dict of name to scalar tensor of the graph.
            updates, dataset, tensor_with_value, session_config, loss_reduction: as of `from_loss`.
            sess: as `session` of `from_loss`.
            **settings: see the class.

        Raises:
            UnsupportedRuleError: the operation's rule has no counterpart; use `from_loss`.
        """
        if labels is not None:
            inputs = (inputs, labels)
        front_end = GraphFrontEnd(
            loss,
            train_op=train_op,
            session=sess,
            session_config=session_config,
            dataset=dataset,
            inputs=inputs,
            updates=updates,
            tensor_with_value=tensor_with_value,
            val_outputs=None,
            val_labels=None,
            metrics=graph_metrics(metrics, None),
            reduction=loss_reduction,
        )
        return cls(front_end, front_end.dataset, front_end.rule(), Settings(**settings))

    @classmethod
    def from_function(
        cls,
        loss_fn: Callable[[Any], Any],
        variables: Sequence[Any],
        dataset: TFDataset,
        optim_method: Any,
        *,
        predict_fn: Callable[[Any], Any] | None = None,
        metrics: Any = None,
        loss_reduction: str = "mean",
        **settings: Any,
    ) -> TFOptimizer:
        """Trains the variables of a function; afterwards they hold the weights.

        Args:
            loss_fn: a batch in the data set's structure to a scalar; may be a `tf.function`.
            variables: to train: `tf.Variable` or Keras variables.
            dataset: what to train on.
            optim_method: as of `from_loss`.
            predict_fn: a batch to (labels, predictions), for `metrics`.
            metrics: Keras metrics or their names, for validation.
            loss_reduction: how the loss reduces over rows, "mean" or "sum".
            **settings: see the class.

        Example:
            >>> x, y = np.ones([8, 3], np.float32), np.ones([8, 1], np.float32)
            >>> dataset = TFDataset.from_ndarrays((x, y), batch_size=4)
            >>> kernel = tf.Variable(tf.zeros([3, 1]))
            >>> def loss_fn(batch):
            ...     x, y = batch
            ...     return tf.reduce_mean((x @ kernel - y) ** 2)
            >>> TFOptimizer.from_function(loss_fn, [kernel], dataset, Adam(1e-2)).optimize()
        """
        front_end = FunctionFrontEnd(
            loss_fn, variables, dataset, loss_reduction, predict_fn, metrics
        )
        return cls(front_end, dataset, optim_method, Settings(**settings))

    # -- settings -------------------------------------------------------------------------------

    def set_constant_gradient_clipping(self, min_value: float, max_value: float) -> TFOptimizer:
        """Bounds every element of the gradient of the global batch; returns self."""
        return self._with(clip_value=(min_value, max_value))

    def set_gradient_clipping_by_l2_norm(self, clip_norm: float) -> TFOptimizer:
        """Bounds the L2 norm of the whole gradient of the global batch; returns self.

        Source: `tf.clip_by_global_norm`. For a bound per tensor use the `clipnorm` of a Keras
        optimizer.
        """
        return self._with(clip_norm=clip_norm)

    def set_train_summary(self, summary: TrainSummary) -> TFOptimizer:
        """Writes loss, learning rate, throughput and phase times of each step; returns self."""
        self.train_summary = _checked(summary, TrainSummary)
        return self

    def set_val_summary(self, summary: ValidationSummary) -> TFOptimizer:
        """Writes the scores of each validation; returns self."""
        self.val_summary = _checked(summary, ValidationSummary)
        return self

    # -- training -------------------------------------------------------------------------------

    def optimize(
        self,
        end_trigger: Trigger | None = None,
        checkpoint_trigger: Trigger | None = None,
        validation_trigger: Trigger | None = None,
    ) -> TFOptimizer:
        """Trains until a trigger fires; then session, model or variables hold the weights.

        Counts go on from where they were: after a resume, or a former `optimize`, `MaxEpoch(5)`
        still means five epochs in all.

        Args:
            end_trigger: when to stop; default `MaxEpoch(1)`.
            checkpoint_trigger: when to write a checkpoint into `model_dir`; default `EveryEpoch()`.
                One more is written at the end.
            validation_trigger: when to validate; default: the checkpoint trigger.

        Returns:
            This optimizer.

        Raises:
            InvalidInputError: something that is not a trigger.
            NonFiniteError: a loss or a gradient is NaN or infinite. As after every error and
                interrupt, the weights of the last good commit are brought home first.
            TFSparkError: what else went wrong, with rank, step and phase.
        """
        end = check_trigger(MaxEpoch(1) if end_trigger is None else end_trigger, "end_trigger")
        checkpoint = check_trigger(
            EveryEpoch() if checkpoint_trigger is None else checkpoint_trigger,
            "checkpoint_trigger",
        )
        validation = check_trigger(
            checkpoint if validation_trigger is None else validation_trigger, "validation_trigger"
        )
        training = self._started()
        training.train_summary, training.validation_summary = self.train_summary, self.val_summary
        start = training.progress
        try:
            with progress_reporter(
                self._settings.progress, planned_steps(end, start), start.step
            ) as reporter:
                training.reporter = reporter
                training.train(end, checkpoint, validation)
        except BaseException:
            self._bring_home_if_possible(training)
            raise
        training.insist(lambda: self._bring_home(training))
        return self

    def load_checkpoint(self, path: str, version: int | None = None) -> TFOptimizer:
        """Goes on from a checkpoint: weights, optimizer slots, schedules, model state, data order.

        Args:
            path: the `model_dir` of the run that wrote it.
            version: its step; default: the newest whole one.

        Raises:
            CheckpointError: there is none, or it is of another model or optimizer.
        """
        store = CheckpointStore(path)
        if version is None:
            manifest = newest_whole(store, SparkContext._active_spark_context)
            if manifest is None:
                raise CheckpointError(
                    f"There must be a whole checkpoint to load. Received: none in {path!r}."
                )
        else:
            manifest = store.read(version)
        self.close()
        self._requested = self._checked(store, manifest)
        return self

    @property
    def sess(self) -> Any:
        """The session of `from_loss`, which holds the weights after `optimize`."""
        session = getattr(self._front_end, "session", None)
        if session is None:
            raise AttributeError("Only an optimizer made by from_loss or from_train_op has a sess.")
        return session

    @property
    def scores(self) -> dict[str, float]:
        """The scores of the last validation by name; empty before it."""
        return dict(self._training.scores) if self._training else {}

    @property
    def batch_size(self) -> int:
        """Rows of a global batch."""
        return self._batch_size

    @property
    def step(self) -> int:
        """Finished steps."""
        return self._training.progress.step if self._training else 0

    def close(self) -> None:
        """Frees what is kept in Spark for going on.

        The next `optimize` starts a new training: from the newest checkpoint of `model_dir`, if
        there is one, else with step 1 and the weights as they are.
        """
        if self._training is not None:
            self._release()
            self._training = None

    # -- inside ---------------------------------------------------------------------------------

    def _with(self, **changes: Any) -> TFOptimizer:
        if self._training is not None:
            raise InvalidInputError(
                f"{', '.join(changes)} must be set before training starts. Received: a change "
                "after optimize(). Call close() to start anew."
            )
        self._settings = replace(self._settings, **changes)
        self._updates = self._make_updates()
        return self

    def _make_updates(self) -> list[Any]:
        return [
            update_program(
                group.optimizer,
                self._bound.program.dtype,
                clip_value=self._settings.clip_value,
                weight_decay=group.weight_decay,
            )
            for group in self._groups.groups
        ]

    def _started(self) -> TrainingLoop:
        """The training, set up when it is first asked for."""
        if self._training is None:
            context = SparkContext._active_spark_context
            name = choose_engine(self._settings.engine, context)
            num_ranks = self._settings.num_ranks or (slots(context) if context else 1)
            saved = self._checkpoint_to_resume()
            train_set = materialise(name, self._dataset, num_ranks, context)
            flat, state = self._bound.values()
            run = self._make_run(
                train_set,
                saved.store.read_state(saved.manifest) if saved else state,
                num_ranks,
                task_threads(context) if context else 1,
            )
            if saved:
                _warn_of_changed_order(saved.manifest, run.order)
            engine = make_engine(name, train_set, context)
            sets = [train_set]
            if self._dataset.validation is not None:
                sets.append(materialise(name, self._dataset.validation, num_ranks, context))
            initial = saved or _initial_state(flat, name, context)
            self._release = release_with(self, partial(_close, engine, [*sets, initial], context))
            self._training = self._make_training(engine, run, name, sets, context, initial)
            self._requested = None
        return self._training

    def _make_run(
        self, train_set: Any, state: Sequence[np.ndarray], num_ranks: int, threads: int
    ) -> Run:
        order = BatchOrder(
            tuple(handle.rows for handle in train_set.handles),
            self._batch_size,
            self._dataset.seed,
            self._dataset.shuffle,
        )
        return Run(
            run_id=uuid.uuid4().hex,
            program=self._bound.program,
            updates=tuple(self._updates),
            clippings=tuple(clipping_of(group.optimizer) for group in self._groups.groups),
            order=order,
            mapping=self._dataset.mapping,
            seed=self._dataset.seed,
            state=tuple(state),
            num_ranks=num_ranks,
            clip_norm=self._settings.clip_norm,
            accumulation_steps=self._settings.accumulation_steps,
            task_threads=threads,
            digests=tuple(handle.digest for handle in train_set.handles),
        )

    def _make_training(
        self,
        engine: Engine,
        run: Run,
        name: str,
        sets: list[Any],
        context: SparkContext | None,
        make_state: FromValues | FromCheckpoint,
    ) -> TrainingLoop:
        self._groups.bind(run.order.steps_per_epoch)
        step, loss, scores = 0, None, {}
        if isinstance(make_state, FromCheckpoint):
            manifest = make_state.manifest
            step, loss = manifest.step, manifest.training.get("loss")
            scores = dict(manifest.metrics)
            self._groups.restore(manifest.training["schedules"])
            logger.info("Going on from step %d of %s.", step, make_state.store.model_dir)
        training = TrainingLoop(
            engine=engine,
            run=run,
            rates=self._groups,
            commit=engine.start(run, make_state),
            progress=progress_at(run.order, step, loss, score_of(scores)),
            reporter=progress_reporter(False, None),
            store=self._store,
            retention=self._settings.retention,
            scores=scores,
        )
        if self._dataset.validation is not None:
            training.validate = self._validator(
                engine, run, name, sets[1], self._dataset.validation
            )
        return training

    def _validator(
        self, engine: Engine, run: Run, name: str, held: Any, validation: TFDataset
    ) -> Any:
        assert self._evaluation is not None
        evaluation, metrics = self._evaluation
        handles = held.handles if name == "local" else held.rdd
        batch_rows = validation.batch_per_thread or max(1, self._batch_size // run.num_ranks)

        def validate(commit: Any) -> dict[str, float]:
            accumulators = engine.evaluate(
                commit, evaluation, handles, validation.mapping, batch_rows
            )
            return results(evaluation, metrics, accumulators)

        return validate

    def _checkpoint_to_resume(self) -> FromCheckpoint | None:
        """The checkpoint that was asked for, or the newest whole one of `model_dir`."""
        if self._requested is None and self._store is not None:
            manifest = newest_whole(self._store, SparkContext._active_spark_context)
            return None if manifest is None else self._checked(self._store, manifest)
        return self._requested

    def _checked(self, store: CheckpointStore, manifest: Manifest) -> FromCheckpoint:
        """A checkpoint, if it is of this model and these optimizers."""
        program = self._bound.program
        compare_tensors(manifest, program.weights, program.dtype)
        check_resumable(manifest, program, self._updates)
        return FromCheckpoint(store, manifest)

    def _bring_home(self, training: TrainingLoop) -> None:
        """Sets the user's variables to the weights and model state of the newest commit."""
        run = training.run
        shards, means, first = [], [], []
        for state in training.engine.collect(training.commit, Trained(self._averaged())):
            shards.append(np.array(state.shard))
            means.append(state.mean)
            first = state.first
        flat = run.layout.join(shards)
        self._bound.assign(flat, run.state_layout.assemble(run.state, np.concatenate(means), first))

    def _averaged(self) -> frozenset[int]:
        return frozenset(
            number for number, group in enumerate(self._groups.groups) if group.optimizer.use_ema
        )

    def _bring_home_if_possible(self, training: TrainingLoop) -> None:
        try:
            training.insist(lambda: self._bring_home(training))
        except (TFSparkError, Py4JError) as error:
            logger.warning(
                "The weights of step %d could not be brought home: %s",
                training.progress.step,
                error,
            )


def _initial_state(flat: np.ndarray, name: str, context: SparkContext | None) -> FromValues:
    """The initial weights, on their one way from the driver."""
    if name == "local":
        return FromValues(Here(flat))
    assert context is not None
    return FromValues(context.broadcast(flat))


def _warn_of_changed_order(manifest: Manifest, order: BatchOrder) -> None:
    saved = (manifest.training.get("rows_per_epoch"), manifest.batch_size, manifest.seed)
    now = (order.total_rows, order.batch_size, order.seed)
    if saved != now:
        logger.warning(
            "The order of batches differs from the checkpoint's: (rows, batch_size, seed) was %s "
            "and is %s. Training goes on from step %d in the new order.",
            saved,
            now,
            manifest.step,
        )


def _bounds(value: Any) -> tuple[float, float] | None:
    """(smallest, largest) of one number or a pair."""
    if value is None or isinstance(value, tuple):
        return value
    return (-value, value)


def _checked(value: Any, expected: type) -> Any:
    if not isinstance(value, expected):
        raise InvalidInputError(f"A {expected.__name__} is expected. Received: {value!r}.")
    return value


def _close(engine: Engine, held: Sequence[Any], context: SparkContext | None) -> None:
    if context is not None and context._jsc is None:
        return  # Spark was stopped, and all that is held in it has gone
    engine.close()
    for each in held:
        each.release()
