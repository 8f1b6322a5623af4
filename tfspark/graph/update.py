"""A Keras optimizer's step on one shard, as a pure graph.

A Keras optimizer is cloned from its config, built on one vector and traced; its variables become
inputs and outputs. So the rule is Keras's own code, whatever it does, as long as it treats each
element by itself: then a step on every slice is the step on the whole. What needs more than its own
element is either taken out of the rule (clipping by norm, see clipping.py) or refused by name.

The learning rate is an input: the driver evaluates schedules and sends numbers. A rate of 0 leaves
the weights as they are, bit for bit, whatever the rule, also where plain Keras would go on by its
momentum.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.eager.context import eager_mode

from tfspark.errors import InvalidInputError, UnsupportedRuleError
from tfspark.graph.clipping import Clipping, scales, tensor_squared_norms
from tfspark.graph.program import UpdateProgram, UpdateSlot
from tfspark.graphdef.loader import load
from tfspark.graphdef.pure import PureGraph, TensorInfo
from tfspark.graphdef.variables import Purified, call, trace

__all__ = [
    "Clipping",
    "clipping_of",
    "decay_mask",
    "learning_rate_of",
    "optimizer_from",
    "scales",
    "tensor_squared_norms",
    "update_program",
]

# The length of the vector that a rule is traced on; the graph then takes any length.
_TRACED_SIZE = 5

# Clipping by norm is the engines'; accumulation and overwriting are conditionals, which
# _update_graph writes as selections. The loss is not scaled here, so neither are gradients.
_TAKEN_OUT = (
    "clipnorm",
    "global_clipnorm",
    "gradient_accumulation_steps",
    "ema_overwrite_frequency",
    "loss_scale_factor",
)
_OWN_STATE = frozenset({*_TAKEN_OUT, "name", "built"})

_REFUSED = {
    "LossScaleOptimizer": "it decides by all gradients whether to step; use the optimizer in it",
    "MultiOptimizer": "give a dict of variable-name prefix to optimizer instead",
    "Adafactor": "it keeps means over rows and columns of a tensor; use Adam or Lion",
    "Muon": "it orthogonalises whole matrices; use AdamW",
    "Lamb": "it scales by the norms of whole tensors; use AdamW, with clipnorm if need be",
    "LARS": "it scales by the norms of whole tensors; use SGD, with clipnorm if need be",
}


def optimizer_from(value: Any) -> keras.optimizers.Optimizer:
    """A Keras optimizer whose rule can be applied to shards, from an optimizer or its name.

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
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise _not_an_optimizer(value)
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _REFUSED:
            raise UnsupportedRuleError(
                "An optimizer's rule must treat every element by itself to be applied to shards. "
                f"Received: {type(optimizer).__name__}: {_REFUSED[cls.__name__]}."
            )
    return optimizer


def learning_rate_of(optimizer: keras.optimizers.Optimizer) -> Any:
    """The optimizer's learning rate: a float, a schedule, or a function without arguments."""
    rate = optimizer._learning_rate
    if not isinstance(rate, keras.Variable):
        return rate
    if tf.is_symbolic_tensor(rate.value.handle):
        # Made in a TF1 graph: the value lies in some session, its initial value in the graph.
        return _shortest(tf.get_static_value(rate.value.initial_value))
    with eager_mode():
        return _shortest(rate.value.numpy())


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


