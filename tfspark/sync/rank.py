"""The arithmetic of one rank in one step, without Spark, sockets or files.

A step has three phases: `contribute` (the gradient of this rank's rows), `reduce` (the sum of one
slice over all ranks, in rank order) and `apply` (the optimizer on the shard). Between them the
engine moves messages. Where an update needs sums over whole tensors (`Run.sums`), each rank makes
its part of them (`tensor_sums`) before `apply`. Every engine runs this code, so all of them give
the same bits.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from tfspark._aligned import aligned_empty
from tfspark.data.batches import BatchReader
from tfspark.data.order import BatchOrder
from tfspark.errors import TrainingError
from tfspark.graph.clipping import scales, tensor_squared_norms
from tfspark.graph.program import Evaluation
from tfspark.graph.sums import at_elements, tensor_sums
from tfspark.graphdef.loader import (
    HandOver,
    Loaded,
    array_of,
    load,
    load_in_parts,
    op_error,
)
from tfspark.sync.engine import Halt, RankState, Run, StepRates, StepRecord
from tfspark.sync.frames import Message
from tfspark.sync.messages import Contribution, halt_from

_MOST_GRAPHS = 4  # each may take half a second to trace
_STEPS_TO_LOOK_AT = 8  # shares of a batch repeat, give or take a row

# The golden ratio in 64 bits: multiples of it are spread evenly, so ranks draw unrelated numbers.
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass
class Replica:
    """The whole weights and model state, as every rank needs them for its gradient."""

    flat: np.ndarray  # [P]
    state: list[np.ndarray]


@dataclass
class Reduced:
    """One slice of a step, summed over ranks.

    Attributes:
        rows: of the global batch, without those of ranks that were left out.
        loss_sum: over all ranks.
        gradient: `[shard_size]`, the sum of the slices.
        mean: float64 `[slice_size]`, the merged model state of this slice.
        first: handed-on model state.
        halt: found by any rank.
        seconds: by phase, the slowest rank's.
        left_out: ranks whose rows are not in the sums.
        is_finite: whether every element of `gradient` is a finite number.
        culprit: where one is not, the first rank with such a number in its own part; None where the
            sum of finite parts overflowed.
    """

    rows: int
    loss_sum: float
    gradient: np.ndarray
    mean: np.ndarray
    first: list[np.ndarray]
    halt: Halt | None
    seconds: dict[str, float]
    left_out: tuple[int, ...]
    is_finite: bool
    culprit: int | None


class RankProgram:
    """A run's programs, loaded in this process.

    Rebuildable at any time from the run, so a worker may cache it and lose it.
    """

    def __init__(self, run: Run):
        self.run = run
        # Gradients come one bucket after the other, or all at once.
        every = (range(len(run.program.weights)),)
        tensors = run.layout.bucket_tensors() if run.exchanges_early else every
        self._places = [run.layout.place_of(each) for each in tensors]
        self._pieces = [range(1 + each.start, 1 + each.stop) for each in tensors]  # after the loss
        self._gradients: dict[str, Loaded] = {}  # by fingerprint
        self._gradient_for(next(iter(run.program.exact_graphs), 0))  # the most used
        self._updates = [load(update.graph, jit_compile=True) for update in run.updates]
        self._terms = [
            load(update.terms, jit_compile=True) if update.terms else None for update in run.updates
        ]
        self.has_stepped = False  # or the next step has to compile

    def _gradient_for(self, rows: int) -> Loaded:
        """The gradient of so many rows."""
        graph = self.run.program.graph_for(rows)
        if graph.fingerprint not in self._gradients:
            self._gradients[graph.fingerprint] = load_in_parts(graph, self._pieces)
        return self._gradients[graph.fingerprint]

    def replica(
        self, messages: Sequence[Message], flat: np.ndarray | None = None, *, exact: bool = False
    ) -> Replica:
        """Weights and model state from the "shard" messages of all ranks.

        Args:
            messages: by rank.
            flat: the weights `[P]`, where they have been joined already.
            exact: do not round what came in full precision, such as what stayed here.
        """
        run = self.run
        if flat is None:
            shards = [message.arrays["shard"] for message in messages]
            if not exact:
                shards = [self._as_sent(shard) for shard in shards]
            flat = run.layout.join(shards)
        vector = np.concatenate([message.arrays["mean"] for message in messages])
        count = len(run.state_layout.first)
        first = [messages[0].arrays[f"first{i}"] for i in range(count)]
        return Replica(
            flat=flat,
            state=run.state_layout.assemble(run.state, vector, first),
        )

    def _as_sent(self, shard: np.ndarray) -> np.ndarray:
        compression = self.run.compression
        sent = shard if shard.dtype == compression.dtype else compression.weights(shard)
        return compression.restored(sent)

    def contribute(
        self,
        rank: int,
        step: int,
        replica: Replica,
        reader: BatchReader,
        next_step: int | None = None,
        into: np.ndarray | None = None,
        check_gradient: bool = True,
        on_bucket: Callable[[int], None] | None = None,
    ) -> Contribution:
        """The gradient of this rank's rows of a step.

        Args:
            rank: whose.
            step: counted from 0.
            replica: weights and model state before the step.
            reader: of the rank's rows.
            next_step: whose rows to read in the background meanwhile.
            into: `[P]`, where the gradient is to lie; None: anywhere.
            check_gradient: halt where it is not finite. It costs a pass over the gradient; whoever
                sums slices sees it too, but only in his own.
            on_bucket: called with the index of each bucket of the layout once the gradients of its
                tensors (`Layout.bucket_tensors`) lie in `into`, while others are computed.
        """
        run = self.run
        _, step_in_epoch = run.order.locate(step)
        rows_by_rank = run.order.rank_rows(step_in_epoch)
        rows, global_rows = rows_by_rank[rank], sum(rows_by_rank)
        if rows == 0:
            return Contribution(rank)
        started = time.perf_counter()
        batch, _ = reader.read(step)
        if next_step is not None:
            reader.prefetch(next_step)
        read = time.perf_counter()
        bounds = _part_bounds(rows, run.accumulation_steps)
        parts = len(bounds) - 1
        gradient = aligned_empty(run.layout.size, run.layout.dtype) if into is None else into
        loss_sum, state = 0.0, replica.state
        for part in range(parts):
            low, high = bounds[part], bounds[part + 1]
            hand_over = partial(
                self._lay, gradient, part > 0, on_bucket if part + 1 == parts else None
            )
            with _batch_errors(rank=rank, step=step + 1):
                part_loss, state = self._call(
                    hand_over,
                    rank,
                    step * run.accumulation_steps + part,
                    replica.flat,
                    state,
                    [batch[i][low:high] if parts > 1 else batch[i] for i in run.program.batch],
                    int(high - low),
                    global_rows,
                )
            loss_sum += part_loss
        state = run.state_layout.scaled_sums(replica.state, state, global_rows / rows)
        done = time.perf_counter()
        leader = next(r for r, count in enumerate(rows_by_rank) if count)
        return Contribution(
            rank=rank,
            rows=rows,
            loss_sum=loss_sum,
            gradient=gradient,
            mean=run.state_layout.pack(state) * rows,
            first=[state[i] for i in run.state_layout.first],
            leads=rank == leader,
            halt=_non_finite(rank, step, loss_sum, gradient if check_gradient else None),
            seconds={"data": read - started, "gradient": done - read},
        )

    def _lay(
        self,
        gradient: np.ndarray,
        adds: bool,
        on_bucket: Callable[[int], None] | None,
        bucket: int,
        pieces: list[np.ndarray],
    ) -> None:
        """Takes the pieces of a gradient that have been computed together."""
        into = gradient[self._places[bucket]]
        if adds:
            into += np.concatenate(pieces)
        else:
            np.concatenate(pieces, out=into)
        if on_bucket is not None:
            on_bucket(bucket)

    def _call(
        self,
        hand_over: HandOver,
        rank: int,
        seed_step: int,
        flat: np.ndarray,
        state: Sequence[np.ndarray],
        batch: Sequence[Any],
        rows: int,
        global_rows: int,
    ) -> tuple[float, list[np.ndarray]]:
        """The loss and the new model state."""
        run = self.run
        shifted = [
            _shift_seed(value, rank) if slot.kind == "seed" else value
            for slot, value in zip(run.program.state, state, strict=True)
        ]
        seed = np.array([run.seed + rank * _GOLDEN, seed_step], object) & (2**64 - 1)
        loss, *outputs = self._gradient_for(rows)(
            hand_over,
            flat,
            *shifted,
            *batch,
            np.int64(rows),
            np.int64(global_rows),
            seed.astype(np.uint64).view(np.int64),
        )
        new_state = [
            _shift_seed(value, -rank) if slot.kind == "seed" else value
            for slot, value in zip(
                run.program.state, (output.numpy() for output in outputs), strict=True
            )
        ]
        return float(loss), new_state

    def reduce(self, parts: Sequence[Message], into: np.ndarray | None = None) -> Reduced:
        """Sums the "gradient" messages of all ranks for one slice.

        The order of the sum is the order of the ranks: that makes a run repeatable bit for bit.

        Args:
            parts: by rank.
            into: `[shard_size]`, where the sum is to lie; None: anywhere.
        """
        layout, state_layout = self.run.layout, self.run.state_layout
        compression, gradients = self.run.compression, []
        mean = np.zeros(state_layout.slice_size, np.float64)
        sources: list[int] = []
        rows, loss_sum, first, halt = 0, 0.0, [], None
        seconds: dict[str, float] = {}
        for message in parts:
            meta = message.meta
            rows += meta["rows"]
            loss_sum += meta["loss_sum"]
            halt = halt or halt_from(meta["halt"])
            for phase, value in meta["seconds"].items():
                seconds[phase] = max(seconds.get(phase, 0.0), value)
            if "gradient" in message.arrays:
                gradients.append(compression.restored(message.arrays["gradient"]))
                sources.append(message.source)
                mean += message.arrays["mean"]
            if "first0" in message.arrays:
                first = [message.arrays[f"first{i}"] for i in range(len(state_layout.first))]
        gradient = aligned_empty(layout.shard_size, layout.dtype) if into is None else into
        rank_ordered_sum(gradients, gradient)
        if compression.gradient_scale != 1.0:
            gradient *= compression.gradient_scale
        is_finite, culprit = _all_finite(gradient), None
        if not is_finite:
            each = zip(sources, gradients, strict=True)
            culprit = next((source for source, part in each if not _all_finite(part)), None)
        return Reduced(
            rows=rows,
            loss_sum=loss_sum,
            gradient=gradient,
            mean=mean / max(rows, 1),
            first=first,
            halt=halt,
            seconds=seconds,
            left_out=tuple(message.source for message in parts if message.meta["left_out"]),
            is_finite=is_finite,
            culprit=culprit,
        )

    def tensor_sums(
        self,
        kind: str,
        state: RankState,
        reduced: Reduced,
        learning_rates: StepRates,
        sums: Mapping[str, np.ndarray],
    ) -> np.ndarray:
        """This rank's part of one kind of sums over whole tensors, which the engine adds up.

        Args:
            kind: of `Run.sums`.
            state: of this rank, before the step.
            reduced: this rank's slice of the sums of gradients.
            learning_rates: per group; None: it rests in this step.
            sums: over all ranks, of the kinds before this one.

        Returns:
            float64: `[tensors]` for "clipping"; for "rule" `[sums of the rule, tensors]`, with the
            rows of the rule that has most.
        """
        layout, updates = self.run.layout, self.run.updates
        num_tensors = len(layout.weights)
        if kind == "clipping":
            gradient = reduced.gradient / reduced.rows
            for group, rate in enumerate(learning_rates):
                if rate is None:
                    gradient[layout.group_slice(group)] = 0
            return tensor_squared_norms(gradient, layout.segments(state.rank), num_tensors)
        total = np.zeros((max(update.num_sums for update in updates), num_tensors))
        for group, terms in enumerate(self._terms):
            if terms is not None and learning_rates[group] is not None:
                outputs = terms(*self._inputs(group, state, reduced, learning_rates, sums))
                total[: len(outputs)] += tensor_sums(
                    [array_of(output) for output in outputs],
                    layout.group_segments(state.rank, group),
                    num_tensors,
                )
        return total

    def apply(
        self,
        state: RankState,
        reduced: Reduced,
        learning_rates: StepRates,
        sums: Mapping[str, np.ndarray],
        stop: Callable[[int, float], bool] | None = None,
    ) -> RankState:
        """The state after the optimizer's step on this rank's shard.

        Args:
            state: of this rank, before the step.
            reduced: this rank's slice of the sums.
            learning_rates: per group; None: it rests in this step, its weights and slots stay.
            sums: over whole tensors and all ranks, of every kind in `Run.sums`; none after a halt.
            stop: see `RoundPlan`; every rank gets the same answer, so all halt together.
        """
        halt = state.halt or reduced.halt or _non_finite_sum(state, reduced)
        if halt:
            return replace(state, halt=halt)
        self.has_stepped = True
        started = time.perf_counter()
        shards, slots = [], []
        for group, update in enumerate(self._updates):
            if learning_rates[group] is None:
                shards.append(state.shard[self.run.layout.group_slice(group)])
                slots.append(state.slots[group])
                continue
            outputs = update(
                *self._inputs(group, state, reduced, learning_rates, sums),
                *self._rule_sums(group, state.rank, sums),
            )
            shards.append(array_of(outputs[0]))
            slots.append([array_of(output) for output in outputs[1:]])
        seconds = {**reduced.seconds, "update": time.perf_counter() - started}
        record = StepRecord(
            step=state.step + 1,
            loss=reduced.loss_sum / reduced.rows,
            rows=reduced.rows,
            seconds=seconds,
            left_out=reduced.left_out,
        )
        return RankState(
            rank=state.rank,
            step=state.step + 1,
            shard=shards[0] if len(shards) == 1 else np.concatenate(shards),
            slots=slots,
            mean=reduced.mean,
            first=reduced.first,
            records=[*state.records, record],
            halt=Halt("stop", record.step) if stop and stop(record.step, record.loss) else None,
        )

    def _inputs(
        self,
        group: int,
        state: RankState,
        reduced: Reduced,
        learning_rates: StepRates,
        sums: Mapping[str, np.ndarray],
    ) -> list[Any]:
        """Inputs 1 to 6 of a group's `UpdateProgram`."""
        part = self.run.layout.group_slice(group)
        return [
            state.shard[part],
            reduced.gradient[part],
            np.float64(reduced.rows),
            self._scale(state.rank, group, sums.get("clipping")),
            np.float32(learning_rates[group]),
            *state.slots[group],
        ]

    def _rule_sums(self, group: int, rank: int, sums: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Inputs 7 of a group's `UpdateProgram`."""
        layout, count = self.run.layout, self.run.updates[group].num_sums
        if not count:
            return []
        return at_elements(
            sums["rule"][:count],
            layout.group_segments(rank, group),
            layout.slice_sizes[group],
            layout.dtype,
        )

    def _scale(self, rank: int, group: int, squared_norms: np.ndarray | None) -> np.ndarray:
        """The factor of clipping by norm for a group's slice: `[]`, or one per element."""
        run, layout = self.run, self.run.layout
        factor = 1.0
        if squared_norms is not None and run.clip_norm is not None:
            # tf.clip_by_global_norm over all groups; what follows sees the clipped gradient.
            factor = run.clip_norm / max(float(np.sqrt(squared_norms.sum())), run.clip_norm)
            squared_norms = squared_norms * factor**2
        if squared_norms is None or not run.clippings[group].needs_norms:
            return np.asarray(factor, layout.dtype)
        per_element = scales(
            run.clippings[group],
            squared_norms,
            layout.segments(rank),
            [weight.group == group for weight in run.program.weights],
            layout.shard_size,
        )
        return (factor * per_element[layout.group_slice(group)]).astype(layout.dtype)

    def evaluate(self, evaluation: Evaluation, replica: Replica, batches: Any) -> list[np.ndarray]:
        """The accumulators after all batches of this rank."""
        call = load(evaluation.graph)
        accumulators: list[Any] = list(evaluation.initial)
        for batch, _ in batches:
            with _batch_errors():
                accumulators = call(
                    replica.flat,
                    *replica.state,
                    *[batch[i] for i in evaluation.batch],
                    *accumulators,
                )
        return [np.asarray(value) for value in accumulators]


def common_rows(order: BatchOrder, accumulation_steps: int) -> list[int]:
    """How many rows a call of the gradient has in a third of the steps or more, by frequency.

    At most four numbers.
    """
    counts: Counter[int] = Counter()  # of steps
    steps = min(order.steps_per_epoch, _STEPS_TO_LOOK_AT)
    for step in range(steps):
        parts = [np.diff(_part_bounds(rows, accumulation_steps)) for rows in order.rank_rows(step)]
        counts.update(set(np.concatenate(parts).tolist()))
    del counts[0]
    return [rows for rows, often in counts.most_common(_MOST_GRAPHS) if 3 * often >= steps]


def _part_bounds(rows: int, accumulation_steps: int) -> np.ndarray:
    """Where the parts begin that a rank computes its rows in, and where the last one ends."""
    return np.linspace(0, rows, min(accumulation_steps, max(rows, 1)) + 1).astype(int)


@contextmanager
def _batch_errors(**where: int) -> Iterator[None]:
    """Around a graph that the user's rows go through: says what an operation complained of."""
    try:
        yield
    except tf.errors.OpError as error:
        raise TrainingError(
            f"A model must be able to compute every batch. Received: {op_error(error)}. Look at "
            "the rows of this batch: labels out of range and ids beyond an embedding are the "
            "usual ones.",
            **where,
        ) from error


_PROGRAMS: OrderedDict[str, RankProgram] = OrderedDict()
_MOST_PROGRAMS = 4


def rank_program(run: Run) -> RankProgram:
    """The loaded programs of a run, cached in this process."""
    program = _PROGRAMS.get(run.run_id)
    if program is None:
        program = _PROGRAMS[run.run_id] = RankProgram(run)
        while len(_PROGRAMS) > _MOST_PROGRAMS:
            _PROGRAMS.popitem(last=False)
    return program


def _non_finite(rank: int, step: int, loss_sum: float, gradient: np.ndarray | None) -> Halt | None:
    if not np.isfinite(loss_sum):
        return Halt("non_finite", step + 1, rank, "loss")
    if gradient is not None and not _all_finite(gradient):
        return Halt("non_finite", step + 1, rank, "gradient")
    return None


def _non_finite_sum(state: RankState, reduced: Reduced) -> Halt | None:
    """What only the owner of a slice sees."""
    if reduced.is_finite:
        return None
    if reduced.culprit is not None:
        return Halt("non_finite", state.step + 1, reduced.culprit, "gradient")
    return Halt("non_finite", state.step + 1, state.rank, "sum of gradients")


def rank_ordered_sum(parts: Sequence[np.ndarray], total: np.ndarray) -> None:
    """Makes `total` the sum of vectors, added in the order given; zeros if there are none."""
    if len(parts) < 2:
        total[:] = parts[0] if parts else 0
        return
    with np.errstate(over="ignore"):  # a sum that is not finite is found, and named, later
        np.add(parts[0], parts[1], out=total)
        for part in parts[2:]:
            total += part


def _all_finite(values: np.ndarray) -> bool:
    # The cheapest pass over memory: a sum of squares is finite only if every term is. It may also
    # overflow; then every element is looked at.
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.dot(values, values)) or np.isfinite(values).all())


def _shift_seed(value: np.ndarray, shift: int) -> np.ndarray:
    shifted = np.array(value)
    if shift:
        mask = 2 ** (8 * shifted.itemsize) - 1
        unsigned = shifted.reshape(-1).view(f"u{shifted.itemsize}")
        unsigned[0] = (int(unsigned[0]) + shift) & mask
    return shifted
