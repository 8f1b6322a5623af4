"""Schedules one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from tfspark.errors import InvalidInputError, require
from tfspark.train.plateau import Plateau, PlateauState
from tfspark.train.schedules import Schedule


@keras.saving.register_keras_serializable("tfspark")
class SequentialSchedule(Schedule):
    """Schedules one after the other, each for a number of steps; the last one goes on for ever.

    Each part counts steps from its own start (but see `Poly`). A part without a base rate of its
    own goes on from the rate that the part before it had reached: that of the step after its last.

    Args:
        iteration_per_epoch: steps per epoch, for the parts that need it; filled in by tfspark
            when training starts.
        learning_rate: the base rate of the first part, if it has none.
        parts: what `add` adds, as pairs.

    Example:
        >>> schedule = SequentialSchedule(learning_rate=0.1)
        >>> schedule = schedule.add(Warmup(0.1), 9).add(Step(10, 0.5), 100)
        >>> [round(float(schedule(step)), 3) for step in (0, 8, 9, 19)]
        [0.1, 0.9, 1.0, 0.5]
    """

    def __init__(
        self,
        iteration_per_epoch: int | None = None,
        *,
        learning_rate: float | None = None,
        parts: Sequence[tuple[LearningRateSchedule, int]] = (),
    ):
        super().__init__(learning_rate)
        self.iteration_per_epoch = iteration_per_epoch
        self.parts: list[tuple[LearningRateSchedule, int]] = []
        for schedule, max_iteration in parts:
            self.add(schedule, max_iteration)

    def add(self, schedule: LearningRateSchedule, max_iteration: int) -> SequentialSchedule:
        """Adds a part of so many steps; returns this schedule, for chaining."""
        if not isinstance(schedule, LearningRateSchedule):
            raise InvalidInputError(f"A part is a learning-rate schedule. Received: {schedule!r}.")
        require(max_iteration >= 1, "max_iteration is at least 1", max_iteration=max_iteration)
        if any(isinstance(part, Plateau) for part, _ in self.parts):
            # What follows would start from a rate that depends on scores.
            raise InvalidInputError(
                "Plateau can only be the last part of a SequentialSchedule. "
                f"Received: {type(schedule).__name__} after a Plateau."
            )
        if self.iteration_per_epoch is not None and isinstance(schedule, Schedule):
            schedule = schedule.bind(self.iteration_per_epoch)
        self.parts.append((schedule, int(max_iteration)))
        return self

    def bind(self, steps_per_epoch: int, batch_size: int | None = None) -> SequentialSchedule:
        """This schedule with all its parts bound."""
        steps = self.iteration_per_epoch or steps_per_epoch
        parts = [
            (part.bind(steps, batch_size) if isinstance(part, Schedule) else part, length)
            for part, length in self.parts
        ]
        return SequentialSchedule(steps, learning_rate=self.learning_rate, parts=parts)

    @property
    def plateau(self) -> Plateau | None:
        """The last part, if it is a `Plateau`."""
        last = self.parts[-1][0] if self.parts else None
        return last if isinstance(last, Plateau) else None

    def plateau_start(self) -> int:
        """The step where the last part begins."""
        return sum(length for _, length in self.parts[:-1])

    def __call__(self, step: Any) -> Any:
        """The rate of a step."""
        if self.plateau is not None:
            return self.plateau.from_base(None, step)
        return self.at(step, PlateauState())

    def at(self, step: Any, state: PlateauState) -> Any:
        """The rate of a step, given what its `Plateau` (if it ends in one) remembers."""
        if not self.parts:
            raise InvalidInputError(
                "A SequentialSchedule needs parts. Received: none. Call add(schedule, steps)."
            )
        step = ops.cast(step, "int64")
        carried, start, rates = self.learning_rate, 0, []
        for part, length in self.parts:
            rates.append(_part_rate(part, carried, start, step, state))
            start += length
            if not isinstance(part, Plateau):
                carried = _part_rate(part, carried, start - length, start, state)
        result, end = rates[0], 0
        for rate, (_, length) in zip(rates[1:], self.parts[:-1], strict=True):
            end += length
            result = ops.where(step >= end, rate, result)
        return result

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        serialize = keras.optimizers.schedules.serialize
        return {
            **super().get_config(),
            "iteration_per_epoch": self.iteration_per_epoch,
            "parts": [[serialize(part), length] for part, length in self.parts],
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SequentialSchedule:
        """The inverse of `get_config`."""
        deserialize = keras.optimizers.schedules.deserialize
        parts = [(deserialize(part), length) for part, length in config["parts"]]
        return cls(**{**config, "parts": parts})


def _part_rate(
    part: LearningRateSchedule, carried: Any, start: int, step: Any, state: PlateauState
) -> Any:
    """The rate of a part of a sequence that begins at `start`, at a step of the whole sequence."""
    if not isinstance(part, Schedule):
        # Some of Keras's schedules cannot take a negative step, which is not used anyway.
        return ops.cast(part(ops.maximum(ops.cast(step, "int64") - start, 0)), "float32")
    base = part.learning_rate if part.learning_rate is not None else carried
    if base is None and not isinstance(part, SequentialSchedule):
        raise InvalidInputError(
            "The first part of a SequentialSchedule needs a base rate. Received: none. Write "
            "SequentialSchedule(learning_rate=0.1), or give the part a learning_rate."
        )
    if isinstance(part, Plateau):
        return part.from_state(ops.cast(base, "float32"), state)
    own_step = ops.cast(step, "int64") - (0 if part.counts_from_start else start)
    own_step = ops.maximum(own_step, 0)
    if isinstance(part, SequentialSchedule):
        return part(own_step)
    return part.from_base(ops.cast(base, "float32"), own_step)
