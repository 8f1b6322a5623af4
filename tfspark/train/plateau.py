"""A learning rate that falls when a score stops getting better."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import keras
from keras import ops

from tfspark.errors import InvalidInputError, require
from tfspark.train.schedules import Schedule


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
        >>> from tfspark.train.rates import rate_at
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
        require(0 < factor < 1, "factor lies between 0 and 1", factor=factor)
        require(mode in ("min", "max"), "mode is 'min' or 'max'", mode=mode)
        require(patience >= 0, "patience is at least 0", patience=patience)
        require(cooldown >= 0, "cooldown is at least 0", cooldown=cooldown)
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