def update_program(
    optimizer: keras.optimizers.Optimizer,
    dtype: str = "float32",
    *,
    clip_value: tuple[float, float] | None = None,
    weight_decay: bool = True,
) -> UpdateProgram:
    """The optimizer's step on a shard of any length.

    Args:
        optimizer: of Keras. It is neither changed nor are its slots read: training starts with
            fresh ones. Its learning rate and clipping by norm are left to the caller
            (`learning_rate_of`, `clipping_of`).
        dtype: of the weights, "float32" or "float64".
        clip_value: bounds of every element of the gradient, beside the optimizer's own `clipvalue`.
        weight_decay: false for weights that are excluded from the optimizer's weight decay.

    Returns:
        See `UpdateProgram`. Slots have the names of Keras ("iteration", "momentum", "velocity",
        "average" for `use_ema`, …).

    Raises:
        UnsupportedRuleError: the rule cannot be applied to shards; names it and the remedy.

    Example:
        >>> step = load(update_program(keras.optimizers.SGD(0.5)).graph)
        >>> shard, iteration = step(
        ...     np.float32([1, 2]), np.float32([3, 4]), np.float64(2), np.float32(1),
        ...     np.float32(0.5), np.int64(0),
        ... )
        >>> shard.numpy()  # [1, 2] - 0.5 * [3, 4] / 2
        array([0.25, 1.  ], dtype=float32)
    """
    optimizer = optimizer_from(optimizer)
    name = type(optimizer).__name__
    every = optimizer.gradient_accumulation_steps
    if every and (optimizer.clipnorm or optimizer.global_clipnorm or optimizer.use_ema):
        raise UnsupportedRuleError(
            "gradient_accumulation_steps goes together with clipvalue, but not with clipnorm, "
            f"global_clipnorm or use_ema. Received: {name} with both. Use a larger batch_size, "
            "which needs no more memory if tfspark splits each batch (accumulation_steps)."
        )
    with eager_mode():
        slots, pure = _traced_rule(optimizer, dtype, weight_decay)
        if not type(optimizer).__module__.startswith("keras."):
            _probe(optimizer, slots, pure, dtype, weight_decay)
        if every:
            slots += [
                UpdateSlot("gradient_accumulator", "vector", dtype, 0.0),
                UpdateSlot("accumulation", "scalar", "int64", 0.0),
            ]
        return UpdateProgram(
            name,
            tuple(slots),
            _update_graph(
                slots,
                pure,
                dtype,
                clip_value,
                every,
                optimizer.ema_overwrite_frequency if optimizer.use_ema else None,
            ),
        )


def _traced_rule(
    optimizer: keras.optimizers.Optimizer, dtype: str, weight_decay: bool
) -> tuple[list[UpdateSlot], Purified]:
    """The rule's slots, and its pure graph over (gradient, shard, rate, *slots)."""
    rule = _clone(optimizer, weight_decay)
    # Not zeros, so that a slot that starts from the weights shows.
    start = np.linspace(0.5, 1.5, _TRACED_SIZE)
    shard = keras.Variable(start, dtype=dtype, name="shard")
    rule.build([shard])
    rate = rule._learning_rate
    if not isinstance(rate, keras.Variable):
        raise UnsupportedRuleError(
            "An optimizer must take its learning_rate from its config, so that tfspark can feed "
            f"it. Received: {type(rule).__name__}, whose from_config(config) does not pass "
            "learning_rate on to Optimizer.__init__."
        )
    held = [variable for variable in rule.variables if variable is not rate]
    slots = [_slot(rule, variable, dtype) for variable in held]
    if len({slot.name for slot in slots}) != len(slots):
        raise UnsupportedRuleError(
            "The slots of an optimizer need different names. "
            f"Received: {type(rule).__name__} with {[slot.name for slot in slots]}."
        )

    def step(gradient: Any) -> tuple[()]:
        rule.apply([gradient], [shard])
        return ()

    pure = trace(step, [tf.TensorSpec([_TRACED_SIZE], dtype)], [shard, rate, *held])
    if len(pure.variables) != 2 + len(held):
        unknown = [variable.name for variable in pure.variables[2 + len(held) :]]
        raise UnsupportedRuleError(
            "An optimizer must create its variables in build(), with add_variable or "
            f"add_optimizer_variables. Received: {type(rule).__name__}, which uses {unknown}."
        )
    return slots, pure


