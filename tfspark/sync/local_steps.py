"""Local SGD: a rank of a gang that takes several steps alone, then averages with all others.

```
shards of a commit ──► every rank gathers all of them: weights, optimizer slots, model state
                        │ τ steps, each on its own rows of the global batch   `RankProgram`
                        ▼
rank j: the average of slice j over ranks, weighted by rows ──► shards again
```

So a period of τ steps starts and ends with what a commit holds. Which steps end one depends on
the numbers of the steps alone, never on how long they take: see `periods`.

The method: Stich, "Local SGD converges fast and communicates little" (ICLR 2019); weights by rows
as in McMahan et al., "Communication-efficient learning of deep networks from decentralized data"
(AISTATS 2017). Optimizer slots are averaged like weights, as Yu et al. do with momentum ("On the
linear speedup analysis of communication efficient momentum SGD", ICML 2019).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from tfspark._aligned import aligned_empty
from tfspark.data.batches import BatchReader
from tfspark.sync.engine import Halt, RankState, RoundPlan, Run, StepRates, StepRecord
from tfspark.sync.frames import Message
from tfspark.sync.gang_rank import GangRank, Patience
from tfspark.sync.links import Links
from tfspark.sync.messages import Contribution, shard_message
from tfspark.sync.rank import RankProgram, Reduced, rank_program


def periods(first_step: int, num_steps: int, average_every: int) -> Iterator[range]:
    """The steps between averages, counted from 0: up to each multiple of τ, and up to the end.

    Example:
        >>> list(periods(2, 6, average_every=3))
        [range(2, 3), range(3, 6), range(6, 8)]
    """
    start, end = first_step, first_step + num_steps
    while start < end:
        stop = min(start - start % average_every + average_every, end)
        yield range(start, stop)
        start = stop


def patience_with(average_every: int, longest_s: float | None) -> Patience:
    """With ranks that take so many steps between two exchanges.

    Args:
        average_every: τ.
        longest_s: the longest time between two exchanges so far, where it is known.
    """
    patience = Patience(longest_s)
    # The first step of all compiles; of the others nothing is known yet.
    return replace(patience, first_s=patience.first_s + (average_every - 1) * patience.least_s)


def weighted_mean(parts: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
    """`sum(rows * vector) / sum(rows)` over (rows, vector), float64, summed in the order given.

    Example:
        >>> weighted_mean([(1, np.float32([1, 5])), (3, np.float32([3, 5]))])
        array([2.5, 5. ])
    """
    first = parts[0][1].astype(np.float64)
    total = np.zeros_like(first)
    for rows, vector in parts[1:]:
        # Of differences, so that what no rank has changed stays as it is, bit for bit.
        total += rows * (vector - first)
    return first + total / sum(rows for rows, _ in parts)


def alone(run: Run) -> Run:
    """A run as a rank sees it between averages: its shard is the whole flat vector."""
    return replace(run, run_id=f"{run.run_id}/alone", num_ranks=1)


@dataclass
class _Period:
    """What a rank did between two averages.

    Attributes:
        state: after it; of `alone(run)`, so its rank is 0.
        steps: what the rank adds to the record of each step: rows, loss_sum, seconds.
        halt: why it has not taken all of them.
    """

    state: RankState
    steps: list[dict[str, Any]] = field(default_factory=list)
    halt: Halt | None = None

    @property
    def rows(self) -> int:
        """Rows that the rank has used: its weight in the average."""
        return sum(step["rows"] for step in self.steps)

    @property
    def taken(self) -> int:
        """Steps that the rank has taken: those in which it had rows."""
        return sum(step["rows"] > 0 for step in self.steps)


class LocalRank(GangRank):
    """One rank of a gang during one round of local steps.

    A rank that has no rows in a step does not take it. All ranks see the losses of a period, and
    with them whether to stop, at its end. What goes home from a period in which something was not
    finite is the state before it.

    Scalar slots ("iteration") and the model state that is handed on, which no average makes sense
    of, are those of the rank that took most steps in the period, the lowest of several.

    Args:
        program: of the run.
        reader, links, patience: as for `GangRank`; patience is with a whole period.
    """

    def __init__(self, program: RankProgram, reader: BatchReader, links: Links, patience: Patience):
        super().__init__(rank_program(alone(program.run)), reader, links, patience)
        self._run = run = program.run
        self._sizes = _sizes(self._program.run)
        self._slices = _sizes(run)
        # Padded, because shards are: rank `r` fills slice `r`.
        self._gathered = {
            name: aligned_empty(run.num_ranks * size, dtype)
            for name, (size, dtype) in self._slices.items()
        }

    def take_steps(self, state: RankState, plan: RoundPlan) -> RankState:
        """The state after the steps of a plan, or after the period that halted."""
        self._begin(state.step)
        last = plan.first_step + plan.num_steps - 1
        for steps in periods(plan.first_step, plan.num_steps, self._run.average_every):
            started = time.perf_counter()
            period = self._take(state, steps, plan, last)
            state = self._average(state, steps, period, plan)
            if state.halt and state.halt.kind == "non_finite":
                break
            took = time.perf_counter() - started
            self._patience.saw(took)
            self._compiling = False
            state.records[-len(steps) :] = _with_exchange(state.records[-len(steps) :], took)
            if self.tell:
                self.tell(state.records[-1])
            if state.halt:
                break
        return state

    def _take(self, state: RankState, steps: range, plan: RoundPlan, last: int) -> _Period:
        """The steps of a period on this rank's rows, from the weights of all ranks."""
        program = self._program
        period = _Period(self._gather(state))
        for step in steps:
            whole = period.state
            contribution = program.contribute(
                state.rank,
                step,
                program.replica([shard_message(whole)], whole.shard),
                self._reader,
                None if step == last else step + 1,
            )
            if contribution.gradient is None:  # no rows
                period.state = replace(whole, step=step + 1)
            else:
                rates = plan.learning_rates[step - plan.first_step]
                period.state = self._update(whole, contribution, rates)
                period.halt = period.state.halt
            if period.halt:
                break
            seconds = period.state.records[-1].seconds if contribution.rows else {}
            period.steps.append(
                {
                    "rows": contribution.rows,
                    "loss_sum": contribution.loss_sum,
                    "seconds": seconds,
                }
            )
        return period

    def _update(self, whole: RankState, contribution: Contribution, rates: StepRates) -> RankState:
        """The state after a step that no other rank takes part in."""
        assert contribution.gradient is not None and contribution.mean is not None
        program = self._program
        reduced = Reduced(
            rows=contribution.rows,
            loss_sum=contribution.loss_sum,
            gradient=contribution.gradient,
            mean=contribution.mean / contribution.rows,
            first=contribution.first,
            halt=contribution.halt,
            seconds=contribution.seconds,
            left_out=(),
            is_finite=True,  # or its halt says so
            culprit=None,
        )
        sums: dict[str, np.ndarray] = {}
        for kind in () if reduced.halt else program.run.sums:
            sums[kind] = program.tensor_sums(kind, whole, reduced, rates, sums)
        return program.apply(whole, reduced, rates, sums)

    def _gather(self, state: RankState) -> RankState:
        """The states of all ranks as the one of a single rank."""
        own = _vectors(self._run, state)

        def part(rank: int, name: str) -> np.ndarray:
            size, _ = self._slices[name]
            return self._gathered[name][rank * size : (rank + 1) * size]

        for name, vector in own.items():
            part(state.rank, name)[:] = vector
        self._all_to_all(
            Message("local", state.rank, {}, own),
            "weights",
            state.step,
            lambda source, kind, name, *_: part(source, name),
        )
        whole = {name: self._gathered[name][:size] for name, (size, _) in self._sizes.items()}
        return _with_vectors(replace(state, rank=0, records=[]), whole)

    def _average(
        self, before: RankState, steps: range, period: _Period, plan: RoundPlan
    ) -> RankState:
        """The state of this rank's shard after a period; that before it, if a rank halted."""
        rank = before.rank
        asks_to_end = bool(self.interrupted and self.interrupted())
        outgoing = {
            owner: self._message(rank, period, owner, asks_to_end)
            for owner in range(self._run.num_ranks)
        }
        own = outgoing.pop(rank)
        received = {**self._exchange(outgoing, "average", steps[-1]), rank: own}
        parts = [received[source] for source in range(self._run.num_ranks)]
        halts = [Halt(**part.meta["halt"]) for part in parts if part.meta["halt"]]
        if halts:
            return replace(before, halt=min(halts, key=lambda halt: halt.step))
        records = _records(steps, [part.meta["steps"] for part in parts])
        newest = records[-1]
        halt = None
        if plan.stop and plan.stop(newest.step, newest.loss):
            halt = Halt("stop", newest.step)
        elif any(part.meta["interrupt"] for part in parts):
            halt = Halt("interrupt", newest.step)
        leader = max(parts, key=lambda part: part.meta["taken"])  # the first of several
        after = _with_vectors(_with_scalars(before, leader.arrays), self._averages(parts))
        return replace(after, step=newest.step, records=[*before.records, *records], halt=halt)

    def _message(self, rank: int, period: _Period, owner: int, asks_to_end: bool) -> Message:
        """What this rank tells the owner of a slice after a period."""
        arrays: dict[str, np.ndarray] = {}
        if period.rows and not period.halt:
            for name, vector in _vectors(self._program.run, period.state).items():
                size, _ = self._slices[name]
                arrays[name] = vector[owner * size : (owner + 1) * size]
            arrays.update(_scalars(period.state))
        meta = {
            "rows": period.rows,
            "taken": period.taken,
            "steps": period.steps,
            "halt": asdict(period.halt) if period.halt else None,
            "interrupt": asks_to_end,
        }
        return Message("average", rank, meta, arrays)

    def _averages(self, parts: Sequence[Message]) -> dict[str, np.ndarray]:
        """This rank's slice of everything, averaged and padded."""
        averages = {}
        for name, (size, dtype) in self._slices.items():
            given = [(part.meta["rows"], part.arrays[name]) for part in parts if part.meta["rows"]]
            averages[name] = np.zeros(size, dtype)
            averages[name][: given[0][1].size] = weighted_mean(given)
        return averages


