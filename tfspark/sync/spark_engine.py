"""What all engines on Spark share: commits are RDDs, one frame per rank.

A commit is computed by a round's last tasks, persisted, on two executors where there are two, and
cut off from its lineage. Where a carrier of files packed it, what is persisted are paths, and the
files live as long. An engine adds how a round is run.
"""

from __future__ import annotations

import logging
import pickle
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from pyspark import AccumulatorParam, Broadcast, SparkContext, StorageLevel
from pyspark.rdd import RDD

from tfspark.data.batches import evaluation_batches
from tfspark.data.failures import reporting
from tfspark.data.store import Handle
from tfspark.errors import StoreLostError
from tfspark.graph.program import Evaluation
from tfspark.graphdef.pure import PureGraph
from tfspark.sync import wire
from tfspark.sync.carriers import Carrier, state_of, through_spark
from tfspark.sync.engine import (
    Engine,
    Halt,
    Outcome,
    RankState,
    Run,
    StepRecord,
    merge_accumulators,
    merge_outcomes,
)
from tfspark.sync.jobs import WAIT_FOR_SLOTS_S, Jobs
from tfspark.sync.messages import state_to_message
from tfspark.sync.tasks import Scatter, by_source, handle_first, program_of

logger = logging.getLogger("tfspark")

Carriers: TypeAlias = Callable[[], AbstractContextManager[Carrier]]


@dataclass(frozen=True)
class Commit:
    """The states of all ranks after a step.

    Attributes:
        frames: partition `r` holds the frame of rank `r`; reads the blocks of `computed`.
        computed: persisted, by the last tasks of a round.
        held: what the frames need, such as files.
    """

    frames: RDD
    computed: RDD
    held: ExitStack

    def release(self) -> None:
        """Frees it; does not wait."""
        wire.release(self.computed)
        self.held.close()


