"""When to stop, to save, to validate: pure functions of progress.

A trigger is asked after each step, with what is known then. It holds no state, so it gives the
same answer on every rank and on the driver, and after a resume. It also tells its *horizon*: how
many steps can run before it has to be asked again. That is what lets many steps run in one round
without any trigger being passed over.

Example:
    >>> trigger = SeveralIteration(100) | EveryEpoch()
    >>> progress = Progress(step=30, epoch=0, step_in_epoch=30, steps_per_epoch=60)
    >>> trigger(progress), trigger.horizon(progress)
    (False, 30)
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

from tfspark.errors import InvalidInputError


@dataclass(frozen=True)
class Progress:
    """What is known after a step; all counts are since the first step of the first run.

    Attributes:
        step: finished steps.
        epoch: finished epochs.
        step_in_epoch: finished steps of the current epoch. At the end of an epoch it is 0, and
            `epoch` has grown by one.
        steps_per_epoch: steps of one epoch.
        rows: rows seen.
        loss: the loss of the last step; None before the first.
        score: the first score of the last validation; None before the first.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    steps_per_epoch: int = 1
    rows: int = 0
    loss: float | None = None
    score: float | None = None

    def __post_init__(self) -> None:
        counts = (self.step, self.epoch, self.step_in_epoch, self.rows)
        if min(counts) < 0 or not self.step_in_epoch < self.steps_per_epoch:
            raise InvalidInputError(
                "Progress counts from 0, and step_in_epoch stays below steps_per_epoch. "
                f"Received: {self!r}."
            )

    @property
    def epoch_finished(self) -> bool:
        """Whether the last step was the last of an epoch."""
        return self.step > 0 and self.step_in_epoch == 0

    @property
    def steps_to_epoch_end(self) -> int:
        """Further steps until an epoch ends, at least 1."""
        return self.steps_per_epoch - self.step_in_epoch


class Trigger:
    """Base of all triggers.

    A trigger of your own defines `__call__`, and `horizon` where it can look ahead. It must be a
    function of the progress alone, must pickle, and should be a frozen dataclass.

    Example:
        >>> @dataclass(frozen=True)
        ... class MaxRows(Trigger):
        ...     rows: int
        ...
        ...     def __call__(self, progress: Progress) -> bool:
        ...         return progress.rows >= self.rows
    """

    def __call__(self, progress: Progress) -> bool:
        """Whether it fires after the last step."""
        raise NotImplementedError(f"{type(self).__name__} does not define __call__.")

    def horizon(self, progress: Progress) -> int:
        """Steps that may run before the trigger is asked again, at least 1.

        If it is `h`, the trigger certainly does not fire after the next 1, 2, … `h - 1` steps. It
        may or may not fire after the `h`-th.
        """
        return 1

    def __and__(self, other: Trigger) -> TriggerAnd:
        return TriggerAnd(self, other)

    def __or__(self, other: Trigger) -> TriggerOr:
        return TriggerOr(self, other)


@dataclass(frozen=True)
class MaxEpoch(Trigger):
    """Fires once `epochs` epochs are finished, and ever after.

    Example:
        >>> MaxEpoch(5)(Progress(step=50, epoch=5, steps_per_epoch=10))
        True
    """

    epochs: int

    def __post_init__(self) -> None:
        _check_count("MaxEpoch", "epochs", self.epochs)

    def __call__(self, progress: Progress) -> bool:
        """Whether enough epochs are finished."""
        return progress.epoch >= self.epochs

    def horizon(self, progress: Progress) -> int:
        """Steps to the end of its last epoch."""
        epochs_after_this = self.epochs - progress.epoch - 1
        return max(1, progress.steps_to_epoch_end + epochs_after_this * progress.steps_per_epoch)


@dataclass(frozen=True)
class MaxIteration(Trigger):
    """Fires once `steps` steps are finished, and ever after.

    Example:
        >>> MaxIteration(2000).horizon(Progress(step=1900))
        100
    """

    steps: int

    def __post_init__(self) -> None:
        _check_count("MaxIteration", "steps", self.steps)

    def __call__(self, progress: Progress) -> bool:
        """Whether enough steps are finished."""
        return progress.step >= self.steps

    def horizon(self, progress: Progress) -> int:
        """Steps that are left."""
        return max(1, self.steps - progress.step)


