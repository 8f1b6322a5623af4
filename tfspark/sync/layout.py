"""Which slice of the flat vector is which tensor, and which rank owns it.

Four words, with exactly one meaning each:

* *flat*: the vector `[P]` of all trainable weights, sorted by parameter group.
* *bucket*: a run of the flat vector that all ranks divide among themselves in equal slices. A
  parameter group is one bucket, or a few: a gradient may be exchanged bucket by bucket, while the
  rest of it is still computed.
* *shard* `r`: what rank `r` owns. For every bucket, slice `r` of that bucket padded with zeros to a
  multiple of the world size; the slices of all buckets one after the other. Every shard has the
  same number of elements, so one traced update serves every rank.
* *segment*: the part of one tensor that lies inside a shard in one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from tfspark._aligned import aligned_empty
from tfspark.errors import require
from tfspark.graph.program import StateSlot, Weight


@dataclass(frozen=True)
class Segment:
    """Elements `start:stop` of a shard belong to tensor `tensor` of the layout.

    Attributes:
        tensor: index into `Layout.weights`.
        start, stop: within the shard.
        offset: of the first of them, within the raveled tensor.
    """

    tensor: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Bucket:
    """Elements `start:stop` of the flat vector, divided among all ranks.

    Attributes:
        group: the parameter group that it is a part of.
        start, stop: within the flat vector.
        offset: where a rank's slice begins within its shard.
        size: elements of a slice, padding included.
    """

    group: int
    start: int
    stop: int
    offset: int
    size: int

    @property
    def part(self) -> slice:
        """Where a rank's slice lies within its shard."""
        return slice(self.offset, self.offset + self.size)

    def place(self, rank: int) -> slice:
        """Where a rank's slice, padding included, lies in a flat vector that is padded alike."""
        start = self.start + rank * self.size
        return slice(start, start + self.size)

    def owned(self, rank: int) -> tuple[int, int]:
        """The range of the flat vector, without padding, that a rank owns."""
        place = self.place(rank)
        return min(place.start, self.stop), min(place.stop, self.stop)


