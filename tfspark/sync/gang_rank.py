"""The steps of one rank of a gang: a rank's arithmetic with exchanges between. Knows no Spark."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tfspark._aligned import aligned_empty
from tfspark.data.batches import BatchReader
from tfspark.sync.collectives import all_gather_small, all_reduce_sum
from tfspark.sync.engine import Halt, RankState, RoundPlan, StepRates, StepRecord
from tfspark.sync.frames import Message
from tfspark.sync.links import Links
from tfspark.sync.messages import Contribution, gradient_message, shard_message
from tfspark.sync.rank import RankProgram, Replica
from tfspark.sync.shared import LEAST_BYTES


@dataclass
class Patience:
    """How long a rank waits for a silent peer.

    A peer that died closes its connections, and a host that vanished answers no keep-alive: both
    are seen at once. What is left are processes that live and do nothing. A step that takes long
    must not be taken for one, so the limit is a multiple of the longest step so far.

    Attributes:
        longest_s: the longest step of the round before, if there was one.
        first_s: of a round's first step where some rank is new to the run: it compiles programs.
        least_s: the limit however short steps are.
        multiple: of the longest step.
    """

    longest_s: float | None = None
    first_s: float = 600.0
    least_s: float = 30.0
    multiple: float = 20.0

    def saw(self, seconds: float) -> None:
        """Notes how long a step took."""
        self.longest_s = max(seconds, self.longest_s or 0.0)

    def limit_s(self, *, first: bool) -> float:
        """Of the next exchange; `first`: before the first step of a rank that is new to the run."""
        if self.longest_s is None:
            return self.first_s
        limit_s = max(self.least_s, self.multiple * self.longest_s)
        return max(limit_s, self.first_s) if first else limit_s


class GangRank:
    """One rank of a gang during one round.

    Args:
        program: of the run.
        reader: of the rank's rows.
        links: to all other ranks.
        patience: with silent peers.

    Attributes:
        tell: called with the record of every step, as it ends; for a rank that speaks for all.
        interrupted: asked before every step; true ends the round there, on all ranks.
    """

    tell: Callable[[StepRecord], None] | None = None
    interrupted: Callable[[], bool] | None = None

    # Whether every rank has done with the weights of a step before any rank has those of the next.
    _in_step = True

    def __init__(
        self,
        program: RankProgram,
        reader: BatchReader,
        links: Links,
        patience: Patience,
    ):
        self._program = program
        self._reader = reader
        self._links = links
        self._patience = patience
        self._compiling = True
        # The owner of a slice may be the only one to see that its sum is not finite. The others go
        # on and hear of it with its weights, or at the end of the round; then they go back.
        self._alone = False
        self._before: RankState | None = None
        # The same memory in every step: to get that of large sums from the system takes longer than
        # to add them.
        self._sum = aligned_empty(program.run.layout.shard_size, program.run.layout.dtype)
        # With one group, the padded slices of all ranks are the flat vector: they are received into
        # their place.
        self._whole: np.ndarray | None = None
        # Where all ranks share memory, that place and the gradients of all ranks lie there.
        self._shares_weights = False
        self._gradients: np.ndarray | None = None  # [num_ranks, padded P]

    def take_steps(self, state: RankState, plan: RoundPlan) -> RankState:
        """The state after the steps of a plan, or after the one that halted."""
        self._begin(state.step)
        self._make_room(state.step + 1)
        for index, rates in enumerate(plan.learning_rates):
            last = index + 1 == plan.num_steps
            started = time.perf_counter()
            if self.interrupted and self.interrupted() and not self._alone:
                # All others see it on the weights of this rank.
                state = replace(state, halt=Halt("interrupt", state.step))
            state = self._step(state, rates, plan, last)
            if self._alone:
                continue
            if state.halt:
                break
            took = time.perf_counter() - started
            self._patience.saw(took)
            self._compiling = False
            record = state.records[-1]
            exchange = max(0.0, took - sum(record.seconds.values()))
            record = replace(record, seconds={**record.seconds, "exchange": exchange})
            state.records[-1] = record
            if self.tell:
                self.tell(record)
        return state

    def _begin(self, step: int) -> None:
        """Finds out whether the first steps of any rank take long, because it compiles."""
        is_new = not self._program.has_stepped
        new = all_gather_small(
            self._links, is_new, phase="start", step=step + 1, timeout_s=self._limit_s
        )
        self._compiling = any(new)

    def _make_room(self, step: int) -> None:
        run, layout = self._program.run, self._program.run.layout
        padded = layout.num_ranks * layout.shard_size
        gradients = self._common((layout.num_ranks, padded), layout.dtype, step)
        self._gradients = gradients
        if layout.pads_at_end:
            whole = self._common((padded,), run.compression.dtype, step)
            self._shares_weights = whole is not None
            self._whole = aligned_empty(padded, run.compression.dtype) if whole is None else whole

    def _common(
        self, shape: tuple[int, ...], dtype: str | np.dtype, step: int
    ) -> np.ndarray | None:
        """Zeros that all ranks read and write; None where there are none."""
        dtype = np.dtype(dtype)
        num_bytes = math.prod(shape) * dtype.itemsize
        if not self._in_step or num_bytes < LEAST_BYTES:
            return None
        memory = self._links.common_memory(num_bytes, step=step, timeout_s=self._limit_s)
        return None if memory is None else memory.view(dtype).reshape(shape)

    def _step(self, state: RankState, rates: StepRates, plan: RoundPlan, last: bool) -> RankState:
        program, step = self._program, state.step
        run = program.run
        shards = self._gather_shards(state)
        halts = [message.meta["halt"] for message in shards]
        if any(halts):
            return self._ended(state, halts)
        contribution = self._contribution(step, shards, None if last else step + 1)
        reduced = program.reduce(self._reduce_scatter(contribution, step), self._sum)
        sums: dict[str, np.ndarray] = {}
        for kind in () if reduced.halt else run.sums:
            sums[kind] = all_reduce_sum(
                self._links,
                program.tensor_sums(kind, state, reduced, rates, sums),
                phase=f"{kind} sums",
                step=step + 1,
                timeout_s=self._limit_s,
            )
        after = program.apply(state, reduced, rates, sums, plan.stop)
        if reduced.halt:
            return after
        self._before = state
        self._alone = after.halt is not None and after.halt.kind == "non_finite"
        # A rank that is alone has not asked whether to stop; the others leave the round if so.
        stops = plan.stop is not None and plan.stop(step + 1, reduced.loss_sum / reduced.rows)
        if last or stops:
            halts = all_gather_small(
                self._links,
                asdict(after.halt) if after.halt and self._alone else None,
                phase="end",
                step=step + 1,
                timeout_s=self._limit_s,
            )
            if any(halts):
                return self._ended(after, halts)
        return after

    def _ended(self, state: RankState, halts: Sequence[dict[str, Any] | None]) -> RankState:
        """The state in which all ranks end the round, as some of them have said."""
        self._alone = False
        found = [Halt(**halt) for halt in halts if halt]
        halt = next((halt for halt in found if halt.kind == "non_finite"), found[0])
        if halt.kind == "non_finite" and state.step >= halt.step:
            assert self._before is not None, "the step was taken in this round"
            state = self._before
        return replace(state, halt=halt)

    def _contribution(
        self, step: int, shards: list[Message], next_step: int | None
    ) -> Contribution:
        """Of this rank to a step counted from 0; `next_step`: None in the last one of a round."""
        rank, size = self._links.rank, self._program.run.layout.size
        # Its reader has summed what lay there: this rank has the weights that came of it.
        into = None if self._gradients is None else self._gradients[rank, :size]
        return self._program.contribute(
            rank,
            step,
            self._replica(shards),
            self._reader,
            next_step,
            into,
            check_gradient=False,
        )

    def _gather_shards(self, state: RankState) -> list[Message]:
        """The "shard" messages of all ranks, by rank."""
        own = shard_message(state, self._program.run)
        whole = self._whole
        if whole is None:
            return self._all_to_all(own, "weights", state.step)
        buckets = {f"slice{i}": one for i, one in enumerate(self._program.run.layout.buckets)}

        def place(source: int, kind: str, name: str, *_: object) -> np.ndarray | None:
            return whole[buckets[name].place(source)] if name in buckets else None

        # In common memory nobody reads the weights of the step before any more: this rank has the
        # gradients that all others made of them.
        arrays = dict(own.arrays)
        shard = arrays.pop("shard")
        slices = {name: shard[bucket.part] for name, bucket in buckets.items()}
        for name, bucket in buckets.items():
            whole[bucket.place(state.rank)] = slices[name]
        own = replace(own, arrays=arrays if self._shares_weights else {**arrays, **slices})
        return self._all_to_all(own, "weights", state.step, place)

    def _replica(self, shards: list[Message]) -> Replica:
        if self._whole is None:
            return self._program.replica(shards)
        run = self._program.run
        return self._program.replica(
            shards, run.compression.restored(self._whole[: run.layout.size])
        )

    def _reduce_scatter(self, contribution: Contribution, step: int) -> list[Message]:
        """The "gradient" messages of all ranks for this rank's slice, by rank."""
        run, rank, shared = self._program.run, contribution.rank, self._gradients
        messages = {
            owner: gradient_message(run, contribution, owner, with_gradient=shared is None)
            for owner in range(run.num_ranks)
        }
        own = messages.pop(rank)
        received = {**self._exchange(messages, "gradient", step), rank: own}
        parts = [received[source] for source in range(run.num_ranks)]
        if shared is None:
            return parts
        return [
            replace(part, arrays={**part.arrays, "gradient": self._read(shared[part.source])})
            if part.meta["rows"]
            else part
            for part in parts
        ]

    def _read(self, gradient: np.ndarray) -> np.ndarray:
        """This rank's slice of a gradient in common memory, as it would come in a message."""
        run = self._program.run
        return run.compression.gradient(run.layout.shard(gradient, self._links.rank))

    def _all_to_all(
        self, own: Message, phase: str, step: int, place: Callable[..., Any] | None = None
    ) -> list[Message]:
        """The same message to all; theirs by rank."""
        received = self._exchange(dict.fromkeys(self._links.peers, own), phase, step, place)
        received[own.source] = own
        return [received[source] for source in range(self._links.size)]

    @property
    def _limit_s(self) -> float:
        return self._patience.limit_s(first=self._compiling)

    def _exchange(
        self,
        outgoing: dict[int, Message],
        phase: str,
        step: int,
        place: Callable[..., Any] | None = None,
    ) -> dict[int, Message]:
        return self._links.exchange(
            outgoing,
            phase=phase,
            step=step + 1,
            timeout_s=self._limit_s,
            place=place,
        )
