"""What a step costs the processor of one rank, as a few numbers fitted to measured points.

A rank is one thread: it copies every byte that it sends or receives, and handles every message.
In one exchange of N ranks it sends N - 1 messages and receives as many:

    exchange_s + (N - 1) · (message_s + slice_bytes · byte_s)

A step has two of them, and besides `step_s + P · weight_s + P / N · shard_s`: what is done once,
for every weight (the sum in rank order, for one) and for every weight of the rank's shard (the
optimizer). Ranks that share too few cores take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
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
        weight_s: for every weight in a step.
        shard_s: for every weight of the rank's shard in a step.
    """

    exchange_s: float = 0.0
    message_s: float = 0.0
    byte_s: float = 0.0
    step_s: float = 0.0
    weight_s: float = 0.0
    shard_s: float = 0.0

    def exchange(self, num_ranks: int, slice_bytes: float) -> float:
        """Seconds of one exchange with all others."""
        return self.exchange_s + (num_ranks - 1) * (self.message_s + slice_bytes * self.byte_s)

    def besides(self, num_ranks: int, weights: int) -> float:
        """Seconds of a step that are not exchange."""
        return self.step_s + weights * (self.weight_s + self.shard_s / num_ranks)

    def step(self, num_ranks: int, weights: int) -> float:
        """Seconds of a whole step: two exchanges, and what is not exchange."""
        slice_bytes = weights / num_ranks * WEIGHT_BYTES
        return 2 * self.exchange(num_ranks, slice_bytes) + self.besides(num_ranks, weights)


@dataclass(frozen=True)
class Point:
    """Measured seconds of one rank's processor.

    Attributes:
        num_ranks, weights: N and P.
        exchanges: that took place: 1, or 2 of a whole step.
        steps: whose fixed work and work on the shard is in it.
        sums: 1 where the work for every weight is in it, else 0.
        cpu_s: measured.
    """

    num_ranks: int
    weights: int
    exchanges: int
    steps: int
    sums: int
    cpu_s: float


def fit(points: Sequence[Point]) -> Costs:
    """The costs that explain the points with the least sum of squared relative errors.

    No cost is negative. Those of which the points say nothing are 0.
    """
    rows, target = np.array([_row(point) for point in points]), [p.cpu_s for p in points]
    relative = rows / np.array(target)[:, None]
    return Costs(*_non_negative(relative, np.ones(len(points))).tolist())


def explained(costs: Costs, point: Point) -> float:
    """Seconds that the costs give for a point."""
    return float(np.dot(_row(point), astuple(costs)))


def _row(point: Point) -> list[float]:
    peers, exchanges = point.num_ranks - 1, point.exchanges
    slice_bytes = point.weights / point.num_ranks * WEIGHT_BYTES
    return [
        exchanges,
        exchanges * peers,
        exchanges * peers * slice_bytes,
        point.steps,
        point.sums * point.weights,
        point.steps * point.weights / point.num_ranks,
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
