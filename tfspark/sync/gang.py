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

Settings of Spark that an application may have:

* `spark.tfspark.ports`, such as `40000-40100`: where ranks and the rendezvous listen.
* `spark.driver.bindAddress`: where the rendezvous listens, if not at `spark.driver.host`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from pyspark import BarrierTaskContext, Broadcast, SparkContext, StorageLevel
from pyspark.rdd import RDD

from tfspark.data.failures import TaskFailure, decoded, reporting
from tfspark.errors import (
    InvalidInputError,
    PeerLostError,
    StoreLostError,
    TFSparkError,
    TrainingError,
    WorkerLostError,
)
from tfspark.sync import wire
from tfspark.sync.carriers import Carrier, state_of, through_spark
from tfspark.sync.control import MAX_LINE_BYTES
from tfspark.sync.early_rank import EarlyRank
from tfspark.sync.engine import RoundPlan, RoundResult, Run, StepRecord
from tfspark.sync.gang_rank import GangRank, Patience
from tfspark.sync.interrupts import run_interruptibly
from tfspark.sync.local_steps import LocalRank, patience_with
from tfspark.sync.member import Member
from tfspark.sync.messages import state_to_message
from tfspark.sync.rendezvous import Rendezvous
from tfspark.sync.spark_engine import (
    Carriers,
    Commit,
    Select,
    SparkEngine,
    handle_frames,
    news_of,
)
from tfspark.sync.tasks import handle_first, memory_kept, program_of, reader_of
from tfspark.sync.tolerant_rank import TolerantRank

_MEETING_S = 300.0
"""How long ranks wait for each other: Python workers start and programs are loaded in that time."""

_TELL_S = 0.2
"""Seconds between two reports of a rank to the driver."""

_GRACE_S, _MOST_GRACE_S = 2.0, 15.0
"""How long ranks may take to end a round in a commit after Ctrl-C, beside two steps; at most."""

PORTS = "spark.tfspark.ports"


class GangEngine(SparkEngine):
    """Trains in barrier stages; see the module's docstring."""

    name = "gang"
    most_steps = None

    def __init__(self, context: SparkContext, handles: RDD, carriers: Carriers = through_spark):
        super().__init__(context, handles, carriers)
        settings = context.getConf()
        self._host = str(settings.get("spark.driver.host"))
        self._bind_host = str(settings.get("spark.driver.bindAddress", self._host))
        self._ports = port_range(settings.get(PORTS))
        self._longest_alone_s: float | None = None  # between two exchanges

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
        started = time.perf_counter()
        assert self._run is not None and self._handles is not None, "start() comes first"
        self._release_all_but(commit)
        told: dict[int, str] = {}

        def hear(rank: int, report: dict[str, Any]) -> None:
            if "error" in report:
                told[rank] = report["error"]
            elif tell is not None:
                tell(StepRecord(**report["record"]))

        token = secrets.token_hex(32)
        run = self._run.value
        with Rendezvous(
            self._host,
            run.num_ranks,
            token=token,
            on_report=hear,
            bind_host=self._bind_host,
            ports=self._ports,
        ) as meeting:
            task = partial(
                _Round,
                self._run,
                plan,
                meeting.address,
                token,
                self._ports,
                patience_with(run.average_every, self._longest_alone_s),
                self._news,
            )
            pairs = wire.zip_frames(self._handles, commit.frames)
            try:
                result, outcome = run_interruptibly(
                    lambda: self._committed(
                        lambda keep: wire.frames(pairs, task(keep), barrier=True)
                    ),
                    on_interrupt=meeting.interrupt,
                    cancel=self._cancel,
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

    def _one_by_one(self, commit: Commit, select: Select) -> Iterator[bytes]:
        # Spark computes all partitions of a barrier stage or none, so one job for each rank.
        assert self._run is not None
        for rank in range(self._run.value.num_ranks):
            selected = wire.frames(commit.frames, _OfRank(rank, select))
            with self._job():
                (frame,) = selected.collect()
            yield frame

    def _cause(
        self, error: TFSparkError, failures: list[tuple[int, str]], told: dict[int, str]
    ) -> TFSparkError:
        """What the first rank that failed said; Spark reports any one of them."""
        assert self._handles is not None
        if f"rdd_{self._handles.id()}_" in str(error):
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
        if said is not None:
            return said
        return PeerLostError(
            f"All ranks must live until a round has ended. Received: rank {rank} vanished ({text})."
            " Most often memory ran out, or the machine was lost.",
            rank=rank,
            phase="round",
        )


@dataclass(frozen=True)
class _Round:
    """The task of one rank in one round."""

    run: Broadcast
    plan: RoundPlan
    address: tuple[str, int]
    token: str
    ports: range | None
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
        context = BarrierTaskContext.get()
        host = context.getTaskInfos()[rank].address.rpartition(":")[0]
        with Member.join(
            self.address,
            self.token,
            rank,
            0,
            num_ranks,
            bind_host=host,
            ports=self.ports,
            timeout_s=_MEETING_S,
        ) as member:
            try:
                with reporting(rank=rank, phase="round"):
                    yield member
            except TaskFailure as failure:
                text = str(failure)
                with suppress(TrainingError):  # the driver is gone: then nobody wants to know
                    if len(text) < MAX_LINE_BYTES // 2:
                        member.report({"error": text})
                member.failed(text)
                raise
            member.done()


@dataclass(frozen=True)
class _OfRank:
    """Selects from the state of one rank; yields nothing for the others."""

    rank: int
    select: Select

    def __call__(self, rank: int, frames: Iterable[bytes]) -> Iterator[bytes]:
        for frame in frames:
            if rank == self.rank:
                yield from self.select(rank, [frame])


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


def port_range(setting: str | None) -> range | None:
    """The ports of a setting such as "40000-40100" or "40000"; None lets the system choose.

    Raises:
        InvalidInputError: it is no range of ports.
    """
    if setting is None:
        return None
    first, _, last = setting.partition("-")
    try:
        ports = range(int(first), int(last or first) + 1)
    except ValueError:
        ports = range(0)
    if not ports or not (ports[0] > 0 and ports[-1] < 2**16):
        raise InvalidInputError(
            f"{PORTS} is a port or a range such as '40000-40100', with one port for the driver and "
            f"one for every rank of a host. Received: {setting!r}."
        )
    return ports
