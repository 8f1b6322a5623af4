"""A Keras optimizer's step on one shard, as a pure graph.

A Keras optimizer is cloned from its config, built on one vector and traced; its variables become
inputs and outputs. So the rule is Keras's own code, whatever it does, as long as it treats each
element by itself: then a step on every slice is the step on the whole. What needs more than its own
element is taken out of the rule (clipping by norm, see clipping.py; sums over a whole tensor, see
sums.py) or refused by name.

The learning rate is an input: the driver evaluates schedules and sends numbers. A rate of 0 leaves
the weights as they are, bit for bit, whatever the rule, also where plain Keras would go on by its
momentum.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.eager.context import eager_mode

from tfspark.errors import UnsupportedRuleError
from tfspark.graph.lars import LARS
from tfspark.graph.optimizers import optimizer_from
from tfspark.graph.program import UpdateProgram, UpdateSlot
from tfspark.graph.sums import CutRule, cut_at_sums
from tfspark.graphdef.loader import load
from tfspark.graphdef.pure import PureGraph, TensorInfo
from tfspark.graphdef.variables import call, trace

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


def update_program(
    optimizer: keras.optimizers.Optimizer,
    dtype: str = "float32",
    *,
    clip_value: tuple[float, float] | None = None,
    weight_decay: bool = True,
    adaptation: bool = True,
) -> UpdateProgram:
    """The optimizer's step on a shard of any length.

    Args:
        optimizer: of Keras. It is neither changed nor are its slots read: training starts with
            fresh ones. Its learning rate and clipping by norm are left to the caller
            (see optimizers.py).
        dtype: of the weights, "float32" or "float64".
        clip_value: bounds of every element of the gradient, beside the optimizer's own `clipvalue`.
        weight_decay: false for weights that are excluded from the optimizer's weight decay.
        adaptation: false for weights whose norms a `LARS` does not look at.

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
        make = partial(fresh_rule, optimizer, weight_decay, adaptation)
        slots, rule = _traced_rule(make(), dtype)
        if not type(optimizer).__module__.startswith(("keras.", "tfspark.")):
            _probe(make(), _program(name, slots, rule, dtype), dtype)
        if every:
            slots += [
                UpdateSlot("gradient_accumulator", "vector", dtype, 0.0),
                UpdateSlot("accumulation", "scalar", "int64", 0.0),
            ]
        overwrite_every = optimizer.ema_overwrite_frequency if optimizer.use_ema else None
        return _program(name, slots, rule, dtype, clip_value, every, overwrite_every)


def _traced_rule(rule: Any, dtype: str) -> tuple[list[UpdateSlot], CutRule]:
    """The slots of a fresh optimizer, and its rule over (gradient, shard, rate, *slots)."""
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
    return slots, cut_at_sums(pure.graph, type(rule).__name__, _TRACED_SIZE)


def fresh_rule(
    optimizer: keras.optimizers.Optimizer, weight_decay: bool = True, adaptation: bool = True
) -> Any:
    """A fresh optimizer of the same config, without what tfspark does around the rule.

    Args:
        optimizer: of Keras 3.
        weight_decay, adaptation: as of `update_program`.
    """
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
    if isinstance(rule, LARS):
        rule.adapt_vectors = True  # a slice is a vector, whatever the shape of its tensor
        rule.trust_coefficient = rule.trust_coefficient if adaptation else None
    return rule


def _lost(optimizer: Any, what: str) -> UnsupportedRuleError:
    return UnsupportedRuleError(
        "An optimizer must be described by its get_config(), so that tfspark can build it anew on "
        f"a shard. Received: {type(optimizer).__name__}: {what}. Return every argument of "
        "__init__ from get_config()."
    )


def slot_name(rule: Any, variable: keras.Variable) -> str:
    """What a variable of a rule that was built on a variable named "shard" is called as a slot."""
    attribute = next((key for key, value in vars(rule).items() if value is variable), None)
    if attribute and variable is not rule._iterations:
        return attribute.lstrip("_")
    return variable.name.removeprefix("shard_")