class SparkEngine(Engine):
    """Commits as RDDs of frames.

    Args:
        context: the SparkContext.
        handles: RDD of the training set's handles, partition `r` holding the handle of rank `r`.
        carriers: opens a carrier, for as long as what it packed is needed.
        wait_for_slots_s: how long a job waits for executors in place of those that were lost.
    """

    def __init__(
        self,
        context: SparkContext,
        handles: RDD,
        carriers: Carriers = through_spark,
        wait_for_slots_s: float = WAIT_FOR_SLOTS_S,
    ):
        self._context = context
        self._source = handles
        self._carriers = carriers
        self._run: Broadcast | None = None
        self._handles: RDD | None = None
        self._evaluated: tuple[RDD, RDD] | None = None  # handles as they came, and as frames
        self._commits: list[Commit] = []
        self._jobs = Jobs(context, wait_for_slots_s)
        # One for all rounds: PySpark never forgets an accumulator.
        self._news = context.accumulator({}, _LatestByRank())

    @abstractmethod
    def _round_handles(self, run: Run) -> RDD:
        """The handles of the training set as frames, as this engine's rounds read them.

        Marked as persisted: on one executor, with the store, whose loss must be that of the handle.
        """

    def start(self, run: Run, make_state: Callable[[Run, int], RankState]) -> Commit:
        self._run = self._context.broadcast(run)
        self._handles = self._round_handles(run)
        self._compute(self._handles)
        ranks = wire.empty(self._context, run.num_ranks)
        start = partial(_Start, self._run, make_state)
        self._commits = [self._commit(lambda keep: wire.frames(ranks, start(keep)))]
        return self._commits[0]

    def map_states(self, commit: Commit, function: Callable[[Run, RankState], Any]) -> list[Any]:
        assert self._run is not None, "start() comes first"
        with self._jobs.job():
            return commit.frames.mapPartitions(_OnState(self._run, function)).collect()

    def collect(
        self, commit: Commit, select: Callable[[Run, RankState], RankState]
    ) -> Iterator[RankState]:
        assert self._run is not None, "start() comes first"
        with self._carriers() as carrier:
            task = Select(self._run, select, carrier)
            if carrier.is_light:
                with self._jobs.job():
                    frames = iter(wire.frames(commit.frames, task).collect())
            else:
                frames = self._one_by_one(commit, task)
            yield from map(state_of, frames)

    def _one_by_one(self, commit: Commit, select: Select) -> Iterator[bytes]:
        """Selected frames by rank; the driver never holds more than one."""
        with self._jobs.job():
            yield from wire.frames(commit.frames, select).toLocalIterator()

    def evaluate(
        self,
        commit: Commit,
        evaluation: Evaluation,
        handles: RDD,
        mapping: PureGraph | None,
        batch_rows: int,
    ) -> list[np.ndarray]:
        assert self._run is not None, "start() comes first"
        num_ranks = self._run.value.num_ranks
        partitions = handles.getNumPartitions()
        shared = self._context.broadcast((evaluation, mapping))
        received = wire.exchange(commit.frames, Scatter(partitions), partitions)
        try:
            pairs = wire.zip_frames(self._evaluation_handles(handles, num_ranks), received)
            with self._jobs.job():
                parts = pairs.mapPartitions(_Evaluate(self._run, shared, batch_rows)).collect()
        except StoreLostError:
            self._release_evaluated()
            _forget(handles)
            raise
        finally:
            wire.clean_shuffles(received)
            shared.destroy()
        return merge_accumulators(evaluation, [pickle.loads(part) for part in parts])

    def rebuild(self) -> None:
        assert self._run is not None and self._handles is not None, "start() comes first"
        self._handles.unpersist(blocking=True)
        _forget(self._source)
        self._handles = self._round_handles(self._run.value)
        self._compute(self._handles)

    def close(self) -> None:
        self._release_all_but(None)
        self._release_evaluated()
        if self._handles is not None:
            wire.release(self._handles)
        if self._run is not None:
            self._run.destroy()
        self._handles = self._run = None

    def _evaluation_handles(self, handles: RDD, copies: int) -> RDD:
        """The handles of a data set as frames; kept for the next evaluation of the same one."""
        if self._evaluated is None or self._evaluated[0] is not handles:
            self._release_evaluated()
            frames = handle_frames(handles, copies).persist(StorageLevel.MEMORY_AND_DISK)
            self._evaluated = handles, frames
            self._compute(frames)
        return self._evaluated[1]

    def _release_evaluated(self) -> None:
        if self._evaluated is not None:
            wire.release(self._evaluated[1])
            self._evaluated = None

    def _compute(self, handles: RDD) -> None:
        """Makes handles in a job of their own: no task that uses them needs a second worker."""
        with self._jobs.job():
            wire.compute(handles)

    def _committed(
        self, make: Callable[[Carrier], RDD], slots: int = 1
    ) -> tuple[Commit | None, Outcome]:
        """Ends a round: the commit, if the ranks agree, and what they say; see `_commit`."""
        self._news.value = {}
        commit = self._commit(make, slots)
        outcome = merge_outcomes(self._told(commit))
        if not outcome.consistent:
            commit.release()
            return None, outcome
        # Both stay until the next round says which one the caller has: it may be interrupted
        # before it hears of the new one.
        self._commits.append(commit)
        return commit, outcome

    def _told(self, commit: Commit) -> list[tuple[int, Halt | None, tuple[StepRecord, ...]]]:
        """What every rank says of a round: finished steps, halt, records."""
        assert self._run is not None
        told = self._news.value
        if len(told) < self._run.value.num_ranks:
            # A task that lost its executor at the very end finds its block on another one when it
            # runs again, and has nothing to compute: what it would have said is in the block.
            told = dict(enumerate(self.map_states(commit, news_of)))
        return [told[rank] for rank in range(self._run.value.num_ranks)]

    def _commit(self, make: Callable[[Carrier], RDD], slots: int = 1) -> Commit:
        """Computes and keeps the frames that `make` describes, packed by the carrier it gets.

        Args:
            make: see above.
            slots: that the job needs at the same time.
        """
        with ExitStack() as held:
            computed = make(held.enter_context(self._carriers()))
            computed.persist(wire.commit_level(self._context))
            computed.localCheckpoint()
            commit = Commit(wire.held(computed), computed, held.pop_all())
        try:
            with self._jobs.job(slots):
                wire.compute(computed)
        except BaseException:
            commit.release()
            raise
        return commit

    def _release_all_but(self, commit: Commit | None) -> None:
        for other in self._commits:
            if other is not commit:
                other.release()
        self._commits = [] if commit is None else [commit]