def _clone(optimizer: keras.optimizers.Optimizer, weight_decay: bool) -> Any:
    """A fresh optimizer of the same config, without what tfspark does around the rule."""
    # get_config() reads the learning rate, which a TF1 graph or a schedule without a config of its
    # own does not allow; so it is asked of a shadow of the optimizer that has none.
    shadow = object.__new__(type(optimizer))
    shadow.__dict__.update(vars(optimizer))
    shadow.__dict__["_learning_rate"] = None
    config = shadow.get_config()
    config["learning_rate"] = 0.0
    for key in _TAKEN_OUT:
        if config.get(key) is not None:
            config[key] = None
    if "name" in config:
        config["name"] = "rule"  # Keras numbers names; equal rules should make equal graphs
    try:
        rule = type(optimizer).from_config(config)
    except TypeError as error:
        raise _lost(optimizer, f"from_config failed: {error}") from error
    changed = [
        key
        for key, value in vars(optimizer).items()
        if isinstance(value, bool | int | float | str)
        and not key.startswith("_")
        and key not in _OWN_STATE
        and getattr(rule, key, None) != value
    ]
    if changed:
        raise _lost(optimizer, f"from_config does not bring back {', '.join(changed)}")
    if not weight_decay:
        rule.weight_decay = None  # some rules take no None in their config
    return rule


def _lost(optimizer: Any, what: str) -> UnsupportedRuleError:
    return UnsupportedRuleError(
        "An optimizer must be described by its get_config(), so that tfspark can build it anew on "
        f"a shard. Received: {type(optimizer).__name__}: {what}. Return every argument of "
        "__init__ from get_config()."
    )


def _slot(rule: Any, variable: keras.Variable, dtype: str) -> UpdateSlot:
    """What a variable of the rule is, or why it cannot be sharded."""
    attribute = next((key for key, value in vars(rule).items() if value is variable), None)
    name = variable.name.removeprefix("shard_")
    if attribute and variable is not rule._iterations:
        name = attribute.lstrip("_")
    value = variable.numpy()
    shape = tuple(value.shape)
    kinds = {(): "scalar", (_TRACED_SIZE,): "vector"}
    if shape not in kinds:
        raise UnsupportedRuleError(
            "An optimizer's variables must be scalars or of the shape of the weights to be "
            f"sharded. Received: {type(rule).__name__} with {name!r} of shape {shape} for weights "
            f"of shape ({_TRACED_SIZE},). Use an elementwise optimizer such as Adam."
        )
    if value.size and np.any(value != value.flat[0]):
        raise UnsupportedRuleError(
            "An optimizer's variables must start from a constant to be sharded. Received: "
            f"{type(rule).__name__}, whose {name!r} starts from the weights. Use an optimizer "
            "such as Adam or AdamW."
        )
    return UpdateSlot(name, kinds[shape], str(value.dtype), float(value.flat[0]))


