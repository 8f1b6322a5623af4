"""What all engines on Spark share: commits are RDDs, one frame per rank.

A commit is computed by a round's last tasks, persisted, on two executors where there are two, and
cut off from its lineage. An engine adds how a round is run.
"""

from __future__ import annotations

import pickle
import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from py4j.protocol import Py4JNetworkError
from pyspark import AccumulatorParam, Broadcast, SparkContext, StorageLevel
from pyspark.rdd import RDD

from tfspark.data.batches import evaluation_batches
from tfspark.data.failures import driver_errors, reporting
from tfspark.data.store import Handle
from tfspark.errors import StoreLostError
from tfspark.graph.program import Evaluation
from tfspark.graphdef.pure import PureGraph
from tfspark.sync import wire
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
from tfspark.sync.frames import decode, encode
from tfspark.sync.messages import state_from_message, state_to_message
from tfspark.sync.tasks import Scatter, by_source, handle_first, program_of

_MOST_CANCELS = 10


class SparkEngine(Engine):
    """Commits as RDDs of frames.

    Args:
        context: the SparkContext.
        handles: RDD of the training set's handles, partition `r` holding the handle of rank `r`.
    """

    def __init__(self, context: SparkContext, handles: RDD):
        self._context = context
        self._source = handles
        self._run: Broadcast | None = None
        self._handles: RDD | None = None
        self._evaluated: tuple[RDD, RDD] | None = None  # handles as they came, and as frames
        self._commits: list[RDD] = []
        self._job_tag = f"tfspark-{uuid.uuid4().hex}"
        # One for all rounds: PySpark never forgets an accumulator.
        self._news = context.accumulator({}, _LatestByRank())

    @abstractmethod
    def _round_handles(self, run: Run) -> RDD:
        """The handles of the training set as frames, as this engine's rounds read them.

        Marked as persisted: on one executor, with the store, whose loss must be that of the handle.
        """

    def start(self, run: Run, make_state: Callable[[Run, int], RankState]) -> RDD:
        self._run = self._context.broadcast(run)
        self._handles = self._round_handles(run)
        self._compute(self._handles)
        ranks = wire.empty(self._context, run.num_ranks)
        self._commits = [self._persisted(wire.frames(ranks, _Start(self._run, make_state)))]
        return self._commits[0]

    def map_states(self, commit: RDD, function: Callable[[Run, RankState], Any]) -> list[Any]:
        assert self._run is not None, "start() comes first"
        with self._job():
            return commit.mapPartitions(_OnState(self._run, function)).collect()

    def collect(
        self, commit: RDD, select: Callable[[Run, RankState], RankState]
    ) -> Iterator[RankState]:
        assert self._run is not None, "start() comes first"
        selected = wire.frames(commit, _Select(self._run, select))
        with self._job():
            # One job per rank: the driver never holds more than one frame beside what it keeps.
            for frame in selected.toLocalIterator():
                yield state_from_message(decode(frame))

    def evaluate(
        self,
        commit: RDD,
        evaluation: Evaluation,
        handles: RDD,
        mapping: PureGraph | None,
        batch_rows: int,
    ) -> list[np.ndarray]:
        assert self._run is not None, "start() comes first"
        num_ranks = self._run.value.num_ranks
        partitions = handles.getNumPartitions()
        shared = self._context.broadcast((evaluation, mapping))
        received = wire.exchange(commit, Scatter(partitions), partitions)
        try:
            pairs = wire.zip_frames(self._evaluation_handles(handles, num_ranks), received)
            with self._job():
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
        with self._job():
            wire.compute(handles)

    def _committed(self, frames: RDD) -> tuple[RDD | None, Outcome]:
        """Computes the last RDD of a round: the commit, if the ranks agree, and what they say."""
        self._news.value = {}
        commit = self._persisted(frames)
        outcome = merge_outcomes(self._told(commit))
        if not outcome.consistent:
            wire.release(commit)
            return None, outcome
        # Both stay until the next round says which one the caller has: it may be interrupted
        # before it hears of the new one.
        self._commits.append(commit)
        return commit, outcome

    def _told(self, commit: RDD) -> list[tuple[int, Halt | None, tuple[StepRecord, ...]]]:
        """What every rank says of a round: finished steps, halt, records."""
        assert self._run is not None
        told = self._news.value
        if len(told) < self._run.value.num_ranks:
            # A task that lost its executor at the very end finds its block on another one when it
            # runs again, and has nothing to compute: what it would have said is in the block.
            told = dict(enumerate(self.map_states(commit, news_of)))
        return [told[rank] for rank in range(self._run.value.num_ranks)]

    def _persisted(self, frames: RDD) -> RDD:
        frames.persist(wire.commit_level(self._context))
        frames.localCheckpoint()
        try:
            with self._job():
                wire.compute(frames)
        except BaseException:
            wire.release(frames)
            raise
        return frames

    @contextmanager
    def _job(self) -> Iterator[None]:
        """Around a Spark job: raises the errors of its tasks as they were, cancels it if left."""
        self._context.addJobTag(self._job_tag)
        try:
            with driver_errors():
                yield
        except (KeyboardInterrupt, SystemExit):
            # PySpark's own handler of Ctrl-C does this too, but notebooks replace it.
            self._cancel()
            raise
        finally:
            self._context.removeJobTag(self._job_tag)

    def _cancel(self) -> None:
        """Cancels the jobs of this engine."""
        for attempt in range(_MOST_CANCELS):
            try:
                self._context.cancelJobsWithTag(self._job_tag)
            except Py4JNetworkError:
                # py4j has dropped the connection that was interrupted, and now and then the JVM
                # drops the next one too.
                if attempt + 1 == _MOST_CANCELS:
                    raise
                time.sleep(0.1)
            else:
                return

    def _release_all_but(self, commit: RDD | None) -> None:
        for other in self._commits:
            if other is not commit:
                wire.release(other)
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

    def __call__(self, rank: int, nothing: Iterable[Any]) -> Iterator[bytes]:
        for _ in nothing:  # a task reads its input to the end, also where there is none
            pass
        with reporting(rank=rank, phase="start"):
            yield encode(state_to_message(self.make_state(self.run.value, rank)))


@dataclass(frozen=True)
class _OnState:
    run: Broadcast
    function: Callable[[Run, RankState], Any]

    def __call__(self, frames: Iterable[bytes]) -> Iterator[Any]:
        (frame,) = frames
        state = state_from_message(decode(frame))
        with reporting(rank=state.rank, step=state.step, phase="commit"):
            yield self.function(self.run.value, state)


@dataclass(frozen=True)
class _Select:
    run: Broadcast
    select: Callable[[Run, RankState], RankState]

    def __call__(self, rank: int, frames: Iterable[bytes]) -> Iterator[bytes]:
        for frame in frames:
            state = self.select(self.run.value, state_from_message(decode(frame)))
            yield encode(state_to_message(state))


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
