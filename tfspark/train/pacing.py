"""How many steps a round takes: long enough to hide its fixed cost, short enough to follow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pacing:
    """The bounds of a round.

    Attributes:
        target_s: seconds that a round should last; the driver hears of its steps at its end, so
            this is also how often the progress bar moves.
        most_steps: however fast the steps are. A chained round is one lineage, which Spark plans
            and schedules as a whole.
    """

    target_s: float = 2.0
    most_steps: int = 32

    def steps(self, horizons: Iterable[int], seconds_per_step: float | None) -> int:
        """Steps of the next round.

        Args:
            horizons: for each trigger, the number of steps that it certainly lets pass before it
                can fire between two of them.
            seconds_per_step: of the last round; None before the first, which takes one step, so
                that start-up costs and errors show at once.
        """
        if seconds_per_step is None:
            return 1
        affordable = int(self.target_s / max(seconds_per_step, 1e-9))
        return max(1, min(affordable, self.most_steps, *horizons))