@dataclass(frozen=True)
class EveryEpoch(Trigger):
    """Fires after the last step of each epoch.

    Example:
        >>> EveryEpoch()(Progress(step=20, epoch=2, step_in_epoch=0, steps_per_epoch=10))
        True
    """

    def __call__(self, progress: Progress) -> bool:
        """Whether the last step ended an epoch."""
        return progress.epoch_finished

    def horizon(self, progress: Progress) -> int:
        """Steps to the end of the epoch."""
        return progress.steps_to_epoch_end


@dataclass(frozen=True)
class SeveralIteration(Trigger):
    """Fires after every `steps` steps.

    Example:
        >>> [step for step in range(10) if SeveralIteration(3)(Progress(step=step))]
        [3, 6, 9]
    """

    steps: int

    def __post_init__(self) -> None:
        _check_count("SeveralIteration", "steps", self.steps)

    def __call__(self, progress: Progress) -> bool:
        """Whether the number of finished steps is a multiple."""
        return progress.step > 0 and progress.step % self.steps == 0

    def horizon(self, progress: Progress) -> int:
        """Steps to the next multiple."""
        return self.steps - progress.step % self.steps


@dataclass(frozen=True)
class MaxScore(Trigger):
    """Fires when the first score of the last validation is above `score`.

    Example:
        >>> MaxScore(0.98)(Progress(step=10, score=0.985))
        True
    """

    score: float

    def __post_init__(self) -> None:
        _check_number("MaxScore", "score", self.score)

    def __call__(self, progress: Progress) -> bool:
        """Whether the last validation was good enough."""
        return progress.score is not None and progress.score > self.score


@dataclass(frozen=True)
class MinLoss(Trigger):
    """Fires when the loss of the last step is below `loss`.

    Example:
        >>> MinLoss(0.1)(Progress(step=10, loss=0.05))
        True
    """

    loss: float

    def __post_init__(self) -> None:
        _check_number("MinLoss", "loss", self.loss)

    def __call__(self, progress: Progress) -> bool:
        """Whether the loss is low enough."""
        return progress.loss is not None and progress.loss < self.loss


@dataclass(frozen=True, init=False)
class _Combined(Trigger):
    """Several triggers, at least one."""

    triggers: tuple[Trigger, ...]

    def __init__(self, *triggers: Trigger):
        name = type(self).__name__
        if not triggers:
            raise InvalidInputError(f"{name} combines at least one trigger. Received: none.")
        for trigger in triggers:
            check_trigger(trigger, f"an argument of {name}")
        object.__setattr__(self, "triggers", triggers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.triggers))})"


@dataclass(frozen=True, init=False, repr=False)
class TriggerAnd(_Combined):
    """Fires when all of its triggers fire after the same step; `a & b` for short.

    Example:
        >>> MaxEpoch(2) & MinLoss(0.1)
        TriggerAnd(MaxEpoch(epochs=2), MinLoss(loss=0.1))
    """

    def __call__(self, progress: Progress) -> bool:
        """Whether all fire."""
        return all(trigger(progress) for trigger in self.triggers)

    def horizon(self, progress: Progress) -> int:
        """The longest of all: until then, that one does not fire."""
        return max(trigger.horizon(progress) for trigger in self.triggers)


@dataclass(frozen=True, init=False, repr=False)
class TriggerOr(_Combined):
    """Fires when any of its triggers fires; `a | b` for short.

    Example:
        >>> MaxEpoch(20) | MaxScore(0.99)
        TriggerOr(MaxEpoch(epochs=20), MaxScore(score=0.99))
    """

    def __call__(self, progress: Progress) -> bool:
        """Whether any fires."""
        return any(trigger(progress) for trigger in self.triggers)

    def horizon(self, progress: Progress) -> int:
        """The shortest of all."""
        return min(trigger.horizon(progress) for trigger in self.triggers)


def check_trigger(value: Any, argument: str) -> Trigger:
    """The value, if it is a trigger.

    Args:
        value: what the caller received.
        argument: the name of the argument, for the message.

    Raises:
        InvalidInputError: it is something else, or a trigger's class instead of an instance.
    """
    if isinstance(value, Trigger):
        return value
    received = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
    raise InvalidInputError(
        f"{argument} is a trigger, such as MaxEpoch(5) or SeveralIteration(100). "
        f"Received: {received}."
    )


def _check_count(trigger: str, argument: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidInputError(
            f"{trigger}'s {argument} is an int of at least 1. Received: {value!r}."
        )


def _check_number(trigger: str, argument: str, value: Any) -> None:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or math.isnan(value):
        raise InvalidInputError(f"{trigger}'s {argument} is a number. Received: {value!r}.")