@dataclass(frozen=True)
class Layout:
    """The division of a flat vector among ranks.

    Attributes:
        weights: the tensors in flat order, sorted by group.
        num_ranks: N.
        dtype: of the flat vector.
        cuts: where buckets begin within the one parameter group, beside its start: ascending
            multiples of N, so that there is padding at the end of the flat vector only. With
            several groups there are none, and each group is a bucket.

    Example:
        >>> layout = Layout((Weight("w", (5,)),), num_ranks=2, dtype="float32")
        >>> [shard.tolist() for shard in layout.split(np.arange(5, dtype="float32"))]
        [[0.0, 1.0, 2.0], [3.0, 4.0, 0.0]]
        >>> layout = Layout((Weight("w", (5,)),), num_ranks=2, dtype="float32", cuts=(2,))
        >>> [shard.tolist() for shard in layout.split(np.arange(5, dtype="float32"))]
        [[0.0, 2.0, 3.0], [1.0, 4.0, 0.0]]
    """

    weights: tuple[Weight, ...]
    num_ranks: int
    dtype: str
    cuts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        bounds = (0, *self.cuts, self.size)
        require(
            not self.cuts
            or (
                self.num_groups == 1
                and all(low < high for low, high in pairwise(bounds))
                and not any(cut % self.num_ranks for cut in self.cuts)
            ),
            "cuts are ascending multiples of the number of ranks, inside the only group",
            cuts=self.cuts,
        )

    @cached_property
    def group_sizes(self) -> tuple[int, ...]:
        """Elements of each group, without padding."""
        sizes = [0] * (1 + max((weight.group for weight in self.weights), default=0))
        for weight in self.weights:
            sizes[weight.group] += weight.size
        return tuple(sizes)

    @cached_property
    def group_offsets(self) -> tuple[int, ...]:
        """Where each group starts in the flat vector."""
        return tuple(int(offset) for offset in np.cumsum((0, *self.group_sizes[:-1])))

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """In flat order."""
        found: list[Bucket] = []
        for group, (start, size) in enumerate(
            zip(self.group_offsets, self.group_sizes, strict=True)
        ):
            bounds = (start, *self.cuts, start + size)
            for low, high in pairwise(bounds):
                offset = found[-1].part.stop if found else 0
                found.append(Bucket(group, low, high, offset, -(-(high - low) // self.num_ranks)))
        return tuple(found)

    @cached_property
    def slice_sizes(self) -> tuple[int, ...]:
        """Elements of each group in one shard, padding included."""
        sizes = [0] * self.num_groups
        for bucket in self.buckets:
            sizes[bucket.group] += bucket.size
        return tuple(sizes)

    @property
    def size(self) -> int:
        """P, the elements of the flat vector."""
        return sum(self.group_sizes)

    @property
    def shard_size(self) -> int:
        """Elements of one shard, padding included."""
        return self.buckets[-1].part.stop

    @property
    def num_groups(self) -> int:
        """Number of parameter groups."""
        return len(self.group_sizes)

    @property
    def pads_at_end(self) -> bool:
        """Whether the padded slices of all ranks are the flat vector, with zeros at its end."""
        return self.num_groups == 1

    def group_slice(self, group: int) -> slice:
        """Where a group lies inside a shard."""
        start = sum(self.slice_sizes[:group])
        return slice(start, start + self.slice_sizes[group])

    def shard(self, flat: np.ndarray, rank: int, padding: float = 0.0) -> np.ndarray:
        """Shard `rank` `[shard_size]` of a flat vector; a view where it lies there in one piece.

        Args:
            flat: `[P]`, or longer with padding at its end.
            rank: whose.
            padding: what a slice is filled up with.
        """
        if len(self.buckets) == 1:
            place = self.buckets[0].place(rank)
            if place.stop <= len(flat):
                return flat[place]
        out = np.full(self.shard_size, padding, flat.dtype)
        for bucket in self.buckets:
            start, stop = bucket.owned(rank)
            out[bucket.offset : bucket.offset + stop - start] = flat[start:stop]
        return out

    def split(self, flat: np.ndarray) -> list[np.ndarray]:
        """All shards of a flat vector, by rank."""
        return [self.shard(flat, rank) for rank in range(self.num_ranks)]

    def join(self, shards: Sequence[np.ndarray]) -> np.ndarray:
        """The flat vector `[P]` of all shards, given by rank."""
        flat = aligned_empty(self.size, self.dtype)
        for rank, shard in enumerate(shards):
            for bucket in self.buckets:
                start, stop = bucket.owned(rank)
                flat[start:stop] = shard[bucket.offset : bucket.offset + stop - start]
        return flat

    @cached_property
    def _bounds(self) -> np.ndarray:
        """Where each tensor starts in the flat vector, and where the last one ends."""
        return np.cumsum([0, *(weight.size for weight in self.weights)])

    def tensors(self, flat: np.ndarray) -> list[np.ndarray]:
        """The weights as arrays of their shapes, in flat order; views of `flat`."""
        return [
            flat[start:stop].reshape(weight.shape)
            for weight, start, stop in zip(
                self.weights, self._bounds[:-1], self._bounds[1:], strict=True
            )
        ]

    def place_of(self, tensors: range) -> slice:
        """Where neighbouring tensors lie in the flat vector."""
        return slice(int(self._bounds[tensors.start]), int(self._bounds[tensors.stop]))

    def bucket_tensors(self) -> tuple[range, ...]:
        """The tensors whose last element lies in each bucket.

        Once the tensors of a bucket and of all buckets behind it are there, the bucket is.
        """
        starts = [bucket.start for bucket in self.buckets]
        lasts = np.maximum(self._bounds[1:] - 1, self._bounds[:-1])
        of_tensor = np.searchsorted(starts, lasts, "right") - 1
        bounds = np.searchsorted(of_tensor, range(len(starts) + 1))
        return tuple(range(int(low), int(high)) for low, high in pairwise(bounds))

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """The segments of a rank's shard, by position."""
        found = []
        for bucket in self.buckets:
            start, stop = bucket.owned(rank)
            base = bucket.offset - start
            first = int(np.searchsorted(self._bounds, start, "right")) - 1
            for tensor in range(first, len(self.weights)):
                begin, end = int(self._bounds[tensor]), int(self._bounds[tensor + 1])
                if begin >= stop:
                    break
                low, high = max(begin, start), min(end, stop)
                if low < high:
                    found.append(Segment(tensor, base + low, base + high, low - begin))
        return tuple(found)

    def group_segments(self, rank: int, group: int) -> tuple[Segment, ...]:
        """The segments of one group's slice of a shard, counted from the start of that slice."""
        before = self.group_slice(group).start
        return tuple(
            replace(segment, start=segment.start - before, stop=segment.stop - before)
            for segment in self.segments(rank)
            if self.weights[segment.tensor].group == group
        )


def bucket_cuts(weights: Sequence[Weight], num_ranks: int, count: int) -> tuple[int, ...]:
    """Cuts of a `Layout` that make buckets of whole tensors, of about the same size.

    A tensor is not divided, but for fewer elements than there are ranks: so there are fewer buckets
    where a few tensors are most of the model. The first bucket, whose gradient comes last, is no
    larger than the others.

    Args:
        weights: in flat order, of one group; of several: no cuts.
        num_ranks: N.
        count: how many buckets there are at most.
    """
    bounds = np.cumsum([0, *(weight.size for weight in weights)])
    total = int(bounds[-1])
    if any(weight.group for weight in weights):
        return ()
    cuts = set()
    for index in range(1, count):
        # Before the tensor that this share of all elements ends in.
        tensor = int(np.searchsorted(bounds, total * index / count, "right")) - 1
        cuts.add(-(-int(bounds[tensor]) // num_ranks) * num_ranks)
    return tuple(sorted(cut for cut in cuts if 0 < cut < total))


@dataclass(frozen=True)
class StateLayout:
    """How the model state travels: what is averaged, what is handed on, what never moves.

    The slots of kind `"mean"` and `"sum"` form one float64 vector, cut into equal slices like the
    weights, so that each rank merges one slice. `"first"` and `"seed"` slots are few and small, and
    are handed on whole. `"constant"` slots (frozen weights) stay with the run and never travel.
    """

    slots: tuple[StateSlot, ...]
    num_ranks: int

    @cached_property
    def mean(self) -> tuple[int, ...]:
        """Indices of the averaged slots; sums are averages of what `scaled_sums` makes of them."""
        return tuple(i for i, slot in enumerate(self.slots) if slot.kind in ("mean", "sum"))

    @cached_property
    def first(self) -> tuple[int, ...]:
        """Indices of the slots handed on by the first rank that had rows."""
        return tuple(i for i, slot in enumerate(self.slots) if slot.kind in ("first", "seed"))

    @cached_property
    def mean_size(self) -> int:
        """Elements of the averaged slots together."""
        return sum(int(np.prod(self.slots[i].shape)) for i in self.mean)

    @property
    def slice_size(self) -> int:
        """Elements of a rank's slice of the averaged slots, padding included."""
        return -(-self.mean_size // self.num_ranks)

    def pack(self, state: Sequence[np.ndarray]) -> np.ndarray:
        """The averaged slots as one padded float64 vector `[num_ranks * slice_size]`."""
        vector = np.zeros(self.num_ranks * self.slice_size, np.float64)
        begin = 0
        for index in self.mean:
            values = np.asarray(state[index])
            vector[begin : begin + values.size] = values.ravel()
            begin += values.size
        return vector

    def scaled_sums(
        self, before: Sequence[np.ndarray], after: Sequence[np.ndarray], factor: float
    ) -> list[np.ndarray]:
        """The state after a step with what was added to its sums multiplied by a factor.

        Averages are weighted by rows. With the rows of all ranks over those of this one as factor,
        the average is the sum.
        """
        return [
            old + (new - old) * factor if slot.kind == "sum" else new
            for slot, old, new in zip(self.slots, before, after, strict=True)
        ]

    def slice_of(self, vector: np.ndarray, rank: int) -> np.ndarray:
        """A rank's slice of a packed vector."""
        return vector[rank * self.slice_size : (rank + 1) * self.slice_size]

    def assemble(
        self,
        constants: Sequence[np.ndarray],
        vector: np.ndarray,
        first: Sequence[np.ndarray],
    ) -> list[np.ndarray]:
        """The whole model state from constants, the packed vector, and the slots handed on.

        Args:
            constants: the initial model state; only its `"constant"` slots are taken.
            vector: packed averages, as from `pack`.
            first: the slots of `first`, in order.
        """
        state = list(constants)
        begin = 0
        for index in self.mean:
            slot = self.slots[index]
            size = int(np.prod(slot.shape))
            state[index] = vector[begin : begin + size].astype(slot.dtype).reshape(slot.shape)
            begin += size
        for index, value in zip(self.first, first, strict=True):
            state[index] = value
        return state
