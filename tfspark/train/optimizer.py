"""`TFOptimizer`: trains a TensorFlow graph, a Keras model or a function over a `TFDataset`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyspark import SparkContext

from tfspark.data.dataset import TFDataset
from tfspark.errors import CheckpointError, CommitLostError, InvalidInputError
from tfspark.sync.engine import SlotsChanged
from tfspark.train.checkpoint import CheckpointStore
from tfspark.train.failure_policy import Cause, Decision, Failures
from tfspark.train.frontends import (
    FrontEnd,
    FunctionFrontEnd,
    GraphFrontEnd,
    KerasFrontEnd,
    graph_metrics,
)
from tfspark.train.history import History
from tfspark.train.manifest import Manifest
from tfspark.train.recipe import Recipe, Settings
from tfspark.train.saving import FromCheckpoint, newest_whole
from tfspark.train.summary import TrainSummary, ValidationSummary
from tfspark.train.training import Ranks, Training
from tfspark.train.triggers import EveryEpoch, MaxEpoch, Trigger, check_trigger

logger = logging.getLogger("tfspark")


class TFOptimizer:
    """Trains a model where the data is: in Spark.

    Make one with `from_loss` (a TensorFlow graph), `from_keras`, `from_function` or
    `from_train_op`, then call `optimize`. Afterwards the session, the model or the variables hold
    the trained weights.

    Every constructor takes these keywords:

    * `engine`: `"auto"` (default), `"gang"` (all ranks at once, swapping slices over sockets),
      `"shuffle"` (Spark stages), or `"local"` (this process).
    * `num_ranks`: tasks that train side by side; default: the slots of the application.
    * `accumulation_steps`: each rank computes its rows of a batch in so many parts, one after the
      other; the result is the same and needs less memory.
    * `average_every`: τ of local SGD, on the engine `"gang"`. Each rank takes τ steps alone, each
      on its own rows of the global batch, with weights and optimizer slots of its own; then all
      are averaged over ranks, weighted by the rows that each has used. 1 (default) is synchronous
      SGD, where ranks exchange in every step. Averages come after steps whose number is a multiple
      of τ, and after those where a checkpoint or validation trigger may fire or a count
      (`MaxEpoch`, `MaxIteration`) ends the training. Other end triggers are asked at averages
      only, with the loss of the step before, so they may end up to τ - 1 steps later. A rank needs
      memory for whole optimizer slots, not for its slice of them. Does not go together with
      `wire_dtype`.
    * `clip_norm`, `clip_value`: see `set_gradient_clipping_by_l2_norm` and
      `set_constant_gradient_clipping`.
    * `model_dir`: a folder or fsspec URL that driver and executors share. Checkpoints are written
      there, and a rerun with the same folder goes on from the newest whole one.
    * `retention`: which checkpoints stay; `Retention(keep_last=5)`.
    * `leave_out`: `LeaveOut()` lets a step of the engine `"gang"` go on without slow ranks.
    * `progress`: False hides the progress bar.
    * `wire_dtype`: `"bfloat16"` or `"float16"` halves the bytes that travel between ranks: weights
      and gradients are rounded on their way; sums and the weights that an optimizer steps stay in
      full precision. Worth it where the network is the bottleneck; on one host it is not.
    * `gradient_buckets`: the most parts, of whole tensors each, that the engine `"gang"` exchanges
      a gradient in: those of the last layers while the gradient of the first layers is computed.
      None (default): 4 between hosts, fewer where they would be small, 1 on one host. Weights and
      losses are the same bits, but where optimizers sum over tensors (clipping by norm, LARS,
      LAMB): there the last bits differ.
    * `failure_policy`: `FailurePolicy()` says how often what failed is done again: a process, a
      host or the network up to 100 times an hour and five times in a row, a function of the user
      never.

    * `turns`: with a dict of optimizers, the prefixes of those that step, one at a time and in a
      cycle, as `("critic/", "critic/", "actor/")`. The others rest: their weights and slots stay,
      and their schedules count their own steps.

    Attributes:
        train_summary, val_summary: as set, or None.
    """

    def __init__(
        self,
        front_end: FrontEnd,
        dataset: TFDataset,
        optim_method: Any,
        settings: Settings,
        remembers: bool = False,
    ):
        self._front_end = front_end
        self._recipe = Recipe.of(front_end, dataset, optim_method, settings, remembers)
        self._failures = Failures(settings.failure_policy)
        self._failures.insist(self._recipe.check_model_dir, mend=lambda error: None)
        self._requested: FromCheckpoint | None = None
        self._training: Training | None = None
        self._ranks: Ranks | None = None  # other ones than the recipe's, where slots were lost
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
        """Trains a Keras model; afterwards the model holds the weights.

        Args:
            keras_model: Sequential, functional or subclassed, of Keras 3 or tf-keras.
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
        return cls(front_end, dataset, chosen, Settings.of(model_dir=model_dir, **settings))

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
        chosen = Settings.of(
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
        return cls(front_end, front_end.dataset, front_end.rule(), Settings.of(**settings))

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
        return cls(front_end, dataset, optim_method, Settings.of(**settings))

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
            TFSparkError: what else went wrong, with rank, step and phase, after as many retries as
                the failure policy allows. If all copies of a commit are lost, a retry goes on from
                the newest checkpoint of `model_dir`.
        """
        end = check_trigger(MaxEpoch(1) if end_trigger is None else end_trigger, "end_trigger")
        checkpoint = check_trigger(
            EveryEpoch() if checkpoint_trigger is None else checkpoint_trigger,
            "checkpoint_trigger",
        )
        validation = check_trigger(
            checkpoint if validation_trigger is None else validation_trigger, "validation_trigger"
        )
        rewound_to, in_a_row = None, 0
        while True:
            training = self._started()
            try:
                training.train(end, checkpoint, validation)
                return self
            except SlotsChanged as change:
                training.loop.save_newest()
                logger.warning(
                    "Going on with %d ranks, because there are as many task slots.",
                    change.num_ranks,
                )
                self.close()
                self._ranks = Ranks(change.num_ranks, training.ranks.wanted)
            except CommitLostError as error:
                saved = self._recipe.newest_checkpoint()
                if saved is None:
                    raise
                # Without a newer checkpoint in between it is the same failure again.
                in_a_row = in_a_row + 1 if saved.manifest.step == rewound_to else 1
                rewound_to = saved.manifest.step
                if self._failures.decide(error, in_a_row, Cause.INFRASTRUCTURE) is Decision.RAISE:
                    raise
                # Batches are a function of the step, so the steps since then give the same bits.
                self.close()

    def start(self) -> TFOptimizer:
        """Makes ready for `optimize`, without a step: stores the rows, resumes from `model_dir`.

        Session, model or variables then hold what the training goes on from.

        Returns:
            This optimizer.
        """
        training = self._started()
        if training.loop.progress.step:  # else they hold it already
            training.loop.insist(training.bring_home)
        return self

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every row is used once; known after `start` or `optimize`."""
        if self._training is None:
            raise AttributeError("steps_per_epoch is known once rows are counted: call start().")
        return self._training.loop.run.order.steps_per_epoch

    def _started(self) -> Training:
        """The training that runs, or a new one, from the newest checkpoint where there is one."""
        if self._training is None:
            saved = self._requested or self._recipe.newest_checkpoint()
            self._training = Training(self._recipe, saved, self._failures, self._ranks)
            self._requested = None
        loop = self._training.loop
        loop.train_summary, loop.validation_summary = self.train_summary, self.val_summary
        return self._training

    def load_checkpoint(self, path: str, version: int | None = None) -> TFOptimizer:
        """Goes on from a checkpoint: weights, optimizer slots, schedules, model state, data order.

        Args:
            path: the `model_dir` of the run that wrote it.
            version: its step; default: the newest whole one.

        Returns:
            This optimizer.

        Raises:
            CheckpointError: there is none, or it is of another model or optimizer.
        """
        found = self._recipe.resumable(*_checkpoint(path, version))
        self.close()
        self._requested = found
        return self

    def load_weights(self, path: str, version: int | None = None) -> TFOptimizer:
        """Starts from the weights and the model state of a checkpoint, and nothing else of it.

        Steps are counted from 0, and the optimizers may be others than those that wrote it. The
        session, the model or the variables hold the weights at once.

        Args:
            path: the `model_dir` of the run that wrote it.
            version: its step; default: the newest whole one.

        Returns:
            This optimizer.

        Raises:
            CheckpointError: there is none, or its tensors differ from the model's.
            InvalidInputError: this optimizer has a `model_dir` with a checkpoint to go on from.
        """
        found = self._recipe.newest_checkpoint()
        if found is not None:
            raise InvalidInputError(
                "Weights are loaded to start anew, and model_dir must have no checkpoint then. "
                f"Received: model_dir={found.store.model_dir!r} with step {found.manifest.step}. "
                "Use another model_dir."
            )
        store, manifest = _checkpoint(path, version)
        self.close()
        self._recipe.load_weights(store, manifest)
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
        return dict(self._training.loop.scores) if self._training else {}

    @property
    def history(self) -> History:
        """Mean loss of each epoch and scores of each validation, those before a resume included."""
        return self._training.loop.history if self._training else History()

    @property
    def batch_size(self) -> int:
        """Rows of a global batch."""
        return self._recipe.batch_size

    @property
    def step(self) -> int:
        """Finished steps."""
        return self._training.loop.progress.step if self._training else 0

    def close(self) -> None:
        """Frees what is kept in Spark for going on.

        The next `optimize` starts a new training: from the newest checkpoint of `model_dir`, if
        there is one, else with step 1 and the weights as they are.
        """
        if self._training is not None:
            self._training.close()
            self._training = None

    def _with(self, **changes: Any) -> TFOptimizer:
        if self._training is not None:
            raise InvalidInputError(
                f"{', '.join(changes)} must be set before training starts. Received: a change "
                "after optimize(). Call close() to start anew."
            )
        self._recipe = self._recipe.changed(**changes)
        return self


def _checkpoint(path: str, version: int | None) -> tuple[CheckpointStore, Manifest]:
    """The checkpoint of a step, or the newest whole one."""
    store = CheckpointStore(path)
    if version is not None:
        return store, store.read(version)
    manifest = newest_whole(store, SparkContext._active_spark_context)
    if manifest is None:
        raise CheckpointError(
            f"There must be a whole checkpoint to load. Received: none in {path!r}."
        )
    return store, manifest


def _bounds(value: Any) -> tuple[float, float] | None:
    """(smallest, largest) of one number or a pair."""
    if value is None or isinstance(value, tuple):
        return value
    return (-value, value)


def _checked(value: Any, expected: type) -> Any:
    if not isinstance(value, expected):
        raise InvalidInputError(f"A {expected.__name__} is expected. Received: {value!r}.")
    return value