def _sizes(run: Run) -> dict[str, tuple[int, str]]:
    """Elements and dtype of everything in `_vectors`, by name."""
    layout = run.layout
    sizes = {}
    for group, update in enumerate(run.updates):
        size = layout.slice_sizes[group]
        sizes[f"weights{group}"] = (size, layout.dtype)
        for i, slot in enumerate(update.slots):
            if slot.kind == "vector":
                sizes[f"slot{group}.{i}"] = (size, slot.dtype)
    return {**sizes, "mean": (run.state_layout.slice_size, "float64")}


def _vectors(run: Run, state: RankState) -> dict[str, np.ndarray]:
    """All of a state that is averaged, by name."""
    vectors = {}
    for group, slots in enumerate(state.slots):
        vectors[f"weights{group}"] = state.shard[run.layout.group_slice(group)]
        vectors.update({f"slot{group}.{i}": slot for i, slot in enumerate(slots) if slot.ndim})
    return {**vectors, "mean": state.mean}


def _with_vectors(state: RankState, vectors: Mapping[str, np.ndarray]) -> RankState:
    """A state with other content of `_vectors`, which may be of another number of ranks."""
    weights = [vectors[f"weights{group}"] for group in range(len(state.slots))]
    return replace(
        state,
        shard=weights[0] if len(weights) == 1 else np.concatenate(weights),
        slots=_slots(state, vectors),
        mean=vectors["mean"],
    )


