"""How many steps a round takes: long enough to hide its fixed cost, short enough to follow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pacing:
    """The bounds of a round.

    Attributes:
        target_s: seconds that a round should last at least. Where an engine tells of steps only at
            the end of a round, this is also how often the progress bar moves.
        longest_s: seconds that it should last at most: what a failure may cost.
        most_fixed: share of a round's time that may be fixed cost.
        most_steps: however fast the steps are; None: any number.
    """

    target_s: float = 2.0
    longest_s: float = 30.0
    most_fixed: float = 0.03
    most_steps: int | None = None

    def steps(
        self, horizons: Iterable[int], seconds_per_step: float | None, fixed_s: float = 0.0
    ) -> int:
        """Steps of the next round.

        Args:
            horizons: for each trigger, the number of steps that it certainly lets pass before it
                can fire between two of them.
            seconds_per_step: of the last round, without the fixed cost; None before the first,
                which takes one step, so that start-up costs and errors show at once.
            fixed_s: the fixed cost of the last round, where it is known.
        """
        if seconds_per_step is None:
            return 1
        lasting_s = min(max(self.target_s, fixed_s / self.most_fixed), self.longest_s)
        affordable = int(lasting_s / max(seconds_per_step, 1e-9))
        bounds = [affordable, *horizons]
        if self.most_steps is not None:
            bounds.append(self.most_steps)
        return max(1, min(bounds))
