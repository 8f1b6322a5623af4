"""What a training was like so far: the loss of every epoch, the scores of every validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class History:
    """Losses by epoch and scores by validation, kept by the driver and in checkpoints.

    Attributes:
        validations: (step, scores by name) of every validation.

    Example:
        >>> history = History()
        >>> history.add_step(0.5, rows=4, ends_epoch=False)
        >>> history.add_step(0.25, rows=4, ends_epoch=True)
        >>> history.add_step(0.1, rows=4, ends_epoch=False)
        >>> history.losses
        [0.375, 0.1]
    """

    def __init__(self) -> None:
        self.validations: list[tuple[int, dict[str, float]]] = []
        self._finished: list[float] = []
        self._sum, self._rows = 0.0, 0  # of the epoch that runs

    @property
    def losses(self) -> list[float]:
        """The mean loss over the rows of each epoch; the last one may not be finished."""
        running = [self._sum / self._rows] if self._rows else []
        return [*self._finished, *running]

    def add_step(self, loss: float, rows: int, ends_epoch: bool) -> None:
        """Adds a step that stays.

        Args:
            loss: mean over its rows.
            rows: of the global batch.
            ends_epoch: whether it was the last one of an epoch.
        """
        self._sum += loss * rows
        self._rows += rows
        if ends_epoch:
            self._finished.append(self._sum / self._rows if self._rows else loss)
            self._sum, self._rows = 0.0, 0

    def add_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Adds a validation after so many steps."""
        self.validations.append((step, dict(scores)))

    def state(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "losses": list(self._finished),
            "running": [self._sum, self._rows],
            "validations": [[step, dict(scores)] for step, scores in self.validations],
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any] | None) -> History:
        """The history of a checkpoint; empty where it has none."""
        history = cls()
        if state is not None:
            history._finished = [float(loss) for loss in state["losses"]]
            history._sum, history._rows = state["running"]
            history.validations = [
                (int(step), dict(scores)) for step, scores in state["validations"]
            ]
        return history
