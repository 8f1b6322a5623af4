"""Which ranks a step goes on without. Decides only: knows no thread, socket or clock.

Every rank decides for itself, from what all ranks have heard of each other, so all decide the same
and none has to be told. What a rank says in a step is how long its gradient took, or that it is
late: `limit_s` have passed and it still computes.

Source: the mean over the ranks that were in time is that of "Revisiting Distributed Synchronous
SGD" (Chen et al., 2016, https://arxiv.org/abs/1604.00981).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from tfspark.errors import InvalidInputError

_RECENT = 20
"""Steps whose times make the typical one."""

LEAST_GAIN_S = 0.02
"""Nobody is left out to save less: so much is noise on any machine."""


@dataclass(frozen=True)
class LeaveOut:
    """Lets a step go on without the gradient of slow ranks: `leave_out=LeaveOut()`.

    The rows of a rank that is left out are dropped for this step, and the sum is divided by the
    rows that are in it. So not every row is used once per epoch, and a run does not repeat bit for
    bit: who is late depends on the machines. For the engine `gang`.

    A rank is late once `factor` times the time that a gradient typically takes have passed (and 20
    ms more than that at least). All wait as long as more than `most_ranks` are late, or one that
    was left out of the `in_a_row` steps before. Nobody is left out of the first and the last step
    of a round: the first ones show what is typical, and a round ends when all have ended.

    Only a slow gradient, the reading of its rows included, can be left out. The rank still keeps
    its shard up to date, so a process that does nothing at all holds up all others.

    Args:
        most_ranks: how many ranks one step may be without; fewer than there are.
        factor: at least 1.
        in_a_row: so many steps, one after the other, may be without the same rank.

    Raises:
        InvalidInputError: a number is out of range.

    Example:
        >>> LeaveOut(most_ranks=2, factor=2.0)
        LeaveOut(most_ranks=2, factor=2.0, in_a_row=3)
    """

    most_ranks: int = 1
    factor: float = 1.5
    in_a_row: int = 3

    def __post_init__(self) -> None:
        for name in ("most_ranks", "in_a_row"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidInputError(
                    f"LeaveOut's {name} is a whole number of at least 1. Received: {value!r}."
                )
        factor = self.factor
        if not isinstance(factor, (int, float)) or not (1 <= factor < math.inf):
            raise InvalidInputError(
                f"LeaveOut's factor is a number of at least 1. Received: {factor!r}."
            )


class Watch:
    """What all ranks know of the steps of a round so far, and so the same on each of them.

    Args:
        rule: what may be done.
        num_ranks: N.
    """

    def __init__(self, rule: LeaveOut, num_ranks: int):
        self._rule = rule
        self._seconds: deque[float] = deque(maxlen=_RECENT)  # of a typical rank, by step
        self._missed = [0] * num_ranks  # steps in a row, by rank

    @property
    def limit_s(self) -> float:
        """Seconds after which a rank is late; infinity before anything is known."""
        if not self._seconds:
            return math.inf
        typical = median_low(self._seconds)
        return max(self._rule.factor * typical, typical + LEAST_GAIN_S)

    def left_out(self, said: Sequence[float | None], rows: Sequence[int]) -> frozenset[int] | None:
        """The ranks that the step goes on without; None: all have to wait and ask again.

        Args:
            said: by rank, how many seconds its gradient took; None: it is late.
            rows: by rank, of the step's batch. A rank without rows is never late.
        """
        late = frozenset(rank for rank, seconds in enumerate(said) if seconds is None)
        bounded = len(late) <= self._rule.most_ranks and all(
            self._missed[rank] < self._rule.in_a_row for rank in late
        )
        remaining = sum(count for rank, count in enumerate(rows) if rank not in late)
        return late if not late or (bounded and remaining) else None

    def add(self, said: Sequence[float | None], rows: Sequence[int]) -> None:
        """Notes what was said when the step went on; see `left_out`."""
        took = []
        for rank, (seconds, count) in enumerate(zip(said, rows, strict=True)):
            if count:
                self._missed[rank] = self._missed[rank] + 1 if seconds is None else 0
                took += [] if seconds is None else [seconds]
        # The lower median: of two ranks it is the fast one that is typical.
        self._seconds.append(median_low(took))
