"""The training of an `NNModel`, as Spark's own estimators tell of theirs."""

from __future__ import annotations

from tfspark.train.history import History


class TrainingSummary:
    """What a `fit` was like.

    Attributes:
        objectiveHistory: the mean loss over the rows of each epoch.
        totalIterations: steps, one for each global batch.
        validationHistory: (step, scores by name) of every validation.
    """

    def __init__(self, history: History, steps: int):
        self.objectiveHistory: list[float] = history.losses
        self.totalIterations: int = steps
        self.validationHistory: list[tuple[int, dict[str, float]]] = list(history.validations)

    def __repr__(self) -> str:
        loss = f", loss {self.objectiveHistory[-1]:.4g}" if self.objectiveHistory else ""
        return (
            f"TrainingSummary({self.totalIterations} steps, "
            f"{len(self.objectiveHistory)} epochs{loss})"
        )
