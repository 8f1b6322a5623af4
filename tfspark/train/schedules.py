"""Learning rates that change with the step, the epoch or the score.

All are Keras `LearningRateSchedule`s: hand one to any Keras optimizer, here or in plain Keras. The
arguments come in BigDL's order, whose optimizers held the base rate themselves; here the schedule
holds it, as everywhere in Keras, in the keyword `learning_rate`.

Three kinds of facts reach a schedule, each in its own way:

* the step, as the argument of the call;
* the steps of an epoch (`EpochStep`) and the rows of a batch (`LinearScaling`), through `bind`,
  which returns a bound schedule;
* scores (`Plateau`), through `observe`, a pure function from one `PlateauState` to the next. The
  state is the caller's to keep and to save; `rate_at(schedule, step, state)` takes it.

Those of step and epoch are here, the others in plateau.py, scaling.py and sequence.py; rates.py is
what the driver asks of any of them.

Formulas and names: BigDL 2, `SGD.scala` (Apache-2.0), unless a class says otherwise.

Example:
    >>> schedule = SequentialSchedule(learning_rate=0.01)
    >>> schedule = schedule.add(Warmup(0.001), 90).add(MultiStep([1000, 2000], 0.1), 10_000)
    >>> optimizer = keras.optimizers.SGD(schedule, momentum=0.9)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from tfspark.errors import InvalidInputError, require


class Schedule(LearningRateSchedule):
    """Base of the schedules here: a factor or a sum on top of a base rate.

    Args:
        learning_rate: the base rate. It may be left out of a part of a `SequentialSchedule`, which
            then goes on from the rate where the part before it ended.
    """

    counts_from_start = False
    """Whether it counts steps from the start of the training even as a part of a sequence."""

    def __init__(self, learning_rate: float | None = None):
        if learning_rate is not None:
            require(
                math.isfinite(learning_rate) and learning_rate >= 0,
                "A learning rate is a finite number, at least 0",
                learning_rate=learning_rate,
            )
        self.learning_rate = learning_rate

    def __call__(self, step: Any) -> Any:
        """The rate of a step: a float32 scalar tensor. `step` counts finished steps."""
        if self.learning_rate is None:
            raise InvalidInputError(
                f"{type(self).__name__} needs a base rate. Received: no learning_rate. "
                f"Write {type(self).__name__}(…, learning_rate=0.1)."
            )
        return self.from_base(ops.cast(self.learning_rate, "float32"), step)

    def from_base(self, base: Any, step: Any) -> Any:
        """The rate of a step, given the base rate as a tensor."""
        raise NotImplementedError

    def bind(self, steps_per_epoch: int, batch_size: int | None = None) -> Schedule:
        """This schedule with epochs and batches known; itself if they do not matter.

        Args:
            steps_per_epoch: the length of an epoch.
            batch_size: rows of a global batch.
        """
        return self

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {"learning_rate": self.learning_rate}


@keras.saving.register_keras_serializable("tfspark")
class Warmup(Schedule):
    """Adds `delta` to the rate at every step: `base + delta * min(step, warmup_steps)`.

    Args:
        delta: what each step adds.
        warmup_steps: after so many steps the rate stays. Default: it rises for ever, as BigDL's,
            which is what a part of a `SequentialSchedule` needs.
        learning_rate: the base rate.

    Example:
        >>> round(float(Warmup(0.02, learning_rate=0.1)(5)), 6)  # 0.1 + 0.02 * 5
        0.2
    """

    def __init__(
        self,
        delta: float,
        warmup_steps: int | None = None,
        *,
        learning_rate: float | None = None,
    ):
        super().__init__(learning_rate)
        require(
            warmup_steps is None or warmup_steps >= 1,
            "warmup_steps is at least 1",
            warmup_steps=warmup_steps,
        )
        self.delta = delta
        self.warmup_steps = warmup_steps

    @classmethod
    def to(cls, target: float, warmup_steps: int, learning_rate: float = 0.0) -> Warmup:
        """From `learning_rate` to `target` in so many equal steps, and on at `target`."""
        require(warmup_steps >= 1, "warmup_steps is at least 1", warmup_steps=warmup_steps)
        delta = (target - learning_rate) / warmup_steps
        return cls(delta, warmup_steps, learning_rate=learning_rate)

    def from_base(self, base: Any, step: Any) -> Any:
        """See the class."""
        step = ops.cast(step, "float32")
        if self.warmup_steps is not None:
            step = ops.minimum(step, float(self.warmup_steps))
        return base + self.delta * step

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {**super().get_config(), "delta": self.delta, "warmup_steps": self.warmup_steps}


@keras.saving.register_keras_serializable("tfspark")
class Poly(Schedule):
    """Polynomial decay to zero: `base * (1 - step / max_iteration) ** power`, then 0.

    As in BigDL, a Poly that is a part of a `SequentialSchedule` counts from the start of the
    training, so after a warm-up of 100 steps, `Poly(1, 1000)` begins at 0.9 of its base rate and
    still reaches zero at step 1,000.

    Args:
        power: the exponent.
        max_iteration: the step where the rate reaches 0.
        learning_rate: the base rate.
    """

    counts_from_start = True

    def __init__(self, power: float, max_iteration: int, *, learning_rate: float | None = None):
        super().__init__(learning_rate)
        require(max_iteration >= 1, "max_iteration is at least 1", max_iteration=max_iteration)
        require(power >= 0, "power is at least 0", power=power)
        self.power = power
        self.max_iteration = max_iteration

    def from_base(self, base: Any, step: Any) -> Any:
        """See the class."""
        left = 1.0 - ops.cast(step, "float32") / float(self.max_iteration)
        decayed = base * ops.power(ops.maximum(left, 0.0), self.power)
        return ops.where(left < 0.0, ops.zeros_like(decayed), decayed)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "power": self.power,
            "max_iteration": self.max_iteration,
        }


@keras.saving.register_keras_serializable("tfspark")
class Step(Schedule):
    """Times `gamma` every `step_size` steps: `base * gamma ** floor(step / step_size)`.

    Args:
        step_size: steps between two changes.
        gamma: the factor.
        learning_rate: the base rate.
    """

    def __init__(self, step_size: int, gamma: float, *, learning_rate: float | None = None):
        super().__init__(learning_rate)
        require(step_size >= 1, "step_size is at least 1", step_size=step_size)
        self.step_size = step_size
        self.gamma = gamma

    def from_base(self, base: Any, step: Any) -> Any:
        """See the class."""
        count = ops.floor_divide(ops.cast(step, "int64"), self.step_size)
        return base * ops.power(self.gamma, ops.cast(count, "float32"))

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {**super().get_config(), "step_size": self.step_size, "gamma": self.gamma}


@keras.saving.register_keras_serializable("tfspark")
class MultiStep(Schedule):
    """Times `gamma` at each of some steps: `base * gamma ** count(step_sizes <= step)`.

    Args:
        step_sizes: the steps where the rate changes, in ascending order.
        gamma: the factor.
        learning_rate: the base rate.
    """

    def __init__(
        self, step_sizes: Sequence[int], gamma: float, *, learning_rate: float | None = None
    ):
        super().__init__(learning_rate)
        step_sizes = list(step_sizes)
        require(
            bool(step_sizes) and step_sizes == sorted(set(step_sizes)),
            "step_sizes are different numbers of steps in ascending order",
            step_sizes=step_sizes,
        )
        self.step_sizes = step_sizes
        self.gamma = gamma

    def from_base(self, base: Any, step: Any) -> Any:
        """See the class."""
        boundaries = ops.convert_to_tensor(self.step_sizes, "int64")
        count = ops.sum(ops.cast(boundaries <= ops.cast(step, "int64"), "float32"))
        return base * ops.power(self.gamma, count)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {**super().get_config(), "step_sizes": self.step_sizes, "gamma": self.gamma}


@keras.saving.register_keras_serializable("tfspark")
class EpochStep(Schedule):
    """Times `gamma` every `step_size` epochs: `base * gamma ** floor(epochs / step_size)`.

    `epochs` counts finished epochs, so `EpochStep(30, 0.1)` trains 30 epochs at the base rate.
    (BigDL counts the running epoch, from 1, and changes the rate one epoch earlier.)

    Args:
        step_size: epochs between two changes.
        gamma: the factor.
        steps_per_epoch: filled in by tfspark when training starts; needed in plain Keras.
        learning_rate: the base rate.
    """

    def __init__(
        self,
        step_size: int,
        gamma: float,
        *,
        steps_per_epoch: int | None = None,
        learning_rate: float | None = None,
    ):
        super().__init__(learning_rate)
        require(step_size >= 1, "step_size is at least 1", step_size=step_size)
        require(
            steps_per_epoch is None or steps_per_epoch >= 1,
            "steps_per_epoch is at least 1",
            steps_per_epoch=steps_per_epoch,
        )
        self.step_size = step_size
        self.gamma = gamma
        self.steps_per_epoch = steps_per_epoch

    def bind(self, steps_per_epoch: int, batch_size: int | None = None) -> EpochStep:
        """This schedule for epochs of so many steps, unless it was told before."""
        if self.steps_per_epoch is not None:
            return self
        return EpochStep(**{**self.get_config(), "steps_per_epoch": steps_per_epoch})

    def from_base(self, base: Any, step: Any) -> Any:
        """See the class."""
        if self.steps_per_epoch is None:
            raise InvalidInputError(
                "EpochStep must know how long an epoch is. Received: steps_per_epoch=None. "
                "Give steps_per_epoch, or call bind(steps_per_epoch)."
            )
        count = ops.floor_divide(ops.cast(step, "int64"), self.step_size * self.steps_per_epoch)
        return base * ops.power(self.gamma, ops.cast(count, "float32"))

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "step_size": self.step_size,
            "gamma": self.gamma,
            "steps_per_epoch": self.steps_per_epoch,
        }
