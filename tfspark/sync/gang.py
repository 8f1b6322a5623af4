"""The engine `gang`: a round is one barrier stage, whose ranks swap slices over sockets.

```
handles ─┐
         zip ──► N tasks at once, one per rank ──► commit
commit ──┘        │ meet at the driver's rendezvous, connect to each other
                  └ step, step, step …              sync/gang_rank.py, local_steps.py
```

The driver takes part in a round by control messages only: it lets the ranks find each other, hears
of their steps, and tells all if one has failed. A round that failed leaves nothing behind: the
former commit is still there, and the caller may start the same round again. A round that the user
interrupts ends in a commit after the step it is at, if that takes no longer than a few seconds.

Where executors were lost and do not come back, there are fewer slots than ranks. Then rounds run in
stages, as of the engine `shuffle`: the same ranks, whose number is part of the mathematics, take
turns. Every round looks whether the gang can come back.

What the settings of an application say of where ranks meet is in `meeting.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from pyspark import Broadcast, SparkContext, StorageLevel
from pyspark.rdd import RDD

from tfspark.data.failures import TaskFailure, carried, decoded, reporting
from tfspark.errors import (
    ClusterError,
    CommitLostError,
    PeerLostError,
    StoreLostError,
    TFSparkError,
    TrainingError,
    WorkerLostError,
)
from tfspark.sync import wire
from tfspark.sync.carriers import Carrier, state_of, through_spark
from tfspark.sync.early_rank import EarlyRank
from tfspark.sync.engine import RoundPlan, RoundResult, Run, SlotsChanged, StepRecord
from tfspark.sync.gang_rank import GangRank, Patience
from tfspark.sync.interrupts import run_interruptibly
from tfspark.sync.jobs import WAIT_FOR_SLOTS_S
from tfspark.sync.local_steps import LocalRank, patience_with
from tfspark.sync.meeting import Invitation, MeetingPlace
from tfspark.sync.member import Member
from tfspark.sync.messages import state_to_message
from tfspark.sync.shuffle import ShuffleEngine
from tfspark.sync.spark_engine import (
    Carriers,
    Commit,
    handle_frames,
    news_of,
)
from tfspark.sync.tasks import handle_first, memory_kept, program_of, reader_of
from tfspark.sync.tolerant_rank import TolerantRank

logger = logging.getLogger("tfspark")

_MEETING_S = 300.0
"""How long ranks wait for each other: Python workers start and programs are loaded in that time."""

_TELL_S = 0.2
"""Seconds between two reports of a rank to the driver."""

_GRACE_S, _MOST_GRACE_S = 2.0, 15.0
"""How long ranks may take to end a round in a commit after Ctrl-C, beside two steps; at most."""

_MOST_ECHO = 200  # characters of an error that another one caused


class GangEngine(ShuffleEngine):
    """Trains in barrier stages, and without a slot for every rank in those of its base class.

    See the module's docstring.
    """

    name = "gang"
    most_steps = None

    def __init__(
        self,
        context: SparkContext,
        handles: RDD,
        carriers: Carriers = through_spark,
        wait_for_slots_s: float = WAIT_FOR_SLOTS_S,
        takes_turns: bool = True,
    ):
        super().__init__(context, handles, carriers, wait_for_slots_s)
        self._takes_turns = takes_turns
        self._place = MeetingPlace.of(context)
        self._longest_alone_s: float | None = None  # between two exchanges
        self._stage_handles: RDD | None = None  # while rounds run in stages

    def _round_handles(self, run: Run) -> RDD:
        frames = handle_frames(self._source, copies=1)
        frames.persist(StorageLevel.MEMORY_AND_DISK)
        # A barrier stage allows no coalesce in its lineage. Cut off from it, a lost handle is an
        # error, which makes the caller rebuild.
        frames.localCheckpoint()
        return frames

    def round(
        self, commit: Commit, plan: RoundPlan, tell: Callable[[StepRecord], None] | None = None
    ) -> RoundResult:
        assert self._run is not None and self._handles is not None, "start() comes first"
        there = self._slots_there()
        if there < self._run.value.num_ranks:
            return self._round_in_stages(commit, plan, there)
        started = time.perf_counter()
        self._release_all_but(commit)
        told: dict[int, str] = {}

        def hear(rank: int, report: dict[str, Any]) -> None:
            if "error" in report:
                told[rank] = report["error"]
            elif tell is not None:
                tell(StepRecord(**report["record"]))

        run = self._run.value
        meeting, invitation = self._place.open(run.num_ranks, hear)
        with meeting:
            task = partial(
                _Round,
                self._run,
                plan,
                invitation(),
                patience_with(run.average_every, self._longest_alone_s),
                self._news,
            )
            pairs = wire.zip_frames(self._handles, commit.frames)
            try:
                result, outcome = run_interruptibly(
                    lambda: self._committed(
                        lambda keep: wire.frames(pairs, task(keep), barrier=True), run.num_ranks
                    ),
                    on_interrupt=meeting.interrupt,
                    cancel=self._jobs.cancel,
                    grace_s=min(_GRACE_S + 2 * (self._longest_alone_s or 0.0), _MOST_GRACE_S),
                )
            except TFSparkError as error:
                raise self._cause(error, meeting.failures, told) from None
        if outcome.records:
            longest_step_s = max(sum(r.seconds.values()) for r in outcome.records)
            self._longest_alone_s = run.average_every * longest_step_s
        seconds = time.perf_counter() - started
        in_steps = sum(sum(record.seconds.values()) for record in outcome.records)
        return RoundResult(
            result, outcome.records, outcome.halt, seconds, fixed_s=max(0.0, seconds - in_steps)
        )

    def close(self) -> None:
        self._release_stages()
        super().close()

    def rebuild(self) -> None:
        self._release_stages()
        super().rebuild()

    def _slots_there(self) -> int:
        """How many slots there are; where executors were lost, waits for others first."""
        assert self._run is not None
        needed, in_stages = self._run.value.num_ranks, self._stage_handles is not None
        # While rounds run in stages nobody waits any more: each looks once.
        there = self._jobs.await_slots(needed, 0.0 if in_stages else self._jobs.wait_for_slots_s)
        if there >= needed and in_stages:
            logger.warning("Rounds run as a gang again: there are %d task slots.", there)
            self._release_stages()
        return there

    def _round_in_stages(self, commit: Commit, plan: RoundPlan, there: int) -> RoundResult:
        """A round with fewer slots than ranks: the same ranks, one after the other, as many bits.

        What is lost is speed: every step is two stages, and executors take turns.
        """
        assert self._run is not None
        run = self._run.value
        if not self._takes_turns and there:
            raise SlotsChanged(there)
        if run.average_every > 1 or run.leave_out is not None:
            needs = f"average_every={run.average_every}, leave_out={run.leave_out}"
            raise ClusterError(
                f"With {needs} all ranks run at the same time. Received: fewer task slots than the "
                f"{run.num_ranks} ranks for {self._jobs.wait_for_slots_s:g} s. Give the "
                "application executors for those that it lost, or let it wait longer "
                "(FailurePolicy(wait_for_slots_s=…))."
            )
        if self._stage_handles is None:
            logger.warning(
                "Rounds run in stages, as of the engine 'shuffle', because there are fewer task "
                "slots than the %d ranks of the gang. They give the same bits; with enough slots "
                "the gang comes back.",
                run.num_ranks,
            )
            self._stage_handles = self._handles_for_stages(run)
            self._compute(self._stage_handles)
        most = ShuffleEngine.most_steps
        fewer = replace(plan, learning_rates=plan.learning_rates[:most])
        return self._in_stages(self._stage_handles, commit, fewer)

    def _release_stages(self) -> None:
        if self._stage_handles is not None:
            wire.release(self._stage_handles)
            self._stage_handles = None

    def _cause(
        self, error: TFSparkError, failures: list[tuple[int, str]], told: dict[int, str]
    ) -> TFSparkError:
        """What the first rank that failed said; Spark reports any one of them."""
        assert self._handles is not None
        # The block is looked at, never the message: it may quote a log that names any block.
        lost = error.block if isinstance(error, CommitLostError) else ""
        if lost.startswith(f"rdd_{self._handles.id()}_"):
            return StoreLostError(
                "Every rank needs the handle of its store. Received: one that was lost with its "
                "executor. It is written anew."
            )
        if not failures:
            return error
        rank, text = failures[0]
        said = decoded(told[rank]) if rank in told else None
        echo = said is None or isinstance(said, PeerLostError)
        if isinstance(error, WorkerLostError) and echo:
            return error  # Spark saw the process die, its peers only a connection
        if said is None:
            said = PeerLostError(
                "All ranks must live until a round has ended. Received: rank "
                f"{rank} vanished ({text}). Most often memory ran out, or the machine was lost.",
                rank=rank,
                phase="round",
            )
        return _with_others(said, failures[1:])


@dataclass(frozen=True)
class _Round:
    """The task of one rank in one round."""

    run: Broadcast
    plan: RoundPlan
    invitation: Invitation
    patience: Patience
    news: Any  # Accumulator of {rank: (finished steps, halt, records)}
    keep: Carrier

    def __call__(self, rank: int, pairs: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
        handle, frames = handle_first(pairs)
        (frame,) = frames
        run = self.run.value
        with reporting(rank=rank, phase="round"):
            program, reader = program_of(run), reader_of(run, handle)
            step = self.plan.first_step
            reader.prefetch(step)
            with self._member(rank, run.num_ranks) as member:
                member.links.share_memory(step=step, timeout_s=_MEETING_S)
                gang = rank_class(run)(program, reader, member.links, self.patience)
                if rank == 0:  # one speaks and listens for all
                    teller = _Teller(member)
                    gang.tell, gang.interrupted = teller.tell, teller.interrupted
                with memory_kept():
                    # Held here, the state before the round would stay in memory all through it.
                    state = gang.take_steps(state_of(frame).settled(), self.plan)
                patience_s = self.patience.limit_s(first=True)
                member.links.leave(step=state.step, timeout_s=patience_s)
        self.news.add({rank: news_of(run, state)})
        yield self.keep.pack(state_to_message(state), state.step, "commit")

    @contextmanager
    def _member(self, rank: int, num_ranks: int) -> Iterator[Member]:
        """Membership of the gang; says how it ended."""
        with self.invitation.join(rank, num_ranks, _MEETING_S) as member:
            try:
                with reporting(rank=rank, phase="round"):
                    yield member
            except TaskFailure as failure:
                text = str(failure)
                with suppress(TrainingError):  # the driver is gone: then nobody wants to know
                    member.report({"error": carried(text)})
                member.failed(text)
                raise
            member.done()


def _with_others(cause: TFSparkError, failures: list[tuple[int, str]]) -> TFSparkError:
    """The cause, and in a line each what other ranks said after it, which mostly is an echo."""
    lines = [f"  rank {rank}: {' '.join(text.split())[:_MOST_ECHO]}" for rank, text in failures]
    if not lines:
        return cause
    message = "\n".join([cause.message, "After it there failed, too:", *lines])
    return type(cause)(message, **cause.where)


def rank_class(run: Run) -> type[GangRank]:
    """What a rank of this run is."""
    if run.average_every > 1:
        return LocalRank
    if run.leave_out is not None:
        return TolerantRank
    return EarlyRank if run.exchanges_early else GangRank


class _Teller:
    """Tells the driver of steps, not too often, and hears what the driver has to say."""

    def __init__(self, member: Member):
        self._member = member
        self._told_at = float("-inf")

    def tell(self, record: StepRecord) -> None:
        now = time.monotonic()
        if now - self._told_at >= _TELL_S:
            self._told_at = now
            self._member.report({"record": asdict(record)})

    def interrupted(self) -> bool:
        self._member.check()  # a rank without peers waits in no exchange that would notice
        return self._member.is_interrupted
