"""A rank of a gang that exchanges a gradient bucket by bucket, while it computes the rest of it.

```
thread   ─ gradient of the last layers ─┬─ … ─┬─ of the first layers ─┐
main                                    └ last bucket ─┴ next one ──  ┴ first bucket, loss, rows
```

Buckets are exchanged from the last to the first on all ranks, whatever the order in which they are
computed, so that all exchange the same at the same time. The sums are those of `GangRank`, in the
same order: it gives the same bits. Where all ranks share memory, nothing has to be exchanged early.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import numpy as np

from tfspark._aligned import aligned_empty
from tfspark.data.batches import BatchReader
from tfspark.sync.engine import RankState, RoundPlan
from tfspark.sync.frames import Message
from tfspark.sync.gang_rank import GangRank, Patience
from tfspark.sync.links import Links
from tfspark.sync.messages import Contribution, gradient_message
from tfspark.sync.rank import RankProgram


class EarlyRank(GangRank):
    """One rank of a gang during one round, in a run that `exchanges_early`.

    Args:
        program, reader, links, patience: see `GangRank`.
    """

    def __init__(self, program: RankProgram, reader: BatchReader, links: Links, patience: Patience):
        super().__init__(program, reader, links, patience)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tfspark-gradient")
        # Where ranks share no memory: this rank's gradient, padded, and its slice of everybody's.
        self._own: np.ndarray | None = None
        self._received: np.ndarray | None = None  # [num_ranks, shard_size], as it travels

    def take_steps(self, state: RankState, plan: RoundPlan) -> RankState:
        """See `GangRank`. Nothing computes any more when this returns."""
        try:
            return super().take_steps(state, plan)
        finally:
            self._thread.shutdown()

    def _make_room(self, step: int) -> None:
        super()._make_room(step)
        if self._gradients is None:
            run, layout = self._program.run, self._program.run.layout
            self._own = aligned_empty(layout.num_ranks * layout.shard_size, layout.dtype)
            self._own[layout.size :] = 0
            shape = layout.num_ranks, layout.shard_size
            self._received = aligned_empty(shape, run.compression.dtype)

    def _contribution(
        self, step: int, shards: list[Message], next_step: int | None
    ) -> Contribution:
        if self._own is None:
            return super()._contribution(step, shards, next_step)
        rank, run = self._links.rank, self._program.run
        has_rows = run.order.rank_rows(run.order.locate(step)[1])[rank] > 0
        ready = [Event() for _ in run.layout.buckets]
        computing: Future[Contribution] = self._thread.submit(
            self._program.contribute,
            rank,
            step,
            self._replica(shards),
            self._reader,
            next_step,
            self._own,
            check_gradient=False,
            on_bucket=lambda bucket: ready[bucket].set(),
        )

        def end(_: object) -> None:
            for event in ready:
                event.set()

        computing.add_done_callback(end)  # also without rows, and after an error
        for bucket in reversed(range(1, len(ready))):
            ready[bucket].wait()
            if computing.done():
                computing.result()  # raises what the gradient raised
            message = Message("bucket", rank, {}, {})
            outgoing = {
                peer: self._with_bucket(message, bucket, peer, has_rows)
                for peer in self._links.peers
            }
            self._exchange_bucket(outgoing, bucket, step)
        return computing.result()

    def _reduce_scatter(self, contribution: Contribution, step: int) -> list[Message]:
        if self._own is None:
            return super()._reduce_scatter(contribution, step)
        assert self._received is not None
        run, rank, has_rows = self._program.run, contribution.rank, contribution.rows > 0
        messages = {
            owner: gradient_message(run, contribution, owner, with_gradient=False)
            for owner in range(run.num_ranks)
        }
        own = messages.pop(rank)
        if has_rows:
            self._received[rank] = run.compression.gradient(run.layout.shard(self._own, rank))
        outgoing = {
            peer: self._with_bucket(message, 0, peer, has_rows)
            for peer, message in messages.items()
        }
        parts = {**self._exchange_bucket(outgoing, 0, step), rank: own}
        return [
            replace(part, arrays={**part.arrays, "gradient": self._received[part.source]})
            if part.meta["rows"]
            else part
            for _, part in sorted(parts.items())
        ]

    def _with_bucket(self, message: Message, bucket: int, peer: int, has_rows: bool) -> Message:
        """A message with a peer's slice of a bucket of this rank's gradient, if it has one."""
        if not has_rows:
            return message
        assert self._own is not None
        run = self._program.run
        part = run.compression.gradient(self._own[run.layout.buckets[bucket].place(peer)])
        return replace(message, arrays={**message.arrays, "gradient": part})

    def _exchange_bucket(
        self, outgoing: dict[int, Message], bucket: int, step: int
    ) -> dict[int, Message]:
        """Exchanges messages, and receives this rank's slice of a bucket into its place."""
        received, part = self._received, self._program.run.layout.buckets[bucket].part
        assert received is not None

        def place(source: int, kind: str, name: str, *_: object) -> np.ndarray | None:
            return received[source, part] if name == "gradient" else None

        return self._exchange(outgoing, "gradient", step, place)