def _update_graph(
    slots: Sequence[UpdateSlot],
    pure: Purified,
    dtype: str,
    clip_value: tuple[float, float] | None = None,
    every: int | None = None,
    overwrite_every: int | None = None,
) -> PureGraph:
    """The contract of `UpdateProgram` around a traced rule.

    `every`: gradient_accumulation_steps; `overwrite_every`: ema_overwrite_frequency.
    """
    names = [slot.name for slot in slots]
    graph = tf.Graph()
    with graph.as_default():

        def placeholder(kind: Any, shape: Any, name: str) -> Any:
            return tf.compat.v1.placeholder(kind, shape, name)

        shard = placeholder(dtype, [None], "shard")
        gradient_sum = placeholder(dtype, [None], "gradient_sum")
        divisor = placeholder("float64", [], "divisor")
        scale = placeholder(dtype, None, "scale")
        rate = placeholder("float32", [], "learning_rate")
        old = [
            placeholder(slot.dtype, [None] if slot.kind == "vector" else [], f"slot_{i}")
            for i, slot in enumerate(slots)
        ]
        inputs = [shard, gradient_sum, divisor, scale, rate, *old]

        gradient = gradient_sum / tf.cast(divisor, dtype) * scale
        if clip_value is not None:
            gradient = tf.clip_by_value(gradient, *clip_value)
        if every:
            # As Keras: every k-th step applies the mean of k gradients, the others only add.
            *held, accumulated, count = old
            total = gradient + accumulated
            is_due = tf.equal((count + 1) % every, 0)
            new_shard, _, *new = call(pure.graph, [total / every, shard, rate, *held])
            new_shard = tf.where(is_due, new_shard, shard)
            new = [tf.where(is_due, a, b) for a, b in zip(new, held, strict=True)]
            new += [tf.where(is_due, tf.zeros_like(total), total), count + 1]
        else:
            new_shard, _, *new = call(pure.graph, [gradient, shard, rate, *old])
        if overwrite_every:
            iteration, average = old[names.index("iteration")], new[names.index("average")]
            is_due = tf.equal((iteration + 1) % overwrite_every, 0)
            new_shard = tf.where(is_due, average, new_shard)
        new_shard = tf.where(tf.equal(rate, 0), shard, new_shard)
        outputs = [tf.identity(tensor) for tensor in (new_shard, *new)]
    return PureGraph(
        graph_def=graph.as_graph_def().SerializeToString(deterministic=True),
        inputs=tuple(TensorInfo(x.op.name, x.dtype.name, _shape(x)) for x in inputs),
        outputs=tuple(TensorInfo(x.name, x.dtype.name, _shape(x)) for x in outputs),
    )


def _probe(
    optimizer: Any, slots: Sequence[UpdateSlot], pure: Purified, dtype: str, weight_decay: bool
) -> None:
    """Refuses a rule that gives different numbers on a matrix, on a vector and on its halves."""
    step = load(_update_graph(slots, pure, dtype))
    name = type(optimizer).__name__
    rng = np.random.default_rng(0)
    size, rate = 64, np.float32(0.01)
    start = rng.normal(size=size).astype(dtype)
    gradients = rng.normal(size=(3, size)).astype(dtype)

    def steps(part: slice) -> np.ndarray:
        shard: Any = start[part]
        values: list[Any] = [
            np.full(len(shard) if slot.kind == "vector" else (), slot.initial, slot.dtype)
            for slot in slots
        ]
        for gradient in gradients:
            fixed = (np.float64(1), np.asarray(1, dtype), rate)
            shard, *values = step(shard, gradient[part], *fixed, *values)
        return np.asarray(shard)

    rule = _clone(optimizer, weight_decay)
    matrix = keras.Variable(start.reshape(8, 8), dtype=dtype)
    rule.build([matrix])
    rule._learning_rate.assign(rate)
    for gradient in gradients:
        rule.apply([tf.constant(gradient.reshape(8, 8))], [matrix])
    try:
        halves = np.concatenate([steps(slice(0, size // 2)), steps(slice(size // 2, size))])
        whole = steps(slice(0, size))
    except (tf.errors.InvalidArgumentError, ValueError) as error:
        raise UnsupportedRuleError(
            "An optimizer's rule must work on a vector of any length to be applied to shards. "
            f"Received: {name}, which does not ({error}). Use tf.shape or ops.zeros_like where it "
            "uses a static shape."
        ) from error
    for what, other in (("a matrix", matrix.numpy().reshape(-1)), ("its halves", halves)):
        if not np.allclose(whole, other, rtol=1e-4, atol=1e-6, equal_nan=True):
            raise UnsupportedRuleError(
                "An optimizer's rule must treat every element by itself to be applied to shards. "
                f"Received: {name}, whose step on a vector is not its step on {what}. "
                "Use an elementwise optimizer such as Adam."
            )


def _shape(tensor: Any) -> tuple[int | None, ...] | None:
    return None if tensor.shape.rank is None else tuple(tensor.shape.as_list())


def _shortest(rate: Any) -> float:
    """The shortest decimal number of a float32: 0.001, not 0.0010000000474974513."""
    return float(str(np.float32(rate)))


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