def _slot(rule: Any, variable: keras.Variable, dtype: str) -> UpdateSlot:
    """What a variable of the rule is, or why it cannot be sharded."""
    name = slot_name(rule, variable)
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


def _program(
    name: str,
    slots: Sequence[UpdateSlot],
    rule: CutRule,
    dtype: str,
    clip_value: tuple[float, float] | None = None,
    every: int | None = None,
    overwrite_every: int | None = None,
) -> UpdateProgram:
    """The contract of `UpdateProgram` around a traced rule.

    `every`: gradient_accumulation_steps; `overwrite_every`: ema_overwrite_frequency.
    """
    terms = None
    if rule.terms is not None:
        with tf.Graph().as_default():
            given = _Given(slots, dtype, clip_value, every)
            outputs = call(rule.terms, [given.gradient, given.shard, given.rate, *given.held])
            terms = _pure(given.inputs, [tf.cast(tensor, dtype) for tensor in outputs])
    with tf.Graph().as_default():
        given = _Given(slots, dtype, clip_value, every)
        shard, rate, held = given.shard, given.rate, given.held
        sums = [_placeholder(dtype, [None], f"sum_{i}") for i in range(len(rule.sum_dtypes))]
        new_shard, _, *new = call(
            rule.rest, [given.gradient, shard, rate, *held, *_cast(sums, rule.sum_dtypes)]
        )
        for slot, tensor in zip(slots, new, strict=False):
            if slot.kind == "scalar" and tensor.shape.rank != 0:
                raise UnsupportedRuleError(
                    "An optimizer's scalar variables must not depend on the weights to be sharded. "
                    f"Received: {name}, whose {slot.name!r} depends on a sum over a tensor. Use an "
                    "optimizer such as Lamb or LARS, which remember no norms."
                )
        if every:
            # As Keras: every k-th step applies the mean of k gradients, the others only add.
            is_due = tf.equal((given.count + 1) % every, 0)
            new_shard = tf.where(is_due, new_shard, shard)
            new = [tf.where(is_due, a, b) for a, b in zip(new, held, strict=True)]
            total = given.total
            new += [tf.where(is_due, tf.zeros_like(total), total), given.count + 1]
        if overwrite_every:
            names = [slot.name for slot in slots]
            iteration, average = held[names.index("iteration")], new[names.index("average")]
            is_due = tf.equal((iteration + 1) % overwrite_every, 0)
            new_shard = tf.where(is_due, average, new_shard)
        new_shard = tf.where(tf.equal(rate, 0), shard, new_shard)
        return UpdateProgram(
            name, tuple(slots), _pure([*given.inputs, *sums], [new_shard, *new]), terms
        )


class _Given:
    """What is given to an `UpdateProgram`, in the graph that is being built.

    Attributes:
        inputs: 1 to 6 of the contract.
        shard, rate: two of them.
        held: the slots of the rule.
        gradient: what the rule sees.
        total, count: with accumulation, the sum of gradients so far and the steps before this one.
    """

    def __init__(
        self,
        slots: Sequence[UpdateSlot],
        dtype: str,
        clip_value: tuple[float, float] | None,
        every: int | None,
    ):
        self.shard = _placeholder(dtype, [None], "shard")
        gradient_sum = _placeholder(dtype, [None], "gradient_sum")
        divisor = _placeholder("float64", [], "divisor")
        scale = _placeholder(dtype, None, "scale")
        self.rate = _placeholder("float32", [], "learning_rate")
        self.held = [
            _placeholder(slot.dtype, [None] if slot.kind == "vector" else [], f"slot_{i}")
            for i, slot in enumerate(slots)
        ]
        self.inputs = [self.shard, gradient_sum, divisor, scale, self.rate, *self.held]
        self.gradient = gradient_sum * (scale / tf.cast(divisor, dtype))
        if clip_value is not None:
            self.gradient = tf.clip_by_value(self.gradient, *clip_value)
        if every:
            *self.held, accumulated, self.count = self.held
            self.total = self.gradient + accumulated
            self.gradient = self.total / every


