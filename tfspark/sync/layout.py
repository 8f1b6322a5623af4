"""Which slice of the flat vector is which tensor, and which rank owns it.

Three words, with exactly one meaning each:

* *flat*: the vector `[P]` of all trainable weights, sorted by parameter group.
* *shard* `r`: what rank `r` owns. For every group, slice `r` of that group padded with zeros to a
  multiple of the world size; the slices of all groups one after the other. Every shard has the
  same number of elements, so one traced update serves every rank.
* *segment*: the part of one tensor that lies inside a shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tfspark._aligned import aligned_empty
from tfspark.graph.program import StateSlot, Weight


@dataclass(frozen=True)
class Segment:
    """Elements `start:stop` of a shard belong to tensor `tensor` of the layout."""

    tensor: int
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """The division of a flat vector among ranks.

    Attributes:
        weights: the tensors in flat order, sorted by group.
        num_ranks: N.
        dtype: of the flat vector.

    Example:
        >>> layout = Layout((Weight("w", (5,)),), num_ranks=2, dtype="float32")
        >>> [shard.tolist() for shard in layout.split(np.arange(5, dtype="float32"))]
        [[0.0, 1.0, 2.0], [3.0, 4.0, 0.0]]
    """

    weights: tuple[Weight, ...]
    num_ranks: int
    dtype: str

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
    def slice_sizes(self) -> tuple[int, ...]:
        """Elements of each group in one shard, padding included."""
        return tuple(-(-size // self.num_ranks) for size in self.group_sizes)

    @cached_property
    def slice_offsets(self) -> tuple[int, ...]:
        """Where each group starts in a shard."""
        return tuple(int(offset) for offset in np.cumsum((0, *self.slice_sizes[:-1])))

    @property
    def size(self) -> int:
        """P, the elements of the flat vector."""
        return sum(self.group_sizes)

    @property
    def shard_size(self) -> int:
        """Elements of one shard, padding included."""
        return sum(self.slice_sizes)

    @property
    def num_groups(self) -> int:
        """Number of parameter groups."""
        return len(self.group_sizes)

    def group_slice(self, group: int) -> slice:
        """Where a group lies inside a shard."""
        start = self.slice_offsets[group]
        return slice(start, start + self.slice_sizes[group])

    def owned(self, group: int, rank: int) -> tuple[int, int]:
        """The range of the flat vector, without padding, that a rank owns of a group."""
        offset, size, step = (
            self.group_offsets[group],
            self.group_sizes[group],
            self.slice_sizes[group],
        )
        return offset + min(rank * step, size), offset + min((rank + 1) * step, size)

    def shard(self, flat: np.ndarray, rank: int) -> np.ndarray:
        """Shard `rank` `[shard_size]` of a flat vector; a view where there is no padding to add.

        Args:
            flat: `[P]`, or longer with zeros at its end.
            rank: whose.
        """
        if self.num_groups == 1:
            start, stop = rank * self.shard_size, (rank + 1) * self.shard_size
            if stop <= len(flat):
                return flat[start:stop]
        out = np.zeros(self.shard_size, flat.dtype)
        for group in range(self.num_groups):
            start, stop = self.owned(group, rank)
            begin = self.slice_offsets[group]
            out[begin : begin + stop - start] = flat[start:stop]
        return out

    def split(self, flat: np.ndarray) -> list[np.ndarray]:
        """All shards of a flat vector, by rank."""
        return [self.shard(flat, rank) for rank in range(self.num_ranks)]

    def join(self, shards: Sequence[np.ndarray]) -> np.ndarray:
        """The flat vector `[P]` of all shards, given by rank."""
        flat = aligned_empty(self.size, self.dtype)
        for rank, shard in enumerate(shards):
            for group in range(self.num_groups):
                start, stop = self.owned(group, rank)
                begin = self.slice_offsets[group]
                flat[start:stop] = shard[begin : begin + stop - start]
        return flat

    def tensors(self, flat: np.ndarray) -> list[np.ndarray]:
        """The weights as arrays of their shapes, in flat order; views of `flat`."""
        bounds = np.cumsum([0, *(weight.size for weight in self.weights)])
        return [
            flat[start:stop].reshape(weight.shape)
            for weight, start, stop in zip(self.weights, bounds[:-1], bounds[1:], strict=True)
        ]

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """The segments of a rank's shard, by position."""
        found = []
        begin = 0
        for tensor, weight in enumerate(self.weights):
            start, stop = self.owned(weight.group, rank)
            low, high = max(begin, start), min(begin + weight.size, stop)
            if low < high:
                base = self.slice_offsets[weight.group] - start
                found.append(Segment(tensor, base + low, base + high))
            begin += weight.size
        return tuple(found)

    def group_segments(self, rank: int, group: int) -> tuple[Segment, ...]:
        """The segments of one group's slice of a shard, counted from the start of that slice."""
        offset = self.slice_offsets[group]
        return tuple(
            Segment(segment.tensor, segment.start - offset, segment.stop - offset)
            for segment in self.segments(rank)
            if self.weights[segment.tensor].group == group
        )


@dataclass(frozen=True)
class StateLayout:
    """How the model state travels: what is averaged, what is handed on, what never moves.

    The slots of kind `"mean"` form one float64 vector, cut into equal slices like the weights, so
    that each rank merges one slice. `"first"` and `"seed"` slots are few and small, and are handed
    on whole. `"constant"` slots (frozen weights) stay with the run and never travel.
    """

    slots: tuple[StateSlot, ...]
    num_ranks: int

    @cached_property
    def mean(self) -> tuple[int, ...]:
        """Indices of the averaged slots."""
        return tuple(i for i, slot in enumerate(self.slots) if slot.kind == "mean")

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
