"""The engine `shuffle`: short, stateless, non-blocking Spark stages; many steps chained in a job.

```
commit ──scatter──► A ──exchange──► B ──exchange──► A … B ──► commit
                    │ gradient       │ sum, optimizer
                    └ zip(handles)   └ (one more exchange of norms where clipping needs them)
```

* Stage A of rank `r` gets every shard, joins the flat vector, computes the gradient of its rows
  and sends slice `j` to rank `j`.
* Stage B of rank `j` sums its slice in rank order, steps the optimizer on its shard, and sends the
  shard to every rank.
* What a rank owns (shard, optimizer slots) travels along as a frame to itself, so no task needs
  anything but its input: any task may run again, anywhere, and gives the same bits.

A job takes the steps of one round. Its last stage B is persisted, on two executors where there are
two, and cut off from its lineage: that is the commit. The shuffle files of the round are deleted
at once, so neither lineage nor disk grows with steps.
"""

from __future__ import annotations

import gc
import pickle
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from pyspark import AccumulatorParam, Broadcast, SparkContext, StorageLevel
from pyspark.rdd import RDD

from tfspark.data.batches import BatchReader, evaluation_batches
from tfspark.data.failures import driver_errors, reporting
from tfspark.data.store import Handle
from tfspark.errors import StoreLostError, TrainingError
from tfspark.graph.program import Evaluation
from tfspark.graphdef.loader import configure_threads
from tfspark.graphdef.pure import PureGraph
from tfspark.sync import wire
from tfspark.sync.engine import (
    Engine,
    Halt,
    RankState,
    RoundPlan,
    RoundResult,
    Run,
    StepRecord,
    merge_accumulators,
    merge_outcomes,
)
from tfspark.sync.frames import Message, decode, encode
from tfspark.sync.local import sum_in_rank_order
from tfspark.sync.rank import (
    Contribution,
    RankProgram,
    gradient_message,
    rank_program,
    shard_message,
    state_from_message,
    state_to_message,
)


class ShuffleEngine(Engine):
    """Trains on Spark's own shuffle and persistence; a commit is an RDD of one frame per rank.

    Args:
        context: the SparkContext.
        handles: RDD of the training set's handles, partition `r` holding the handle of rank `r`.
    """

    name = "shuffle"

    def __init__(self, context: SparkContext, handles: RDD):
        self._context = context
        self._source = handles
        self._run: Broadcast | None = None
        self._handles: RDD | None = None
        self._commits: list[RDD] = []
        self._job_tag = f"tfspark-{uuid.uuid4().hex}"
        # One for all rounds: PySpark never forgets an accumulator.
        self._news = context.accumulator({}, _LatestByRank())

    def start(self, run: Run, make_state: Callable[[Run, int], RankState]) -> RDD:
        self._run = self._context.broadcast(run)
        self._handles = _handle_frames(self._source, run.num_ranks)
        ranks = self._context.parallelize(range(run.num_ranks), run.num_ranks)
        self._commits = [self._persisted(wire.frames(ranks, _Start(self._run, make_state)))]
        return self._commits[0]

    def round(self, commit: RDD, plan: RoundPlan) -> RoundResult:
        started = time.perf_counter()
        assert self._run is not None and self._handles is not None, "start() comes first"
        run = self._run.value
        self._release_all_but(commit)
        self._news.value = {}
        received = wire.exchange(commit, _Scatter(run.num_ranks), run.num_ranks)
        for index, rates in enumerate(plan.learning_rates):
            step = plan.first_step + index
            pairs = wire.zip_frames(self._handles, received)
            gradients = wire.exchange(pairs, _Gradient(self._run, step), run.num_ranks)
            if run.clips_by_norm:
                gradients = wire.exchange(gradients, _Norms(self._run, step), run.num_ranks)
            update = _Update(self._run, step, rates, plan.stop)
            if index + 1 < plan.num_steps:
                received = wire.exchange(gradients, _Thenscatter(update), run.num_ranks)
            else:
                final = wire.frames(gradients, _Thencommit(update, self._news))
        try:
            result = self._persisted(final)
        finally:
            wire.clean_shuffles(gradients)
        outcome = merge_outcomes(self._told(result))
        if outcome.consistent:
            # Both stay until the next round says which one the caller has: it may be interrupted
            # before it hears of the new one.
            self._commits.append(result)
        else:
            wire.release(result)
        return RoundResult(
            commit=result if outcome.consistent else None,
            records=outcome.records,
            halt=outcome.halt,
            seconds=time.perf_counter() - started,
        )

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
        received = wire.exchange(commit, _Scatter(partitions, slots=False), partitions)
        pairs = wire.zip_frames(_handle_frames(handles, num_ranks, persist=False), received)
        try:
            with self._job():
                parts = pairs.mapPartitions(_Evaluate(self._run, shared, batch_rows)).collect()
        except StoreLostError:
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
        self._handles = _handle_frames(self._source, self._run.value.num_ranks)

    def close(self) -> None:
        self._release_all_but(None)
        if self._handles is not None:
            wire.release(self._handles)
        if self._run is not None:
            self._run.destroy()
        self._handles = self._run = None

    def _told(self, commit: RDD) -> list[tuple[int, Halt | None, tuple[StepRecord, ...]]]:
        """What every rank says of a round: finished steps, halt, records."""
        assert self._run is not None
        told = self._news.value
        if len(told) < self._run.value.num_ranks:
            # A task that lost its executor at the very end finds its block on another one when it
            # runs again, and has nothing to compute: what it would have said is in the block.
            told = dict(enumerate(self.map_states(commit, _news)))
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
            self._context.cancelJobsWithTag(self._job_tag)
            raise
        finally:
            self._context.removeJobTag(self._job_tag)

    def _release_all_but(self, commit: RDD | None) -> None:
        for other in self._commits:
            if other is not commit:
                wire.release(other)
        self._commits = [] if commit is None else [commit]


