"""A training that runs: its rows, its engine, its loop, and the way home of its weights."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from py4j.protocol import Py4JError
from pyspark import SparkContext

from tfspark.data.dataset import TFDataset
from tfspark.data.order import BatchOrder
from tfspark.errors import CommitLostError, TFSparkError
from tfspark.graph.evaluation import results
from tfspark.graph.optimizers import clipping_of
from tfspark.slots import in_process, registered_slots, slots, task_threads
from tfspark.sync import wire
from tfspark.sync.engine import Engine, Run, SlotsChanged
from tfspark.sync.interrupts import noting_interrupts
from tfspark.sync.rank import common_rows
from tfspark.train.engines import (
    buckets_that_pay,
    check_gradient_buckets,
    check_leave_out,
    choose_engine,
    make_engine,
    materialise,
)
from tfspark.train.failure_policy import Cause, Failures, cause_of
from tfspark.train.history import History
from tfspark.train.left_out import LeftOutRows
from tfspark.train.leftovers import release_with
from tfspark.train.loop import TrainingLoop, progress_at, score_of
from tfspark.train.pacing import Pacing
from tfspark.train.progress import planned_steps, progress_reporter
from tfspark.train.recipe import Recipe, Settings
from tfspark.train.saving import (
    WEIGHTS,
    FromCheckpoint,
    FromValues,
    Here,
    InFile,
    Trained,
    slots_of,
)
from tfspark.train.triggers import Trigger

logger = logging.getLogger("tfspark")


class Ranks(NamedTuple):
    """How many ranks train, and how many would with slots for all."""

    number: int
    wanted: int


class Training:
    """Everything that a recipe needs in Spark or in this process, from `__init__` to `close`.

    What is held in Spark is freed too when the object is forgotten.

    Args:
        recipe: what is trained.
        saved: the checkpoint to go on from, or None: from the variables as they are.
        failures: decides which jobs are done again.
        ranks: where slots were lost; None: as many as the recipe says.

    Attributes:
        ranks: how many.
        loop: the rounds; its commit and its progress are the newest good ones.
    """

    def __init__(
        self,
        recipe: Recipe,
        saved: FromCheckpoint | None,
        failures: Failures,
        ranks: Ranks | None = None,
    ):
        self._recipe = recipe
        self._context = SparkContext._active_spark_context
        context = self._context
        settings = recipe.settings
        if ranks is None:
            ranks = _ranks_at_first(settings, context)
        self.ranks, num_ranks = ranks, ranks.number
        self._name = choose_engine(settings.engine, context, num_ranks, settings.average_every)
        check_leave_out(settings.leave_out, self._name, num_ranks)
        check_gradient_buckets(settings.gradient_buckets, self._name)
        self._failures = failures
        train_set = self._materialise(recipe.dataset, num_ranks)
        flat, state = recipe.bound.values()
        run = _run(
            recipe,
            train_set,
            saved.store.read_state(saved.manifest) if saved else state,
            num_ranks,
            task_threads(context) if context else 1,
            self._name,
        )
        if saved:
            _warn_of_changed_order(saved, run.order)
        engine = make_engine(self._name, train_set, context, settings.failure_policy)
        sets = [train_set]
        if recipe.dataset.validation is not None:
            sets.append(self._materialise(recipe.dataset.validation, num_ranks))
        values = {WEIGHTS: flat}
        if saved is None and recipe.memory is not None:
            values |= recipe.memory.read() or {}
        initial = saved or failures.insist(lambda: self._initial_state(values), mend=_nothing)
        self.close = release_with(self, partial(_close, engine, [*sets, initial], context))
        self.loop = self._make_loop(engine, run, initial, int(values.get("iteration", 0)))
        if num_ranks < ranks.wanted:
            assert context is not None
            self.loop.after_save = partial(_look_for_slots, context, ranks.wanted)
        if len(sets) > 1:
            self.loop.validate = self._validator(engine, run, sets[1])

    def train(self, end: Trigger, checkpoint: Trigger, validation: Trigger) -> None:
        """Takes steps until a trigger fires, then brings the weights home.

        After an error or an interrupt too: then those of the newest good commit.
        """
        loop = self.loop
        steps = planned_steps(end, loop.progress)
        if self._recipe.settings.leave_out is not None:
            loop.left_out = LeftOutRows(loop.run.order)
        try:
            reporter = progress_reporter(self._recipe.settings.progress, steps, loop.progress.step)
            with noting_interrupts(), reporter as loop.reporter:
                loop.train(end, checkpoint, validation)
        except CommitLostError:
            raise  # there is nothing to bring home
        except SlotsChanged:
            raise  # training goes on
        except BaseException as error:
            # What has failed so often is not tried as often again.
            hopeless = isinstance(error, TFSparkError) and cause_of(error) is Cause.INFRASTRUCTURE
            try:
                if hopeless:
                    self.bring_home()
                else:
                    loop.insist(self.bring_home)
            except (TFSparkError, Py4JError) as another:
                logger.warning(
                    "The weights of step %d could not be brought home: %s",
                    loop.progress.step,
                    another,
                )
            raise
        finally:
            if loop.left_out is not None:
                logger.info("%s", loop.left_out)
        loop.insist(self.bring_home)

    def _materialise(self, dataset: TFDataset, num_ranks: int) -> Any:
        policy = self._recipe.settings.failure_policy
        return self._failures.insist(
            lambda: materialise(self._name, dataset, num_ranks, self._context, policy),
            mend=_nothing,
        )

    def _make_loop(
        self, engine: Engine, run: Run, initial: FromValues | FromCheckpoint, steps_before: int
    ) -> TrainingLoop:
        groups = self._recipe.groups
        groups.bind(run.order.steps_per_epoch, run.order.batch_size)
        groups.steps_before = steps_before
        step, loss, scores, history = 0, None, {}, History()
        if isinstance(initial, FromCheckpoint):
            manifest = initial.manifest
            step, loss = manifest.step, manifest.training.get("loss")
            scores = dict(manifest.metrics)
            history = History.restored(manifest.training.get("history"))
            groups.restore(manifest.training["schedules"])
            logger.info("Going on from step %d of %s.", step, initial.store.model_dir)
        commit = self._failures.insist(
            lambda: engine.start(run, initial), mend=lambda error: engine.close()
        )
        return TrainingLoop(
            engine=engine,
            run=run,
            rates=groups,
            commit=commit,
            progress=progress_at(run.order, step, loss, score_of(scores)),
            reporter=progress_reporter(False, None),
            store=self._recipe.store,
            retention=self._recipe.settings.retention,
            pacing=Pacing(most_steps=engine.most_steps, average_every=run.average_every),
            scores=scores,
            history=history,
            failures=self._failures,
        )

    def _validator(self, engine: Engine, run: Run, held: Any) -> Any:
        validation = self._recipe.dataset.validation
        assert self._recipe.evaluation is not None and validation is not None
        evaluation, metrics = self._recipe.evaluation
        mapping = validation.mapping
        handles = held.handles if self._name == "local" else held.rdd
        rows = validation.batch_per_thread or max(1, self._recipe.batch_size // run.num_ranks)

        def validate(commit: Any) -> dict[str, float]:
            accumulators = engine.evaluate(commit, evaluation, handles, mapping, rows)
            return results(evaluation, metrics, accumulators)

        return validate

    def _initial_state(self, values: dict[str, np.ndarray]) -> FromValues:
        """The initial weights, on their one way from the driver."""
        if self._name == "local":
            return FromValues(Here(values))
        assert self._context is not None
        if in_process(self._context):
            return FromValues(InFile.write(values, wire.scratch_folder(self._context)))
        return FromValues(self._context.broadcast(values))

    def bring_home(self) -> None:
        """Sets the user's variables to the weights and model state of the newest commit."""
        loop, run, memory = self.loop, self.loop.run, self._recipe.memory
        groups = self._recipe.groups
        averaged = frozenset(n for n, group in enumerate(groups.groups) if group.optimizer.use_ema)
        select = Trained(averaged, with_slots=memory is not None)
        shards, slots, means, first = [], [], [], []
        for state in loop.engine.collect(loop.commit, select):
            shards.append(np.array(state.shard))
            slots.append([[np.array(values) for values in group] for group in state.slots])
            means.append(state.mean)
            first = state.first
        whole = run.state_layout.assemble(run.state, np.concatenate(means), first)
        self._recipe.bound.assign(run.layout.join(shards), whole)
        if memory is not None:
            memory.write(slots_of(run, slots), groups.steps_before + loop.progress.step)


