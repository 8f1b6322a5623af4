"""The engine `shuffle`: short, stateless, non-blocking Spark stages; many steps chained in a job.

```
commit ──scatter──► A ──exchange──► B ──exchange──► A … B ──► commit
                    │ gradient       │ sum, optimizer
                    └ zip(handles)   └ (one more exchange for each kind of sums over whole tensors)
```

* Stage A of rank `r` gets every shard, joins the flat vector, computes the gradient of its rows
  and sends slice `j` to rank `j`.
* Stage B of rank `j` sums its slice in rank order, steps the optimizer on its shard, and sends the
  shard to every rank.
* What a rank owns (shard, optimizer slots) travels along as a frame to itself, so no task needs
  anything but its input: any task may run again, anywhere, and gives the same bits.
* Where all ranks share a host, large messages are files (`carriers.py`): the shuffle carries paths.

A job takes the steps of one round. Its last stage B is persisted, on two executors where there are
two, and cut off from its lineage: that is the commit. The shuffle files of the round are deleted
at once, so neither lineage nor disk grows with steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pyspark import Broadcast, StorageLevel
from pyspark.rdd import RDD

from tfspark.data.failures import reporting
from tfspark.sync import wire
from tfspark.sync.carriers import Carrier, message_of, state_of
from tfspark.sync.engine import Halt, RankState, RoundPlan, RoundResult, Run, StepRates, StepRecord
from tfspark.sync.frames import Message, encode
from tfspark.sync.local import sum_in_rank_order
from tfspark.sync.messages import (
    Contribution,
    gradient_message,
    state_from_message,
    state_to_message,
)
from tfspark.sync.spark_engine import Commit, SparkEngine, handle_frames, news_of
from tfspark.sync.tasks import handle_first, program_of, reader_of


class ShuffleEngine(SparkEngine):
    """Trains on Spark's own shuffle; see the module's docstring."""

    name = "shuffle"
    most_steps: int | None = (
        32  # a chained round is one lineage, which Spark plans and schedules as a whole
    )

    def _round_handles(self, run: Run) -> RDD:
        return self._handles_for_stages(run)

    def _handles_for_stages(self, run: Run) -> RDD:
        # One frame per rank that will send to the partition, so that the two sides zip.
        frames = handle_frames(self._source, run.num_ranks)
        # Not in memory alone: a handle that is evicted there would write its store anew.
        return frames.persist(StorageLevel.MEMORY_AND_DISK)

    def round(
        self,
        commit: Commit,
        plan: RoundPlan,
        tell: Callable[[StepRecord], None] | None = None,
    ) -> RoundResult:
        assert self._handles is not None, "start() comes first"
        return self._in_stages(self._handles, commit, plan)

    def _in_stages(self, handles: RDD, commit: Commit, plan: RoundPlan) -> RoundResult:
        """A round; `handles` are frames as of `_round_handles` of this class."""
        started = time.perf_counter()
        assert self._run is not None, "start() comes first"
        run = self._run.value
        self._release_all_but(commit)
        with self._carriers() as carrier:
            scatter = _Scatter(self._run, plan.first_step, carrier)
            received = wire.exchange(commit.frames, scatter, run.num_ranks)
            for index, rates in enumerate(plan.learning_rates):
                step = plan.first_step + index
                pairs = wire.zip_frames(handles, received)
                gradient = _Gradient(self._run, step, carrier)
                gradients = wire.exchange(pairs, gradient, run.num_ranks)
                for kind in run.sums:
                    stage = _Sums(self._run, step, carrier, rates, kind)
                    gradients = wire.exchange(gradients, stage, run.num_ranks)
                update = _Update(self._run, step, carrier, rates, plan.stop)
                if index + 1 < plan.num_steps:
                    received = wire.exchange(gradients, _Thenscatter(update), run.num_ranks)
            submitted = time.perf_counter()
            try:
                result, outcome = self._committed(
                    lambda keep: wire.frames(gradients, _Thencommit(update, keep, self._news))
                )
            finally:
                in_job_s = time.perf_counter() - submitted
                wire.clean_shuffles(gradients)
        seconds = time.perf_counter() - started
        fixed_s = seconds - in_job_s + _fixed_in_job_s(in_job_s, outcome.records)
        return RoundResult(result, outcome.records, outcome.halt, seconds, fixed_s=fixed_s)


def _fixed_in_job_s(in_job_s: float, records: Sequence[StepRecord]) -> float:
    """What a job takes however many steps it has.

    It scatters the weights before the first step, and commits after the last, which together is
    about what one exchange takes: a stage, and a file or more of each rank.
    """
    exchanges_s = in_job_s - sum(sum(record.seconds.values()) for record in records)
    return max(0.0, exchanges_s) / (len(records) + 1)


@dataclass(frozen=True)
class _Scatter:
    """Before the first stage A: from the commit to every rank."""

    run: Broadcast
    step: int
    carrier: Carrier

    def __call__(self, rank: int, frames: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
        (frame,) = frames
        state = state_of(frame).settled()
        yield from self.carrier.state_to_all(self.run.value, state, self.step)


@dataclass(frozen=True)
class _Gradient:
    """Stage A."""

    run: Broadcast
    step: int
    carrier: Carrier

    def __call__(
        self, rank: int, pairs: Iterable[tuple[bytes, bytes]]
    ) -> Iterator[tuple[int, bytes]]:
        run = self.run.value
        with reporting(rank=rank, step=self.step + 1, phase="gradient"):
            program = program_of(run)
            handle, frames = handle_first(pairs)
            reader = reader_of(run, handle)
            reader.prefetch(self.step)  # while the weights arrive
            own, messages = None, []
            for frame in frames:
                message = message_of(frame)
                messages.append(message)
                if message.source == rank:
                    own = frame
            assert own is not None
            messages.sort(key=lambda message: message.source)
            halt = next((m.meta["halt"] for m in messages if m.meta["halt"]), None)
            contribution = Contribution(rank, halt=Halt(**halt) if halt else None)
            if not halt:
                replica = program.replica(messages)
                contribution = program.contribute(rank, self.step, replica, reader)
            for owner in range(run.num_ranks):
                message = gradient_message(run, contribution, owner)
                yield owner, self.carrier.pack(message, self.step, owner)
            yield rank, own


@dataclass(frozen=True)
class _Sums:
    """Between A and B, where an update needs sums over whole tensors: every rank sums its slice."""

    run: Broadcast
    step: int
    carrier: Carrier
    learning_rates: StepRates
    kind: str

    def __call__(self, rank: int, frames: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
        frames = list(frames)
        parts, sums, own = _receive(frames)
        run = self.run.value
        with reporting(rank=rank, step=self.step + 1, phase=f"{self.kind} sums"):
            program, state = program_of(run), state_from_message(own)
            reduced = program.reduce(parts)
            arrays = {}
            if not (reduced.halt or state.halt):
                arrays[self.kind] = program.tensor_sums(
                    self.kind, state, reduced, self.learning_rates, sums
                )
            for target in range(run.num_ranks):
                yield target, encode(Message("sums", rank, {}, arrays))
            # What came in goes on to the next stage of the same rank.
            for frame in frames:
                yield rank, frame


@dataclass(frozen=True)
class _Update:
    """Stage B: from the frames of all ranks to the new state of this one."""

    run: Broadcast
    step: int
    carrier: Carrier
    learning_rates: StepRates
    stop: Callable[[int, float], bool] | None

    def __call__(self, rank: int, frames: Iterable[bytes]) -> RankState:
        parts, sums, own = _receive(frames)
        with reporting(rank=rank, step=self.step + 1, phase="update"):
            program = program_of(self.run.value)
            return program.apply(
                state_from_message(own),
                program.reduce(parts),
                self.learning_rates,
                sums,
                self.stop,
            )


@dataclass(frozen=True)
class _Thenscatter:
    update: _Update

    def __call__(self, rank: int, frames: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
        update = self.update
        state = update(rank, frames)
        # This step's gradients come from tasks that saw the end of all updates before.
        update.carrier.forget(rank, update.step - 1)
        yield from update.carrier.state_to_all(update.run.value, state, update.step + 1)


@dataclass(frozen=True)
class _Thencommit:
    """The last stage of a round; every rank tells the driver what happened."""

    update: _Update
    keep: Carrier
    news: Any  # Accumulator of {rank: (finished steps, halt, records)}

    def __call__(self, rank: int, frames: Iterable[bytes]) -> Iterator[bytes]:
        state = self.update(rank, frames)
        self.news.add({rank: news_of(self.update.run.value, state)})
        yield self.keep.pack(state_to_message(state), state.step, "commit")


def _receive(
    frames: Iterable[bytes],
) -> tuple[list[Message], dict[str, np.ndarray], Message]:
    """The gradients by rank, the sums over all ranks by kind, and what this rank sent itself."""
    gradients, sums, own = [], [], None
    for frame in frames:
        message = message_of(frame)
        if message.kind == "gradient":
            gradients.append(message)
        elif message.kind == "sums":
            sums.append(message)
        else:
            own = message
    assert own is not None
    by_kind: dict[str, list[np.ndarray]] = {}
    for message in sorted(sums, key=lambda message: message.source):
        for kind, part in message.arrays.items():
            by_kind.setdefault(kind, []).append(part)
    return (
        sorted(gradients, key=lambda message: message.source),
        {kind: sum_in_rank_order(parts) for kind, parts in by_kind.items()},
        own,
    )
