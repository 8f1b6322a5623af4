"""The steps of one rank of a gang: a rank's arithmetic with exchanges between. Knows no Spark."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from tfspark._aligned import aligned_empty
from tfspark.data.batches import BatchReader
from tfspark.sync.collectives import all_gather_small, all_reduce_sum
from tfspark.sync.engine import Halt, RankState, RoundPlan, StepRecord
from tfspark.sync.frames import Message
from tfspark.sync.links import Links
from tfspark.sync.rank import (
    OVERFLOW,
    Contribution,
    RankProgram,
    Replica,
    gradient_message,
    shard_message,
)


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

    @cached_property
    def _whole(self) -> np.ndarray | None:
        # With one group, the padded shards one after the other are the flat vector: they are
        # received into their place.
        run, layout = self._program.run, self._program.run.layout
        if layout.num_groups > 1:
            return None
        return aligned_empty(layout.num_ranks * layout.shard_size, run.compression.dtype)

    def take_steps(self, state: RankState, plan: RoundPlan) -> RankState:
        """The state after the steps of a plan, or after the one that halted."""
        self._begin(state.step)
        for index, rates in enumerate(plan.learning_rates):
            last = index + 1 == plan.num_steps
            started = time.perf_counter()
            if self.interrupted and self.interrupted():
                # All others see it on the weights of this rank.
                state = replace(state, halt=Halt("interrupt", state.step))
            state = self._step(state, rates, plan, last)
            if state.halt and state.halt.what == OVERFLOW and not last:
                continue  # this rank alone has seen it; its weights tell the others
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

    def _step(
        self, state: RankState, rates: tuple[float, ...], plan: RoundPlan, last: bool
    ) -> RankState:
        program, step = self._program, state.step
        run = program.run
        shards = self._gather_shards(state)
        halt = next((m.meta["halt"] for m in shards if m.meta["halt"]), None)
        if halt:
            # Only the owner of a slice sees that its sum overflowed; the others hear of it here.
            return replace(state, halt=Halt(**halt))
        contribution = self._contribution(step, shards, None if last else step + 1)
        reduced = program.reduce(self._reduce_scatter(contribution, step))
        sums: dict[str, np.ndarray] = {}
        for kind in () if reduced.halt else run.sums:
            sums[kind] = all_reduce_sum(
                self._links,
                program.tensor_sums(kind, state, reduced, rates, sums),
                phase=f"{kind} sums",
                step=step + 1,
                timeout_s=self._limit_s,
            )
        return program.apply(state, reduced, rates, sums, plan.stop)

    def _contribution(
        self, step: int, shards: list[Message], next_step: int | None
    ) -> Contribution:
        """Of this rank to a step counted from 0; `next_step`: None in the last one of a round."""
        return self._program.contribute(
            self._links.rank, step, self._replica(shards), self._reader, next_step
        )

    def _gather_shards(self, state: RankState) -> list[Message]:
        """The "shard" messages of all ranks, by rank."""
        own = shard_message(state, self._program.run)
        whole, size = self._whole, self._program.run.layout.shard_size
        if whole is None:
            return self._all_to_all(own, "weights", state.step)

        def place(source: int, kind: str, name: str, *_: object) -> np.ndarray | None:
            return whole[source * size : (source + 1) * size] if name == "shard" else None

        whole[state.rank * size : (state.rank + 1) * size] = own.arrays["shard"]
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
        run, rank = self._program.run, contribution.rank
        outgoing = {peer: gradient_message(run, contribution, peer) for peer in self._links.peers}
        received = self._exchange(outgoing, "gradient", step)
        received[rank] = gradient_message(run, contribution, rank)
        return [received[source] for source in range(run.num_ranks)]

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