def _run(
    recipe: Recipe,
    train_set: Any,
    state: Sequence[np.ndarray],
    num_ranks: int,
    threads: int,
    engine: str,
) -> Run:
    dataset, settings = recipe.dataset, recipe.settings
    hosts = [handle.host for handle in train_set.handles]
    order = BatchOrder(
        tuple(handle.rows for handle in train_set.handles),
        recipe.batch_size,
        dataset.seed,
        dataset.shuffle,
    )
    # Only now it is known how many rows each rank has.
    rows = common_rows(order, settings.accumulation_steps)
    program = recipe.bound.expecting(rows).program
    width = np.dtype(settings.wire_dtype or program.dtype).itemsize
    return Run(
        run_id=uuid.uuid4().hex,
        program=program,
        updates=recipe.updates,
        clippings=tuple(clipping_of(group.optimizer) for group in recipe.groups.groups),
        order=order,
        mapping=dataset.mapping,
        seed=dataset.seed,
        state=tuple(state),
        num_ranks=num_ranks,
        clip_norm=settings.clip_norm,
        accumulation_steps=settings.accumulation_steps,
        average_every=settings.average_every,
        task_threads=threads,
        digests=tuple(handle.digest for handle in train_set.handles),
        wire_dtype=settings.wire_dtype,
        leave_out=settings.leave_out,
        gradient_buckets=settings.gradient_buckets
        or (buckets_that_pay(engine, program.size * width, hosts) if settings.is_in_step else 1),
    )