def handle_frames(handles: RDD, copies: int) -> RDD:
    """A handle and empty frames, `copies` together, so that it zips with as many frames."""
    return wire.frames(handles, _HandleFrames(copies))


def _forget(handles: RDD) -> None:
    """Lets the next job compute handles anew, and with them their stores."""
    handles.unpersist(blocking=True)
    handles.persist(StorageLevel.MEMORY_AND_DISK)


def news_of(run: Run, state: RankState) -> tuple[int, Halt | None, tuple[StepRecord, ...]]:
    """What a rank says of a round: finished steps, halt, records."""
    return state.step, state.halt, tuple(state.records)


@dataclass(frozen=True)
class _HandleFrames:
    copies: int

    def __call__(self, partition: int, handles: Iterable[Handle]) -> Iterator[bytes]:
        (handle,) = handles
        yield pickle.dumps(handle)
        for _ in range(self.copies - 1):
            yield b""


@dataclass(frozen=True)
class _Start:
    run: Broadcast
    make_state: Callable[[Run, int], RankState]
    keep: Carrier

    def __call__(self, rank: int, nothing: Iterable[Any]) -> Iterator[bytes]:
        for _ in nothing:  # a task reads its input to the end, also where there is none
            pass
        with reporting(rank=rank, phase="start"):
            state = self.make_state(self.run.value, rank)
            yield self.keep.pack(state_to_message(state), state.step, "commit")


@dataclass(frozen=True)
class _OnState:
    run: Broadcast
    function: Callable[[Run, RankState], Any]

    def __call__(self, frames: Iterable[bytes]) -> Iterator[Any]:
        (frame,) = frames
        state = state_of(frame)
        with reporting(rank=state.rank, step=state.step, phase="commit"):
            yield self.function(self.run.value, state)


@dataclass(frozen=True)
class Select:
    """Selects from the states of a commit what goes to the driver."""

    run: Broadcast
    select: Callable[[Run, RankState], RankState]
    carrier: Carrier

    def __call__(self, rank: int, frames: Iterable[bytes]) -> Iterator[bytes]:
        for frame in frames:
            state = self.select(self.run.value, state_of(frame))
            yield self.carrier.pack(state_to_message(state), state.step, "driver")


@dataclass(frozen=True)
class _Evaluate:
    run: Broadcast
    shared: Broadcast
    batch_rows: int

    def __call__(self, pairs: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
        handle, frames = handle_first(pairs)
        messages = by_source(frames)
        evaluation, mapping = self.shared.value
        with reporting(rank=handle.rank, phase="evaluate"):
            program = program_of(self.run.value)
            accumulators = program.evaluate(
                evaluation,
                program.replica(messages, exact=True),
                evaluation_batches(handle, self.batch_rows, mapping),
            )
        yield pickle.dumps(accumulators)


class _LatestByRank(AccumulatorParam):
    """A dictionary by rank: a task that ran twice says the same thing twice."""

    def zero(self, value: dict[int, Any]) -> dict[int, Any]:
        return {}

    def addInPlace(self, value1: dict[int, Any], value2: dict[int, Any]) -> dict[int, Any]:
        value1.update(value2)
        return value1
