"""Optimizers of tf-keras as those of Keras 3 with the same rule."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.eager.context import eager_mode

from tfspark.errors import UnsupportedRuleError
from tfspark.graph.keras_2 import is_keras_2

# What Keras 3 has, too, with the same formula.
_RULES = (
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Ftrl",
    "Lion",
    "Nadam",
    "RMSprop",
    "SGD",
)

_OTHERS = ("Nadam",)
"""Of `optimizers.legacy`, with a formula of their own."""

# Of a configuration of Keras 2; Keras 3 compiles by itself, and has no other kind of optimizer.
_LEFT_OUT = ("jit_compile", "is_legacy_optimizer", "learning_rate", "decay")


def is_legacy_optimizer(value: Any) -> bool:
    """Whether it is an optimizer of tf-keras, or of its `optimizers.legacy`."""
    return is_keras_2(value, "optimizers.Optimizer") or is_keras_2(
        value, "optimizers.legacy.Optimizer"
    )


def from_legacy_optimizer(optimizer: Any) -> keras.optimizers.Optimizer:
    """The optimizer of Keras 3 with the formula, the settings and the rate of one of tf-keras.

    A rate that callbacks assign to is read from the given one whenever it is needed. Where tf-keras
    itself strays from a formula, the formula is kept: its Nadam counts steps while a graph is
    traced, and divides by zero or multiplies momenta once per weight. A moving average of the
    weights (`use_ema`) begins with those of the first step, as in Keras 3, not with those before.

    Args:
        optimizer: of `tf_keras.optimizers` or `tf_keras.optimizers.legacy`.

    Raises:
        UnsupportedRuleError: Keras 3 has no such rule.
    """
    name = type(optimizer).__name__
    older = is_keras_2(optimizer, "optimizers.legacy.Optimizer")
    if name not in _RULES or (older and name in _OTHERS):
        raise UnsupportedRuleError(
            "An optimizer of tf-keras is applied as the one of Keras 3 that has its formula. "
            f"Received: {'legacy.' if older else ''}{name}. Use one of {', '.join(_RULES)}, or "
            "write the rule as a keras.optimizers.Optimizer."
        )
    if getattr(optimizer, "_exclude_from_weight_decay", None):
        raise UnsupportedRuleError(
            "Weights of a tf-keras model are excluded from weight decay by their names. Received: "
            f"{name} with exclude_from_weight_decay(var_list=…). Use var_names=[…]."
        )
    config = {
        key: shortest(value) if isinstance(value, np.floating) else value
        for key, value in optimizer.get_config().items()
        if key not in _LEFT_OUT
    }
    with eager_mode():
        found = getattr(keras.optimizers, name)(learning_rate=_rate_of(optimizer), **config)
    excluded = getattr(optimizer, "_exclude_from_weight_decay_names", None)
    if excluded:
        found.exclude_from_weight_decay(var_names=list(excluded))
    return found


def _rate_of(optimizer: Any) -> Any:
    """A schedule of Keras 3, or a function that reads the rate."""
    decay = 0.0
    if is_keras_2(optimizer, "optimizers.legacy.Optimizer"):
        decay = float(optimizer._initial_decay)
        optimizer._create_hypers()  # a variable, for callbacks to assign to
        rate = optimizer._get_hyper("learning_rate")
    else:
        rate = optimizer._learning_rate
    if is_keras_2(rate, "optimizers.schedules.LearningRateSchedule"):
        return _Schedule(rate, decay)

    def current() -> float:
        with eager_mode():
            return shortest(rate.numpy())

    return _Schedule(lambda step: current(), decay) if decay else current


def shortest(number: Any) -> float:
    """The shortest decimal number of a float32: 0.001, not 0.0010000000474974513."""
    return float(str(np.float32(number)))


class _Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule of tf-keras, and the decay over steps that its legacy optimizers have.

    Args:
        schedule: from a step to a rate.
        decay: d in `rate / (1 + d * step)`.
    """

    def __init__(self, schedule: Any, decay: float):
        super().__init__()
        self._schedule, self._decay = schedule, decay

    def __call__(self, step: Any) -> Any:
        return self._schedule(step) / (1.0 + self._decay * tf.cast(step, tf.float32))

    def get_config(self) -> dict[str, Any]:
        raise NotImplementedError("It is made anew of the optimizer of tf-keras.")
