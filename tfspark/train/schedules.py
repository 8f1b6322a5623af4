"""Learning rates that change with the step, the epoch or the score.

All are Keras `LearningRateSchedule`s: hand one to any Keras optimizer, here or in plain Keras. The
arguments come in BigDL's order, whose optimizers held the base rate themselves; here the schedule
holds it, as everywhere in Keras, in the keyword `learning_rate`.

Three kinds of facts reach a schedule, each in its own way:

* the step, as the argument of the call;
* the steps of an epoch (`EpochStep`), through `bind`, which returns a bound schedule;
* scores (`Plateau`), through `observe`, a pure function from one `PlateauState` to the next. The
  state is the caller's to keep and to save; `rate_at(schedule, step, state)` takes it.

Formulas and names: BigDL 2, `SGD.scala` (Apache-2.0), unless a class says otherwise.

Example:
    >>> schedule = SequentialSchedule(learning_rate=0.01)
    >>> schedule = schedule.add(Warmup(0.001), 90).add(MultiStep([1000, 2000], 0.1), 10_000)
    >>> optimizer = keras.optimizers.SGD(schedule, momentum=0.9)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import keras
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from tfspark.errors import InvalidInputError


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
            _require(
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

    def bind(self, steps_per_epoch: int) -> Schedule:
        """This schedule with the length of an epoch known; itself if it does not matter."""
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
        _require(
            warmup_steps is None or warmup_steps >= 1,
            "warmup_steps is at least 1",
            warmup_steps=warmup_steps,
        )
        self.delta = delta
        self.warmup_steps = warmup_steps

    @classmethod
    def to(cls, target: float, warmup_steps: int, learning_rate: float = 0.0) -> Warmup:
        """From `learning_rate` to `target` in so many equal steps, and on at `target`."""
        _require(warmup_steps >= 1, "warmup_steps is at least 1", warmup_steps=warmup_steps)
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
        _require(max_iteration >= 1, "max_iteration is at least 1", max_iteration=max_iteration)
        _require(power >= 0, "power is at least 0", power=power)
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
        _require(step_size >= 1, "step_size is at least 1", step_size=step_size)
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
        _require(
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
        _require(step_size >= 1, "step_size is at least 1", step_size=step_size)
        _require(
            steps_per_epoch is None or steps_per_epoch >= 1,
            "steps_per_epoch is at least 1",
            steps_per_epoch=steps_per_epoch,
        )
        self.step_size = step_size
        self.gamma = gamma
        self.steps_per_epoch = steps_per_epoch

    def bind(self, steps_per_epoch: int) -> EpochStep:
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


@dataclass(frozen=True)
class PlateauState:
    """What a `Plateau` remembers; JSON can hold `to_dict()`.

    Attributes:
        scale: product of all reductions so far.
        best: the best score so far; None before the first.
        wait: observations since then that were not better.
        cooldown: observations to come during which none is counted.
    """

    scale: float = 1.0
    best: float | None = None
    wait: int = 0
    cooldown: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint; `PlateauState(**d)` is the inverse."""
        return asdict(self)


@keras.saving.register_keras_serializable("tfspark")
class Plateau(Schedule):
    """Times `factor` when a score stops getting better, as BigDL's Plateau.

    A pure policy: the driver calls `observe` with each score, once per validation, keeps the state
    and computes rates by `rate_at`. Plain Keras has no way to tell a schedule its scores; use
    `keras.callbacks.ReduceLROnPlateau` there.

    Args:
        monitor: which score, the name of a metric or `"loss"`.
        factor: what the rate is multiplied with, below 1.
        patience: scores without improvement that are tolerated; the next one reduces the rate.
        mode: `"min"`: smaller scores are better; `"max"`: larger ones.
        epsilon: a score is better only if it is by more than this.
        cooldown: scores after a reduction that are not counted.
        min_lr: the rate never falls below this.
        learning_rate: the base rate.

    Example:
        >>> plateau = Plateau("loss", factor=0.5, patience=1, learning_rate=0.1)
        >>> state = plateau.initial_state()
        >>> for loss in (1.0, 1.0, 1.0):
        ...     state = plateau.observe(state, loss)
        >>> round(rate_at(plateau, 0, state), 6)
        0.05
    """

    def __init__(
        self,
        monitor: str,
        factor: float = 0.1,
        patience: int = 10,
        mode: str = "min",
        epsilon: float = 1e-4,
        cooldown: int = 0,
        min_lr: float = 0.0,
        *,
        learning_rate: float | None = None,
    ):
        super().__init__(learning_rate)
        _require(0 < factor < 1, "factor lies between 0 and 1", factor=factor)
        _require(mode in ("min", "max"), "mode is 'min' or 'max'", mode=mode)
        _require(patience >= 0, "patience is at least 0", patience=patience)
        _require(cooldown >= 0, "cooldown is at least 0", cooldown=cooldown)
        self.monitor = monitor
        self.factor = factor
        self.patience = patience
        self.mode = mode
        self.epsilon = epsilon
        self.cooldown = cooldown
        self.min_lr = min_lr

    def initial_state(self) -> PlateauState:
        """The state before the first score."""
        return PlateauState()

    def observe(self, state: PlateauState, score: float) -> PlateauState:
        """The state after one more score. A score that is not a number is never better."""
        if state.cooldown > 0:
            state = replace(state, cooldown=state.cooldown - 1, wait=0)
        if self._is_better(score, state.best):
            return replace(state, best=float(score), wait=0)
        if state.cooldown > 0:
            return state
        if state.wait >= self.patience:
            # The score that reduces the rate is itself the first of the next wait.
            scale = state.scale * self.factor
            return replace(state, scale=scale, cooldown=self.cooldown, wait=1)
        return replace(state, wait=state.wait + 1)

    def from_state(self, base: Any, state: PlateauState) -> Any:
        """The rate, given the base rate and the state."""
        floor = ops.minimum(base, self.min_lr)
        return ops.maximum(base * state.scale, floor)

    def from_base(self, base: Any, step: Any) -> Any:
        """Refused: a step is not enough, see the class."""
        raise InvalidInputError(
            "Plateau depends on scores, which plain Keras cannot tell a schedule. Received: a call "
            "with a step. Use rate_at(plateau, step, state), or in plain Keras "
            "keras.callbacks.ReduceLROnPlateau."
        )

    def _is_better(self, score: float, best: float | None) -> bool:
        if math.isnan(score):
            return False
        if best is None:
            return True
        return score < best - self.epsilon if self.mode == "min" else score > best + self.epsilon

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "monitor": self.monitor,
            "factor": self.factor,
            "patience": self.patience,
            "mode": self.mode,
            "epsilon": self.epsilon,
            "cooldown": self.cooldown,
            "min_lr": self.min_lr,
        }


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
        _require(max_iteration >= 1, "max_iteration is at least 1", max_iteration=max_iteration)
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

    def bind(self, steps_per_epoch: int) -> SequentialSchedule:
        """This schedule with all its parts bound."""
        return SequentialSchedule(
            self.iteration_per_epoch or steps_per_epoch,
            learning_rate=self.learning_rate,
            parts=self.parts,
        )

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


def bind(schedule: Any, steps_per_epoch: int) -> Any:
    """A learning rate of any kind, bound to the length of an epoch where that matters."""
    return schedule.bind(steps_per_epoch) if isinstance(schedule, Schedule) else schedule


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


def _require(condition: bool, rule: str, **received: Any) -> None:
    if not condition:
        values = ", ".join(f"{name}={value!r}" for name, value in received.items())
        raise InvalidInputError(f"{rule}. Received: {values}.")