def _nothing(error: TFSparkError) -> None:
    """What has to be mended where a try that failed leaves nothing behind."""


def _ranks_at_first(settings: Settings, context: SparkContext | None) -> Ranks:
    if context is None:
        return Ranks(settings.num_ranks or 1, settings.num_ranks or 1)
    grows = settings.failure_policy.lost_slots == "fewer_ranks"
    if settings.num_ranks and not grows:
        return Ranks(settings.num_ranks, settings.num_ranks)
    there = slots(context)
    wanted = settings.num_ranks or there
    if there >= wanted:
        return Ranks(wanted, wanted)
    logger.warning(
        "Starting with %d of %d ranks, because there are as many task slots.", there, wanted
    )
    return Ranks(there, wanted)


def _look_for_slots(context: SparkContext, wanted: int) -> None:
    """Has a training with too few ranks go on with all of them, once there are slots for them.

    Raises:
        SlotsChanged: there are.
    """
    if registered_slots(context) >= wanted:
        raise SlotsChanged(wanted)


def _warn_of_changed_order(saved: FromCheckpoint, order: BatchOrder) -> None:
    manifest = saved.manifest
    before = (manifest.training.get("rows_per_epoch"), manifest.batch_size, manifest.seed)
    now = (order.total_rows, order.batch_size, order.seed)
    if before != now:
        logger.warning(
            "The order of batches differs from the checkpoint's: (rows, batch_size, seed) was %s "
            "and is %s. Training goes on from step %d in the new order.",
            before,
            now,
            manifest.step,
        )


def _close(engine: Engine, held: Sequence[Any], context: SparkContext | None) -> None:
    if context is not None and context._jsc is None:
        return  # Spark was stopped, and all that is held in it has gone
    engine.close()
    for each in held:
        each.release()
