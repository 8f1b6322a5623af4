"""What a step costs the processor of one rank, as a few numbers fitted to measured points.

A rank is one thread: it copies every byte that it sends or receives, and handles every message.
In one exchange of N ranks it sends N - 1 messages and receives as many:

    exchange_s + (N - 1) · (message_s + slice_bytes · byte_s)

A step has two of them, and what is done once, for every weight of the others' shards (a slice of
the gradient comes from each of them and is summed), and for every weight of the rank's own shard:

    step_s + P · (N - 1) / N · others_s + P / N · shard_s

Ranks that share too few cores take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from itertools import combinations

import numpy as np

WEIGHT_BYTES = 4  # float32


@dataclass(frozen=True)
class Costs:
    """Seconds of one rank's processor.

    Attributes:
        exchange_s: for an exchange, however many peers.
        message_s: for a message sent and one received.
        byte_s: for a byte sent and one received.
        step_s: for a step.
        others_s: for every weight of the others' shards in a step.
        shard_s: for every weight of the rank's shard in a step.
    """

    exchange_s: float = 0.0
    message_s: float = 0.0
    byte_s: float = 0.0
    step_s: float = 0.0
    others_s: float = 0.0
    shard_s: float = 0.0

    def exchange(self, num_ranks: int, slice_bytes: float) -> float:
        """Seconds of one exchange with all others."""
        return self.exchange_s + (num_ranks - 1) * (self.message_s + slice_bytes * self.byte_s)

    def besides(self, num_ranks: int, weights: int) -> float:
        """Seconds of a step that are not exchange."""
        shard = weights / num_ranks
        return self.step_s + (weights - shard) * self.others_s + shard * self.shard_s

    def step(self, num_ranks: int, weights: int) -> float:
        """Seconds of a whole step: two exchanges, and what is not exchange."""
        slice_bytes = weights / num_ranks * WEIGHT_BYTES
        return 2 * self.exchange(num_ranks, slice_bytes) + self.besides(num_ranks, weights)


NAMES = tuple(field.name for field in fields(Costs))


@dataclass(frozen=True)
class Point:
    """Measured seconds of one rank's processor.

    Attributes:
        num_ranks, weights: N and P.
        exchanges, steps, sums, shards: how often an exchange, the fixed part of a step, and the
            work for the others' weights and for the own shard are in it.
        cpu_s: measured.
    """

    num_ranks: int
    weights: int
    exchanges: float
    steps: float
    sums: float
    shards: float
    cpu_s: float


def fit(points: Sequence[Point], names: Sequence[str] = NAMES) -> Costs:
    """The costs that explain the points with the least sum of squared relative errors.

    No cost is negative.

    Args:
        points: measured.
        names: of the costs that the points can tell apart; the others are 0.
    """
    columns = [NAMES.index(name) for name in names]
    rows = np.array([_row(point) for point in points])[:, columns]
    relative = rows / np.array([point.cpu_s for point in points])[:, None]
    found = _non_negative(relative, np.ones(len(points)))
    return Costs(**dict(zip(names, found.tolist(), strict=True)))


def explained(costs: Costs, point: Point) -> float:
    """Seconds that the costs give for a point."""
    return float(np.dot(_row(point), astuple(costs)))


def _row(point: Point) -> list[float]:
    peers, shard = point.num_ranks - 1, point.weights / point.num_ranks
    return [
        point.exchanges,
        point.exchanges * peers,
        point.exchanges * peers * shard * WEIGHT_BYTES,
        point.steps,
        point.sums * peers * shard,
        point.shards * shard,
    ]


def _non_negative(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares over non-negative solutions.

    The solution is the plain one over the columns where it is positive. There are few columns, so
    all sets of columns are tried.
    """
    best, best_error = np.zeros(matrix.shape[1]), float(target @ target)
    # Columns of one size: those of bytes and of steps differ by eight orders of magnitude.
    norms = np.linalg.norm(matrix, axis=0)
    used = np.flatnonzero(norms)
    for count in range(1, len(used) + 1):
        for columns in map(list, combinations(used, count)):
            part = matrix[:, columns] / norms[columns]
            solution, _, rank, _ = np.linalg.lstsq(part, target, rcond=None)
            error = float(np.square(part @ solution - target).sum())
            if rank == count and (solution >= 0).all() and error < best_error:
                best, best_error = np.zeros(matrix.shape[1]), error
                best[columns] = solution / norms[columns]
    return best
