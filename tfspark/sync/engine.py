"""The contract of an engine, and the records that pass through it.

An engine takes a `Run` (what never changes), a commit (the state after some step) and a
`RoundPlan` (the steps to take), and returns a new commit and one `StepRecord` per step. It decides
nothing: which steps, which learning rates, when to stop and what to keep is the train layer's.

Who calls what: `start` once, then `round` any number of times with the newest commit, and between
rounds `evaluate`, `map_states` and `collect`. A commit stays readable until the next successful
`round` or until `close`. If `round` raises, the commit that was passed in is still good.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from tfspark.data.order import BatchOrder
from tfspark.graph.clipping import Clipping
from tfspark.graph.program import Evaluation, Program, UpdateProgram
from tfspark.graphdef.pure import PureGraph
from tfspark.sync.compression import Compression, compression
from tfspark.sync.layout import Layout, StateLayout, bucket_cuts
from tfspark.sync.stragglers import LeaveOut


@dataclass(frozen=True)
class Run:
    """Everything that stays the same from the first step to the last; shipped to executors once.

    Attributes:
        run_id: unique; executors cache loaded programs under it.
        program: the gradient.
        updates: one optimizer step per parameter group.
        clippings: one per parameter group, from its optimizer.
        clip_norm: the most that the L2 norm of the whole gradient, over all groups, may be.
        order: which rows make which batch.
        mapping: the user's map over batches, or None.
        seed: of stateless random operations in the program.
        state: the initial model state; its "constant" slots are read throughout the run.
        num_ranks: N.
        accumulation_steps: a rank computes its rows of a batch in so many parts, one after the
            other, and sums their gradients before the exchange.
        average_every: τ of local SGD: steps that a rank takes alone before weights and optimizer
            slots are averaged over ranks. 1: every step is one of all ranks together. Engines
            other than `gang` take 1 only.
        task_threads: TensorFlow threads of one task.
        digests: of every rank's rows, as they were first materialised; a store that was rebuilt
            with other rows would change the training. Empty: not checked.
        wire_dtype: what weights and gradients are rounded to on their way between ranks; None:
            they are not.
        leave_out: which slow ranks a step may go on without; None: none.
        gradient_buckets: the most buckets that a gradient is exchanged in, each as soon as it is
            computed. Engines other than `gang` take 1 only.
    """

    run_id: str
    program: Program
    updates: tuple[UpdateProgram, ...]
    clippings: tuple[Clipping, ...]
    order: BatchOrder
    mapping: PureGraph | None
    seed: int
    state: tuple[np.ndarray, ...]
    num_ranks: int
    clip_norm: float | None = None
    accumulation_steps: int = 1
    average_every: int = 1
    task_threads: int = 1
    digests: tuple[str, ...] = ()
    wire_dtype: str | None = None
    leave_out: LeaveOut | None = None
    gradient_buckets: int = 1

    @cached_property
    def layout(self) -> Layout:
        """The division of the flat vector among the ranks of this run."""
        weights, num_ranks = self.program.weights, self.num_ranks
        cuts = bucket_cuts(weights, num_ranks, self.gradient_buckets)
        return Layout(weights, num_ranks, self.program.dtype, cuts)

    @property
    def exchanges_early(self) -> bool:
        """Whether a step exchanges the first buckets of a gradient while it computes the others."""
        return self.gradient_buckets > 1 and len(self.layout.buckets) > 1

    @property
    def compression(self) -> Compression:
        """How weights and gradients of this run travel."""
        return compression(self.wire_dtype, self.program.dtype, self.order.batch_size)

    @cached_property
    def state_layout(self) -> StateLayout:
        """How the model state of this run travels."""
        return StateLayout(self.program.state, self.num_ranks)

    @property
    def sums(self) -> tuple[str, ...]:
        """The sums over whole tensors that an update needs, in this order.

        "clipping": of the squares of every gradient. "rule": what optimizers sum themselves, of
        clipped gradients.
        """
        clips = self.clip_norm is not None or any(c.needs_norms for c in self.clippings)
        has_rule = any(update.num_sums for update in self.updates)
        return ("clipping",) * clips + ("rule",) * has_rule


@dataclass(frozen=True)
class StepRecord:
    """What the driver learns of one step.

    Attributes:
        step: number of finished steps, this one included; the first is 1.
        loss: of the global batch.
        rows: of the global batch, without those of ranks that were left out.
        seconds: by phase ("data", "gradient", "update", and "exchange" where it is measured), the
            slowest rank's where it is known.
        left_out: ranks that the step went on without.
    """

    step: int
    loss: float
    rows: int
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "left_out", tuple(self.left_out))  # JSON makes a list of it


@dataclass(frozen=True)
class Halt:
    """Why no further step was taken in a round; every rank carries the same one.

    Attributes:
        kind: "stop" (the stop predicate fired: the state is that after the step), "interrupt" (the
            user wants to end; likewise) or "non_finite" (a loss or a gradient was NaN or infinite:
            the state is that before the step).
        step: the step that was being taken or had just ended.
        rank: where something was not finite.
        what: that was not finite: "loss", "gradient" or "sum of gradients".
    """

    kind: str
    step: int
    rank: int | None = None
    what: str | None = None


@dataclass
class RankState:
    """What rank `rank` owns after a step: the content of a commit.

    Attributes:
        rank: the owner.
        step: finished steps.
        shard: `[shard_size]`, the weights.
        slots: per group, the optimizer's slots: vectors `[slice_size of the group]` or scalars.
        mean: this rank's slice of the averaged model state, float64 `[slice_size]`.
        first: the model state that is handed on whole; equal on all ranks.
        records: of the steps of the current round.
        halt: set once the round has to end early.
    """

    rank: int
    step: int
    shard: np.ndarray
    slots: list[list[np.ndarray]]
    mean: np.ndarray
    first: list[np.ndarray]
    records: list[StepRecord] = field(default_factory=list)
    halt: Halt | None = None

    @classmethod
    def initial(cls, run: Run, flat: np.ndarray, rank: int) -> RankState:
        """The state of a rank before the first step."""
        layout, state_layout = run.layout, run.state_layout
        slots = [
            [
                np.full(
                    layout.slice_sizes[group] if slot.kind == "vector" else (),
                    slot.initial,
                    slot.dtype,
                )
                for slot in update.slots
            ]
            for group, update in enumerate(run.updates)
        ]
        return cls(
            rank=rank,
            step=0,
            shard=layout.shard(flat, rank),
            slots=slots,
            mean=state_layout.slice_of(state_layout.pack(run.state), rank),
            first=[np.asarray(run.state[i]) for i in state_layout.first],
        )

    def settled(self) -> RankState:
        """This state at the start of a round: without records and halt."""
        return replace(self, records=[], halt=None)


StepRates: TypeAlias = "tuple[float | None, ...]"
"""The learning rate of each parameter group in a step; None: it rests, weights and slots stay."""


@dataclass(frozen=True)
class RoundPlan:
    """The steps of one round.

    Attributes:
        first_step: finished steps before the round.
        learning_rates: for each step of the round, those of the parameter groups.
        stop: called on every rank after each step with (finished steps, loss of the step); true
            ends the round there. Must be a pure function, and pickle.
    """

    first_step: int
    learning_rates: tuple[StepRates, ...]
    stop: Callable[[int, float], bool] | None = None

    @property
    def num_steps(self) -> int:
        """Steps of the round, if nothing stops it."""
        return len(self.learning_rates)


@dataclass(frozen=True)
class RoundResult:
    """A new commit and what happened on the way.

    Attributes:
        commit: the engine's own handle of the state after the last of `records`. None if a sum of
            finite gradients overflowed: only its owner can see that, when others have gone on.
        records: one per finished step.
        halt: why it ended early, if it did.
        seconds: of the whole round, as the driver saw it.
        fixed_s: what a round costs however many steps it takes, where the engine knows.
    """

    commit: Any
    records: tuple[StepRecord, ...]
    halt: Halt | None
    seconds: float
    fixed_s: float = 0.0


class SlotsChanged(Exception):
    """Training should go on with another number of ranks; no error, and for no user to see.

    Attributes:
        num_ranks: that there are slots for.
    """

    def __init__(self, num_ranks: int):
        super().__init__(num_ranks)
        self.num_ranks = num_ranks


class Engine(ABC):
    """How shards travel. See the module's docstring for who calls what."""

    name: str
    most_steps: int | None = None
    """Steps that a round may have at most; None: any number."""

    @abstractmethod
    def start(self, run: Run, make_state: Callable[[Run, int], RankState]) -> Any:
        """The first commit.

        Args:
            run: what never changes.
            make_state: called as `make_state(run, rank)` once per rank, where the rank lives; must
                pickle.
        """

    @abstractmethod
    def round(
        self, commit: Any, plan: RoundPlan, tell: Callable[[StepRecord], None] | None = None
    ) -> RoundResult:
        """Takes the steps of a plan from a commit.

        Args:
            commit: the newest.
            plan: the steps.
            tell: called with the records of some steps while the round runs, by an engine that
                hears of them then; in any thread, in the order of the steps.

        Raises:
            KeyboardInterrupt: the user interrupted, and the round could not end in a commit soon;
                else it does, with a halt of that kind.
        """

    @abstractmethod
    def map_states(self, commit: Any, function: Callable[[Run, RankState], Any]) -> list[Any]:
        """`function(run, state)` of every rank's state, called where it lies.

        Returns:
            The results by rank; they come to the driver, so keep them small.
        """

    @abstractmethod
    def collect(
        self, commit: Any, select: Callable[[Run, RankState], RankState]
    ) -> Iterator[RankState]:
        """Brings the ranks' states to the driver, by rank, one at a time.

        Args:
            commit: whose states.
            select: called where a state lies; makes it what is worth the way (without slots, say).
        """

    @abstractmethod
    def evaluate(
        self,
        commit: Any,
        evaluation: Evaluation,
        handles: Any,
        mapping: PureGraph | None,
        batch_rows: int,
    ) -> list[np.ndarray]:
        """The accumulators of an evaluation over a data set, merged over ranks.

        Args:
            commit: whose weights and model state are evaluated.
            evaluation: the metrics.
            handles: the materialised data set.
            mapping: the data set's map over batches, or None.
            batch_rows: rows of one call.

        Raises:
            StoreLostError: of one of `handles`; the next call rebuilds it.
        """

    @abstractmethod
    def rebuild(self) -> None:
        """Materialises the training set anew, after a `StoreLostError`; rows and order stay."""

    @abstractmethod
    def close(self) -> None:
        """Frees what the engine holds; the commits are gone afterwards."""


@dataclass(frozen=True)
class Outcome:
    """What all ranks together say of a round."""

    consistent: bool
    halt: Halt | None
    records: tuple[StepRecord, ...]


def merge_outcomes(ranks: Sequence[tuple[int, Halt | None, tuple[StepRecord, ...]]]) -> Outcome:
    """The outcome of a round from every rank's (finished steps, halt, records)."""
    steps = {step for step, _, _ in ranks}
    halts = [halt for _, halt, _ in ranks if halt]
    records = min((records for _, _, records in ranks), key=len)
    return Outcome(len(steps) == 1, halts[0] if halts else None, records)


def merge_accumulators(
    evaluation: Evaluation, parts: Sequence[Sequence[np.ndarray]]
) -> list[np.ndarray]:
    """Accumulators of several ranks as one: what each added to the initial value, summed."""
    merged = [
        np.array(value, dtype=info.dtype)
        for info, value in zip(evaluation.accumulators, evaluation.initial, strict=True)
    ]
    for part in parts:
        for index, value in enumerate(part):
            merged[index] = merged[index] + (value - evaluation.initial[index])
    return merged
