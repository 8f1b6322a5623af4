"""Which rows make which batch: a function of (seed, epoch, step) and nothing else.

A global batch takes the next `batch_size` rows of the epoch. How many of them each rank gives is
apportioned by the method of Webster and Sainte-Laguë, which is *house monotone* (Balinski and
Young, "Fair Representation", 1982): as the epoch advances no rank's count ever falls, and at its
end every count is that rank's number of rows. So every row is used exactly once per epoch, and the
shares stay proportional on the way, whatever the partitions look like.

Which rows a rank gives is a keyed permutation of its row numbers that needs no memory.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tfspark.errors import DataError, InvalidInputError

_ROUNDS = 12  # with fewer, permutations of five elements are measurably not uniform
_U64 = 2**64 - 1


@dataclass(frozen=True)
class BatchOrder:
    """The rows of every batch of every epoch.

    Attributes:
        rows_per_rank: rows in each rank's store.
        batch_size: rows of a global batch, over all ranks; the last of an epoch may have fewer.
        seed: of the order; any integer.
        shuffle: draw rows at random, anew in every epoch; otherwise in the order of the stores.

    Raises:
        DataError: there is no row at all.
        InvalidInputError: the batch size is not a positive integer.

    Example:
        >>> order = BatchOrder(rows_per_rank=(5, 2), batch_size=4, seed=1, shuffle=False)
        >>> order.steps_per_epoch, order.rank_rows(0), order.rank_rows(1)
        (2, (3, 1), (2, 1))
        >>> order.row_ids(rank=0, epoch=0, step_in_epoch=1)
        array([3, 4])
    """

    rows_per_rank: tuple[int, ...]
    batch_size: int
    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        if not isinstance(self.batch_size, (int, np.integer)) or self.batch_size < 1:
            raise InvalidInputError(
                f"A batch needs at least one row. Received: batch_size={self.batch_size!r}. "
                "Pass a positive integer."
            )
        if any(rows < 0 for rows in self.rows_per_rank):
            raise InvalidInputError(
                f"A rank has zero rows or more. Received: rows_per_rank={self.rows_per_rank}."
            )
        if self.total_rows == 0:
            raise DataError(
                "A data set needs at least one row to train on. Received: none on "
                f"{len(self.rows_per_rank)} ranks. Check the filters and joins that made it."
            )

    @property
    def num_ranks(self) -> int:
        """N, the world size."""
        return len(self.rows_per_rank)

    @property
    def total_rows(self) -> int:
        """Rows of one epoch."""
        return sum(self.rows_per_rank)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of one epoch, the last partial one included."""
        return -(-self.total_rows // self.batch_size)

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step in that epoch) of a step; all count from 0."""
        return divmod(step, self.steps_per_epoch)

    def global_rows(self, step_in_epoch: int) -> int:
        """Rows of the global batch."""
        start, stop = self._bounds(step_in_epoch)
        return stop - start

    def rank_rows(self, step_in_epoch: int) -> tuple[int, ...]:
        """Rows that each rank gives to the global batch; they sum to `global_rows`."""
        start, stop = self._bounds(step_in_epoch)
        before, after = (_apportion(self.rows_per_rank, seats) for seats in (start, stop))
        return tuple(b - a for a, b in zip(before, after, strict=True))

    def row_ids(self, rank: int, epoch: int, step_in_epoch: int) -> np.ndarray:
        """Which rows of this rank's store make its part of the batch, int64 `[rows]`."""
        start, stop = self._bounds(step_in_epoch)
        first, end = (_apportion(self.rows_per_rank, seats)[rank] for seats in (start, stop))
        positions = np.arange(first, end, dtype=np.int64)
        if not self.shuffle:
            return positions
        key = _key(self.seed, 1, epoch, rank)
        return permute(positions, self.rows_per_rank[rank], key)

    def row_seeds(self, rank: int, epoch: int, row_ids: np.ndarray) -> np.ndarray:
        """Seeds for random operations on these rows in this epoch, int64 `[rows, 2]`."""
        return row_seeds(self.seed, rank, epoch, row_ids)

    def _bounds(self, step_in_epoch: int) -> tuple[int, int]:
        if not 0 <= step_in_epoch < self.steps_per_epoch:
            raise IndexError(f"step {step_in_epoch} of an epoch of {self.steps_per_epoch} steps")
        start = step_in_epoch * self.batch_size
        return start, min(start + self.batch_size, self.total_rows)