def _scalars(state: RankState) -> dict[str, np.ndarray]:
    """All of a state that is the same on all ranks after an average, by name."""
    scalars = {
        f"slot{group}.{i}": slot
        for group, slots in enumerate(state.slots)
        for i, slot in enumerate(slots)
        if not slot.ndim
    }
    return {**scalars, **{f"first{i}": value for i, value in enumerate(state.first)}}


def _with_scalars(state: RankState, arrays: Mapping[str, np.ndarray]) -> RankState:
    """A state with other content of `_scalars`."""
    # Copies: what was received is good until the next exchange only.
    scalars = {name: np.array(arrays[name]) for name in _scalars(state)}
    first = [scalars[f"first{i}"] for i in range(len(state.first))]
    return replace(state, slots=_slots(state, scalars), first=first)


def _slots(state: RankState, arrays: Mapping[str, np.ndarray]) -> list[list[np.ndarray]]:
    return [
        [arrays.get(f"slot{group}.{i}", slot) for i, slot in enumerate(slots)]
        for group, slots in enumerate(state.slots)
    ]


def _records(steps: range, by_rank: Sequence[list[dict[str, Any]]]) -> list[StepRecord]:
    """The records of a period: the loss of a step is the mean over the rows of all ranks."""
    records = []
    for step, *parts in zip(steps, *by_rank, strict=True):
        seconds: dict[str, float] = {}
        for part in parts:
            for phase, value in part["seconds"].items():
                seconds[phase] = max(seconds.get(phase, 0.0), value)
        rows = sum(part["rows"] for part in parts)
        loss = sum(part["loss_sum"] for part in parts) / rows
        records.append(StepRecord(step + 1, loss, rows, seconds))
    return records


def _with_exchange(records: Sequence[StepRecord], took: float) -> list[StepRecord]:
    """Records of a period, with each its share of the time that went into no step."""
    in_steps = sum(sum(record.seconds.values()) for record in records)
    share = max(0.0, took - in_steps) / len(records)
    return [replace(record, seconds={**record.seconds, "exchange": share}) for record in records]
