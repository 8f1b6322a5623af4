"""Learning rates of any kind, as the driver asks for them: numbers, functions and schedules."""

from __future__ import annotations

import math
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from tfspark.errors import InvalidInputError
from tfspark.train.plateau import Plateau, PlateauState
from tfspark.train.schedules import Schedule
from tfspark.train.sequence import SequentialSchedule


def bind(schedule: Any, steps_per_epoch: int, batch_size: int) -> Any:
    """A learning rate of any kind, bound to epochs and global batches where they matter."""
    if not isinstance(schedule, Schedule):
        return schedule
    return schedule.bind(steps_per_epoch, batch_size)


def plateau_of(schedule: Any) -> Plateau | None:
    """The `Plateau` whose scores a learning rate depends on, if it does."""
    if isinstance(schedule, SequentialSchedule):
        return schedule.plateau
    return schedule if isinstance(schedule, Plateau) else None


def observe(
    schedule: Any, state: PlateauState, scores: dict[str, float], step: int
) -> PlateauState:
    """The state after a validation at `step`; scores before a sequence's Plateau do not count.

    Raises:
        InvalidInputError: the monitored score is not among `scores`.
    """
    plateau = plateau_of(schedule)
    if plateau is None:
        return state
    if isinstance(schedule, SequentialSchedule) and step < schedule.plateau_start():
        return state
    if plateau.monitor not in scores:
        raise InvalidInputError(
            f"Plateau monitors {plateau.monitor!r}. Received: the scores {sorted(scores)}. "
            "Give one of these as monitor, or add the metric."
        )
    return plateau.observe(state, scores[plateau.monitor])


def rate_at(schedule: Any, step: int, state: PlateauState | None = None) -> float:
    """The learning rate of a step as a number, in any eager mode.

    Args:
        schedule: a number, a Keras or tfspark schedule, or a function without arguments.
        step: finished steps.
        state: of its `Plateau`, where it has one.

    Raises:
        InvalidInputError: the rate is not a finite number of at least 0.
    """
    if isinstance(schedule, float | int):
        return float(schedule)
    from tensorflow.python.eager.context import eager_mode

    # A script may have switched eager mode off; schedules compute with tensors.
    with eager_mode():
        if isinstance(schedule, LearningRateSchedule):
            rate = float(_schedule_rate(schedule, step, state or PlateauState()))
        else:
            rate = float(schedule())
    if not (math.isfinite(rate) and rate >= 0):
        raise InvalidInputError(
            "A learning rate is a finite number, at least 0. "
            f"Received: {rate} from {schedule!r} at step {step}.",
        )
    return rate


def _schedule_rate(schedule: LearningRateSchedule, step: int, state: PlateauState) -> Any:
    # The dtype of Keras's own counter, so that a schedule computes the same numbers.
    position = ops.convert_to_tensor(step, "int64")
    if isinstance(schedule, SequentialSchedule):
        return schedule.at(position, state)
    if isinstance(schedule, Plateau):
        if schedule.learning_rate is None:
            schedule(position)  # raises, naming the keyword
        return schedule.from_state(ops.cast(schedule.learning_rate, "float32"), state)
    return schedule(position)