def _forget(handles: RDD) -> None:
    """Lets the next job compute handles anew, and with them their stores."""
    handles.unpersist(blocking=True)
    handles.persist(StorageLevel.MEMORY_AND_DISK)


def _handle_frames(handles: RDD, copies: int, *, persist: bool = True) -> RDD:
    """One frame per rank that will send to the partition, so that the two sides zip."""
    frames = wire.frames(handles, _HandleFrames(copies))
    if persist:
        # One replica, on one executor: a handle must be lost together with the executor's store.
        # Not in memory alone: a handle that is evicted there would write its store anew.
        frames.persist(StorageLevel.MEMORY_AND_DISK)
    return frames


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

    def __call__(self, rank: int, elements: Iterable[Any]) -> Iterator[bytes]:
        _drain(elements)
        with reporting(rank=rank, phase="start"):
            yield encode(state_to_message(self.make_state(self.run.value, rank)))


@dataclass(frozen=True)
class _Scatter:
    """The first stage of a round: a commit goes to every rank."""

    num_targets: int
    slots: bool = True

    def __call__(self, rank: int, frames: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
        (frame,) = frames
        state = state_from_message(decode(frame)).settled()
        yield from _to_all(state, self.num_targets, slots=self.slots)


@dataclass(frozen=True)
class _Gradient:
    """Stage A."""

    run: Broadcast
    step: int

    def __call__(
        self, rank: int, pairs: Iterable[tuple[bytes, bytes]]
    ) -> Iterator[tuple[int, bytes]]:
        run = self.run.value
        with reporting(rank=rank, step=self.step + 1, phase="gradient"):
            program = _program(run)
            handle, frames = _handle_first(pairs)
            reader = _reader(run, handle)
            reader.prefetch(self.step)  # while the weights arrive
            messages = _by_source(frames)
            halt = next((m.meta["halt"] for m in messages if m.meta["halt"]), None)
            contribution = Contribution(rank, halt=Halt(**halt) if halt else None)
            if not halt:
                replica = program.replica(messages)
                contribution = program.contribute(rank, self.step, replica, reader)
            for owner in range(run.num_ranks):
                yield owner, encode(gradient_message(run, contribution, owner))
            yield rank, encode(messages[rank])


@dataclass(frozen=True)
class _Norms:
    """Between A and B, where clipping needs norms over all ranks: every rank sums its slice."""

    run: Broadcast
    step: int

    def __call__(self, rank: int, frames: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
        messages, own = _receive(frames, "gradient")
        run = self.run.value
        with reporting(rank=rank, step=self.step + 1, phase="norms"):
            program = _program(run)
            reduced = program.reduce(messages)
            halted = reduced.halt or own.meta["halt"]
            norms = None if halted else program.squared_norms(rank, reduced)
            for target in range(run.num_ranks):
                arrays = {} if norms is None else {"norms": norms}
                yield target, encode(Message("norms", rank, {}, arrays))
            # The sums themselves go on to the next stage of the same rank.
            for message in messages:
                yield rank, encode(message)
            yield rank, encode(own)


@dataclass(frozen=True)
class _Update:
    """Stage B: from the frames of all ranks to the new state of this one."""

    run: Broadcast
    step: int
    learning_rates: tuple[float, ...]
    stop: Callable[[int, float], bool] | None

    def __call__(self, rank: int, frames: Iterable[bytes]) -> RankState:
        messages, own = _receive(frames, "gradient", "norms")
        parts = [message for message in messages if message.kind == "gradient"]
        norms = [m.arrays["norms"] for m in messages if m.kind == "norms" and m.arrays]
        with reporting(rank=rank, step=self.step + 1, phase="update"):
            program = _program(self.run.value)
            return program.apply(
                state_from_message(own),
                program.reduce(parts),
                self.learning_rates,
                sum_in_rank_order(norms) if norms else None,
                self.stop,
            )


@dataclass(frozen=True)
class _Thenscatter:
    update: _Update

    def __call__(self, rank: int, frames: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
        state = self.update(rank, frames)
        yield from _to_all(state, self.update.run.value.num_ranks)


@dataclass(frozen=True)
class _Thencommit:
    """The last stage of a round; every rank tells the driver what happened."""

    update: _Update
    news: Any  # Accumulator of {rank: (finished steps, halt, records)}

    def __call__(self, rank: int, frames: Iterable[bytes]) -> Iterator[bytes]:
        state = self.update(rank, frames)
        self.news.add({rank: _news(self.update.run.value, state)})
        yield encode(state_to_message(state))


def _news(run: Run, state: RankState) -> tuple[int, Halt | None, tuple[StepRecord, ...]]:
    return state.step, state.halt, tuple(state.records)


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
        handle, frames = _handle_first(pairs)
        messages = _by_source(frames)
        evaluation, mapping = self.shared.value
        with reporting(rank=handle.rank, phase="evaluate"):
            program = _program(self.run.value)
            accumulators = program.evaluate(
                evaluation,
                program.replica(messages),
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


def _to_all(
    state: RankState, num_targets: int, *, slots: bool = True
) -> Iterator[tuple[int, bytes]]:
    """The shard to every rank; to the rank itself all that it owns."""
    shard = encode(shard_message(state))
    for target in range(num_targets):
        own = slots and target == state.rank
        yield target, encode(state_to_message(state)) if own else shard


def _handle_first(pairs: Iterable[tuple[bytes, bytes]]) -> tuple[Handle, Iterator[bytes]]:
    """The handle of this partition, and the frames of all ranks, which may still be coming."""
    remaining = iter(pairs)
    handle_frame, frame = next(remaining)
    return pickle.loads(handle_frame), chain([frame], (frame for _, frame in remaining))


def _by_source(frames: Iterable[bytes]) -> list[Message]:
    """Messages by rank."""
    return sorted(map(decode, frames), key=lambda message: message.source)


def _receive(frames: Iterable[bytes], *kinds: str) -> tuple[list[Message], Message]:
    """The messages of these kinds by rank, and the state that this rank sent itself."""
    messages, own = [], None
    for frame in frames:
        message = decode(frame)
        if message.kind in kinds:
            messages.append(message)
        else:
            own = message
    assert own is not None
    return sorted(messages, key=lambda message: message.source), own


def _program(run: Run) -> RankProgram:
    """The programs of a run in this worker, loaded by its first task."""
    configure_threads(run.task_threads)
    program = rank_program(run)
    if run.run_id not in _FROZEN:
        # PySpark's daemon collects garbage after every task. With TensorFlow imported that took
        # 200 ms, several times as long as the rest of the task; frozen objects are not looked at.
        # What former runs left behind is collected first: frozen, it would stay for good.
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        _FROZEN.add(run.run_id)
    return program


_FROZEN: set[str] = set()  # runs of this worker


_READERS: dict[tuple[str, Handle], BatchReader] = {}


def _reader(run: Run, handle: Handle) -> BatchReader:
    key = (run.run_id, handle)
    if key not in _READERS:
        if run.digests and handle.digest != run.digests[handle.rank]:
            raise TrainingError(
                "A data set must give the same rows in the same order each time it is computed. "
                "Received: other rows, when a lost store was rebuilt. Persist or checkpoint the "
                "RDD or DataFrame that it is made of, or sort it."
            )
        while len(_READERS) >= 8:
            _READERS.pop(next(iter(_READERS)))
        _READERS[key] = BatchReader(handle, run.order, run.mapping)
    return _READERS[key]


def _drain(elements: Iterable[Any]) -> None:
    for _ in elements:
        pass