def _placeholder(dtype: str, shape: Any, name: str) -> Any:
    return tf.compat.v1.placeholder(dtype, shape, name)


def _cast(tensors: Sequence[Any], dtypes: Sequence[str]) -> list[Any]:
    return [tf.cast(tensor, dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]


def _pure(inputs: Sequence[Any], outputs: Sequence[Any]) -> PureGraph:
    """The graph that is being built."""
    outputs = [tf.identity(tensor) for tensor in outputs]
    graph = tf.compat.v1.get_default_graph()
    return PureGraph(
        graph_def=graph.as_graph_def().SerializeToString(deterministic=True),
        inputs=tuple(TensorInfo(x.op.name, x.dtype.name, _shape(x)) for x in inputs),
        outputs=tuple(TensorInfo(x.name, x.dtype.name, _shape(x)) for x in outputs),
    )


def _probe(rule: Any, program: UpdateProgram, dtype: str) -> None:
    """Refuses a rule that gives different numbers on a matrix, on a vector and on its halves."""
    name = type(rule).__name__
    rng = np.random.default_rng(0)
    size, rate = 64, np.float32(0.01)
    start = rng.normal(size=size).astype(dtype)
    gradients = rng.normal(size=(3, size)).astype(dtype)

    matrix = keras.Variable(start.reshape(8, 8), dtype=dtype)
    rule.build([matrix])
    rule._learning_rate.assign(rate)
    for gradient in gradients:
        rule.apply([tf.constant(gradient.reshape(8, 8))], [matrix])
    try:
        whole = _steps(program, start, gradients, rate, [slice(0, size)])
        two = [slice(0, size // 2), slice(size // 2, size)]
        halves = _steps(program, start, gradients, rate, two)
    except (tf.errors.InvalidArgumentError, ValueError) as error:
        raise UnsupportedRuleError(
            "An optimizer's rule must work on a vector of any length to be applied to shards. "
            f"Received: {name}, which does not ({error}). Where it uses a shape, compute from the "
            "gradient instead: ops.zeros(variable.shape) is 0 * gradient."
        ) from error
    for what, other in (("a matrix", matrix.numpy().reshape(-1)), ("its halves", halves)):
        if not np.allclose(whole, other, rtol=1e-4, atol=1e-6, equal_nan=True):
            raise UnsupportedRuleError(
                "An optimizer's rule must be elementwise, up to sums over a tensor, to be applied "
                f"to shards. Received: {name}, whose step on a vector is not its step on {what}. "
                "Use an elementwise optimizer such as Adam."
            )


def _steps(
    program: UpdateProgram, start: Any, gradients: Any, rate: Any, slices: Sequence[slice]
) -> np.ndarray:
    """One tensor after some steps, taken slice by slice."""
    step = load(program.graph)
    terms = load(program.terms) if program.terms else None
    fixed = (np.float64(1), np.asarray(1, start.dtype), rate)
    shards = [start[part] for part in slices]
    held: list[list[Any]] = [
        [
            np.full(len(shard) if slot.kind == "vector" else (), slot.initial, slot.dtype)
            for slot in program.slots
        ]
        for shard in shards
    ]
    for gradient in gradients:
        given = [
            (shard, gradient[part], *fixed, *values)
            for shard, part, values in zip(shards, slices, held, strict=True)
        ]
        totals = np.zeros(program.num_sums)
        if terms:
            for inputs in given:
                totals += [np.sum(values, dtype=np.float64) for values in terms(*inputs)]
        for i, inputs in enumerate(given):
            sums = [np.full(len(inputs[0]), total, start.dtype) for total in totals]
            shards[i], *held[i] = step(*inputs, *sums)
    return np.concatenate([np.asarray(shard) for shard in shards])


def _shape(tensor: Any) -> tuple[int | None, ...] | None:
    return None if tensor.shape.rank is None else tuple(tensor.shape.as_list())
