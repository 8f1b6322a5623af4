"""What a Keras optimizer says of itself: its rate, its clipping, what it does to which weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.eager.context import eager_mode

from tfspark.errors import InvalidInputError, UnsupportedRuleError
from tfspark.graph.clipping import Clipping
from tfspark.graph.lars import LARS
from tfspark.graph.legacy_optimizers import (
    from_legacy_optimizer,
    is_legacy_optimizer,
    shortest,
)

_REFUSED = {
    "LossScaleOptimizer": "it decides by all gradients whether to step; use the optimizer in it",
    "MultiOptimizer": "give a dict of variable-name prefix to optimizer instead",
    "Adafactor": "it keeps means over rows and columns of a tensor; use Adam or Lion",
    "Muon": "it orthogonalises whole matrices; use AdamW",
}


def optimizer_from(value: Any) -> keras.optimizers.Optimizer:
    """A Keras 3 optimizer whose rule can be applied to shards, from an optimizer or its name.

    One of tf-keras becomes the one of Keras 3 that has its formula.

    Raises:
        UnsupportedRuleError: the rule cannot be sharded, or does not scale by a learning rate that
            can be fed.
        InvalidInputError: anything but a Keras optimizer.
    """
    optimizer = value
    if isinstance(value, str):
        try:
            with eager_mode():
                optimizer = keras.optimizers.get(value)
        except ValueError as error:
            raise _not_an_optimizer(value) from error
    legacy = is_legacy_optimizer(optimizer)
    if not legacy and not isinstance(optimizer, keras.optimizers.Optimizer):
        raise _not_an_optimizer(value)
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _REFUSED:
            raise UnsupportedRuleError(
                "An optimizer's rule must be elementwise, up to sums over a tensor, to be applied "
                f"to shards. Received: {type(optimizer).__name__}: {_REFUSED[cls.__name__]}."
            )
    return from_legacy_optimizer(optimizer) if legacy else optimizer


def learning_rate_of(optimizer: keras.optimizers.Optimizer) -> Any:
    """The optimizer's learning rate: a float, a schedule, or a function without arguments.

    A rate in a variable is a function, because callbacks of Keras assign to it between epochs.
    """
    rate = optimizer._learning_rate
    if not isinstance(rate, keras.Variable):
        return rate
    if tf.is_symbolic_tensor(rate.value.handle):
        # Made in a TF1 graph: the value lies in some session, its initial value in the graph.
        return shortest(tf.get_static_value(rate.value.initial_value))

    def current() -> float:
        with eager_mode():
            return shortest(rate.value.numpy())

    return current


def clipping_of(optimizer: keras.optimizers.Optimizer) -> Clipping:
    """How the optimizer clips. `value` is for information: the update program clips by itself."""
    bound = optimizer.clipvalue
    return Clipping(
        value=(-bound, bound) if bound else None,
        norm=optimizer.clipnorm or None,
        global_norm=optimizer.global_clipnorm or None,
    )


def decay_mask(
    optimizer: keras.optimizers.Optimizer,
    names: Sequence[str],
    variables: Sequence[Any] | None = None,
) -> list[bool]:
    """Whether the optimizer's weight decay applies to each weight.

    Args:
        optimizer: on which `exclude_from_weight_decay` may have been called.
        names: of the weights.
        variables: the variables of these names, needed where variables are excluded, not names.

    Returns:
        One bool per name; all true where there is no weight decay.

    Raises:
        InvalidInputError: variables are excluded, and none were given.
    """
    excluded = getattr(optimizer, "_exclude_from_weight_decay", None)
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    if not optimizer.weight_decay or not (excluded or pattern):
        return [True] * len(names)
    if excluded and variables is None:
        raise InvalidInputError(
            "This program knows its weights by name only. Received: an optimizer with "
            "exclude_from_weight_decay(var_list=…). Use var_names=[…]."
        )
    mask = [not (pattern and re.search(pattern, name)) for name in names]
    if excluded and variables is not None:
        keys = [optimizer._var_key(variable) for variable in variables]
        mask = [m and key not in excluded for m, key in zip(mask, keys, strict=True)]
    return mask


def adaptation_mask(
    optimizer: keras.optimizers.Optimizer,
    names: Sequence[str],
    variables: Sequence[Any] | None = None,
) -> list[bool]:
    """Whether the optimizer fits its rate to the norms of each weight, if its kind ever does.

    Args:
        optimizer: any; only a `LARS` makes a difference between weights.
        names: of the weights.
        variables: the variables of these names, needed where their shapes matter.

    Returns:
        One bool per name; all true where the optimizer makes no difference.

    Raises:
        InvalidInputError: the shapes matter, and no variables were given.
    """
    if not isinstance(optimizer, LARS) or optimizer.adapt_vectors:
        return [True] * len(names)
    if variables is None:
        raise InvalidInputError(
            "This program knows its weights by name only. Received: a LARS that adapts tensors of "
            "two and more dimensions. Use adapt_vectors=True."
        )
    return [optimizer.adapts(variable) for variable in variables]


def _not_an_optimizer(value: Any) -> InvalidInputError:
    hint = ""
    if isinstance(value, type):
        hint = f" Make an instance: {value.__name__}(…)."
    elif hasattr(value, "compute_gradients"):
        hint = " Optimizers of tf.compat.v1.train have a namesake in keras.optimizers."
    elif type(value).__module__.startswith("torch"):
        hint = " Optimizers of torch have a namesake in keras.optimizers."
    return InvalidInputError(
        "An optimizer is one of keras.optimizers, or its name such as 'adam'. "
        f"Received: {value!r}.{hint}"
    )
