"""How many steps a round takes: long enough to hide its fixed cost, short enough to follow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pacing:
    """The bounds of a round, which ends where local SGD averages, or where a trigger wants it to.

    Where it averages must not depend on how fast steps are.

    Attributes:
        target_s: seconds that a round should last at least. Where an engine tells of steps only at
            the end of a round, this is also how often the progress bar moves.
        longest_s: seconds that it should last at most: what a failure may cost.
        most_fixed: share of a round's time that may be fixed cost. In an hour, 1 % are 36 s, more
            than the round that a failure may cost.
        most_steps: however fast the steps are; None: any number.
        average_every: τ of local SGD; 1 elsewhere.

    Example:
        >>> Pacing(average_every=10).steps([], seconds_per_step=0.1, step=5)  # 20 in two seconds
        15
    """

    target_s: float = 2.0
    longest_s: float = 30.0
    most_fixed: float = 0.01
    most_steps: int | None = None
    average_every: int = 1

    def steps(
        self,
        horizons: Iterable[int],
        seconds_per_step: float | None,
        fixed_s: float = 0.0,
        step: int = 0,
    ) -> int:
        """Steps of the next round.

        Args:
            horizons: for each trigger, the number of steps that it certainly lets pass before it
                can fire between two of them.
            seconds_per_step: of the last round, without the fixed cost; None before the first,
                which takes one step, so that start-up costs and errors show at once.
            fixed_s: the fixed cost of the last round, where it is known.
            step: finished steps before the round.
        """
        affordable = 1
        if seconds_per_step is not None:
            lasting_s = min(max(self.target_s, fixed_s / self.most_fixed), self.longest_s)
            affordable = int(lasting_s / max(seconds_per_step, 1e-9))
        if self.most_steps is not None:
            affordable = min(affordable, self.most_steps)
        periods = max(1, (step + affordable) // self.average_every - step // self.average_every)
        to_average = (step // self.average_every + periods) * self.average_every - step
        return max(1, min([to_average, *horizons]))
