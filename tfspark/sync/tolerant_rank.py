"""A rank of a gang that a step may go on without; see `stragglers.py` for when.

The gradient is computed in a thread beside the exchanges. When it is done, or once it is late, the
rank says so to all others, in one small exchange: as long as everybody is in time, that is all that
the tolerance costs. A rank that is left out takes part in the rest of the step without rows of its
own, and its gradient is dropped when it is ready. Until then it cannot begin another one.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from tfspark._aligned import aligned_empty
from tfspark.data.batches import BatchReader
from tfspark.sync.collectives import all_gather_small
from tfspark.sync.engine import RankState, RoundPlan
from tfspark.sync.frames import Message
from tfspark.sync.gang_rank import GangRank, Patience
from tfspark.sync.links import Links
from tfspark.sync.messages import Contribution
from tfspark.sync.rank import RankProgram, Replica
from tfspark.sync.stragglers import Watch

_Gradient: TypeAlias = "Future[tuple[Contribution, float]]"  # and the seconds that it took

_ASKS = 20
"""While all wait for a rank, it says how it stands so often in the time that makes it late."""


class TolerantRank(GangRank):
    """One rank of a gang during one round, in a run with `leave_out`.

    Args:
        program, reader, links, patience: see `GangRank`.
    """

    _in_step = False  # a rank that was left out may still read weights of steps ago

    def __init__(self, program: RankProgram, reader: BatchReader, links: Links, patience: Patience):
        super().__init__(program, reader, links, patience)
        assert program.run.leave_out is not None, "the caller chooses this class by it"
        self._watch = Watch(program.run.leave_out, program.run.num_ranks)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tfspark-gradient")
        # The gradient that was left out and may still be computed, and the weights that it reads.
        self._dropped: tuple[_Gradient, np.ndarray | None] | None = None
        self._spare: np.ndarray | None = None

    def take_steps(self, state: RankState, plan: RoundPlan) -> RankState:
        """See `GangRank`. For one round: nothing computes any more when this returns."""
        try:
            state = super().take_steps(state, plan)
        finally:
            self._thread.shutdown(cancel_futures=True)
        self._settle()
        return state

    def _settle(self) -> None:
        """Forgets a dropped gradient that has ended; an error on its way is an error still."""
        if self._dropped is not None and self._dropped[0].done():
            self._dropped[0].result()
            self._dropped = None

    def _gather_shards(self, state: RankState) -> list[Message]:
        self._settle()
        whole = self._whole
        if whole is not None and self._dropped is not None and self._dropped[1] is whole:
            # TensorFlow still reads these weights where they lie.
            spare = self._spare
            self._whole = aligned_empty(whole.size, whole.dtype) if spare is None else spare
            self._spare = whole
        return super()._gather_shards(state)

    def _replica(self, shards: list[Message]) -> Replica:
        replica = super()._replica(shards)
        # As received, they are good until the next exchange only.
        for index in self._program.run.state_layout.first:
            replica.state[index] = np.array(replica.state[index])
        return replica

    def _contribution(
        self, step: int, shards: list[Message], next_step: int | None
    ) -> Contribution:
        rank, order = self._links.rank, self._program.run.order
        rows = order.rank_rows(order.locate(step)[1])
        gradient: _Gradient = Future()
        if rows[rank]:
            replica = self._replica(shards)
            gradient = self._thread.submit(self._gradient, step, replica, next_step)
        else:
            gradient.set_result((Contribution(rank), 0.0))
        is_open = not self._compiling and next_step is not None
        left_out = self._agree(gradient, step, rows, self._watch.limit_s if is_open else math.inf)
        if rank not in left_out:
            leader = next(r for r, count in enumerate(rows) if count and r not in left_out)
            return replace(gradient.result()[0], leads=rank == leader)
        if not gradient.cancel():
            self._settle()  # the one before has ended, since this one began
            self._dropped = gradient, self._whole
        return Contribution(rank, left_out=True)

    def _gradient(
        self, step: int, replica: Replica, next_step: int | None
    ) -> tuple[Contribution, float]:
        started = time.perf_counter()
        contribution = self._program.contribute(
            self._links.rank, step, replica, self._reader, next_step
        )
        return contribution, time.perf_counter() - started

    def _agree(
        self, gradient: _Gradient, step: int, rows: tuple[int, ...], limit_s: float
    ) -> frozenset[int]:
        """The ranks that this step goes on without; the same on all ranks.

        Args:
            gradient: of this rank.
            step: counted from 0.
            rows: by rank.
            limit_s: seconds after which this rank is late; infinity: never.
        """
        wait_s = None if limit_s == math.inf else limit_s
        while True:
            wait([gradient], wait_s)
            said = all_gather_small(
                self._links,
                gradient.result()[1] if gradient.done() else None,
                phase="readiness",
                step=step + 1,
                timeout_s=self._limit_s,
            )
            left_out = self._watch.left_out(said, rows)
            if left_out is not None:
                if not self._compiling:
                    self._watch.add(said, rows)
                return left_out
            # Whoever is ready waits in the exchange for those that are not: they set the pace.
            wait_s = limit_s / _ASKS