def row_seeds(seed: int, rank: int, epoch: int, row_ids: np.ndarray) -> np.ndarray:
    """Seeds that are a function of (seed, rank, epoch, row), int64 `[rows, 2]`."""
    ids = np.asarray(row_ids).astype(np.uint64)
    columns = [_mix(ids ^ np.uint64(_key(seed, 2 + column, epoch, rank))) for column in (0, 1)]
    return np.stack(columns, axis=1).view(np.int64)


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a keyed pseudo-random permutation of `range(size)` sends these positions.

    A Feistel network over a grid of about √size × √size cells that holds `size` (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002): each round shifts one coordinate by a
    hash of the other, so it can be undone, so it is a permutation of the cells. Where a position
    lands on a cell beyond `size` it walks on until it lands inside.

    Args:
        positions: int64, each in `range(size)`.
        size: of the permuted range.
        key: 64 bits that choose the permutation.

    Returns:
        int64, of the shape of `positions`.
    """
    height = math.isqrt(max(size - 1, 0)) + 1
    width = max(-(-size // height), 1)
    round_keys = [_key(key, number) for number in range(_ROUNDS)]
    result = np.array(positions, dtype=np.int64)
    outside = np.arange(result.size)
    while outside.size:
        cells = result[outside].astype(np.uint64)
        rows, columns = cells // np.uint64(width), cells % np.uint64(width)
        for number, round_key in enumerate(round_keys):
            if number % 2:
                shift = _mix(rows ^ np.uint64(round_key)) % np.uint64(width)
                columns = (columns + shift) % np.uint64(width)
            else:
                shift = _mix(columns ^ np.uint64(round_key)) % np.uint64(height)
                rows = (rows + shift) % np.uint64(height)
        result[outside] = (rows * np.uint64(width) + columns).astype(np.int64)
        outside = outside[result[outside] >= size]
    return result


@lru_cache(maxsize=64)
def _apportion(rows_per_rank: tuple[int, ...], seats: int) -> tuple[int, ...]:
    """How many of the first `seats` rows of an epoch each rank gives.

    Seat k (from 0) of a rank with n rows has the rank (2k+1)/n in the queue; equal ones go by rank.
    """
    total, num_ranks = sum(rows_per_rank), len(rows_per_rank)
    # With the divisor that these floors stand for, the sum is at most `seats` and at least
    # `seats` - N: all seats up to a point of the queue, and at most N are left to hand out.
    counts = [
        max((rows * (2 * seats - num_ranks) + total) // (2 * total), 0) for rows in rows_per_rank
    ]
    # Different fractions (2k+1)/n differ by 1/total² at least, so these integers order them.
    scale = 2 * total * total

    def queue() -> Iterator[tuple[int, int]]:
        for rank, rows in enumerate(rows_per_rank):
            if rows:
                yield (2 * counts[rank] + 1) * scale // rows, rank

    heap = list(queue())
    heapq.heapify(heap)
    for _ in range(seats - sum(counts)):
        _, rank = heap[0]
        counts[rank] += 1
        heapq.heapreplace(heap, ((2 * counts[rank] + 1) * scale // rows_per_rank[rank], rank))
    return tuple(counts)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al., 2014), elementwise on uint64."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _key(*numbers: int) -> int:
    """64 bits out of any integers."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = _mix(key ^ np.array([number & _U64], np.uint64))
    return int(key[0])
