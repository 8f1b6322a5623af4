"""Programs from a TF1 training operation: `tf.compat.v1.train.Optimizer.minimize(loss)`.

The gradients are the ones that the operation applies, so the user's own changes to them stay. Its
rule becomes the Keras optimizer of the same formula, with the hyperparameters of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from tensorflow.python.eager.context import eager_mode

from tfspark.errors import ProgramError, UnsupportedRuleError
from tfspark.graph.assembly import BoundProgram
from tfspark.graph.from_graph import (
    VARIABLE_OPS,
    ancestors,
    check_loss,
    copy_of,
    initialize,
    name_of,
    program_of_gradients,
    variables_by_op,
)

_REMEDY = "Use TFOptimizer.from_loss with a Keras optimizer."


@dataclass(frozen=True)
class _Rule:
    """How to read one kind of Apply operation.

    Attributes:
        inputs: the names of its inputs, in order.
        hyperparameters: which of them must be constants.
        optimizer: from the hyperparameters, a function that reads attributes, and one that gives
            the initial value of a slot, to a Keras optimizer.
    """

    inputs: tuple[str, ...]
    hyperparameters: tuple[str, ...]
    optimizer: Callable[[Mapping[str, float], Any, Callable[[str], float]], Any]


# Formulas: "ApplyX" in TensorFlow's operation reference, against the Keras class. TF1's Adagrad has
# no epsilon. RMSProp is missing: TF1 starts its mean square at one, Keras at zero.
_RULES = {
    "GradientDescent": _Rule(
        ("var", "lr", "grad"),
        ("lr",),
        lambda h, op, slot: keras.optimizers.SGD(h["lr"]),
    ),
    "Momentum": _Rule(
        ("var", "accum", "lr", "grad", "momentum"),
        ("lr", "momentum"),
        lambda h, op, slot: keras.optimizers.SGD(
            h["lr"], momentum=h["momentum"], nesterov=op.get_attr("use_nesterov")
        ),
    ),
    "Adam": _Rule(
        ("var", "m", "v", "b1_power", "b2_power", "lr", "beta1", "beta2", "epsilon", "grad"),
        ("lr", "beta1", "beta2", "epsilon"),
        lambda h, op, slot: keras.optimizers.Adam(h["lr"], h["beta1"], h["beta2"], h["epsilon"]),
    ),
    "Adagrad": _Rule(
        ("var", "accum", "lr", "grad"),
        ("lr",),
        lambda h, op, slot: keras.optimizers.Adagrad(
            h["lr"], initial_accumulator_value=slot("accum"), epsilon=0.0
        ),
    ),
    "Adadelta": _Rule(
        ("var", "accum", "accum_update", "lr", "rho", "epsilon", "grad"),
        ("lr", "rho", "epsilon"),
        lambda h, op, slot: keras.optimizers.Adadelta(h["lr"], h["rho"], h["epsilon"]),
    ),
    "Ftrl": _Rule(
        ("var", "accum", "linear", "grad", "lr", "l1", "l2", "lr_power"),
        ("lr", "l1", "l2", "lr_power"),
        lambda h, op, slot: keras.optimizers.Ftrl(
            h["lr"],
            learning_rate_power=h["lr_power"],
            initial_accumulator_value=slot("accum"),
            l1_regularization_strength=h["l1"],
            l2_regularization_strength=h["l2"],
        ),
    ),
}


def program_from_train_op(
    train_op: Any,
    loss: Any,
    *,
    session: Any,
    inputs: Sequence[tuple[Any, int]],
    updates: Sequence[Any] | None = None,
    tensor_with_value: Mapping[Any, Any] | None = None,
    reduction: str = "mean",
) -> tuple[BoundProgram, keras.optimizers.Optimizer]:
    """The gradients that a training operation applies as a program, and its rule.

    What the graph does to gradients before it applies them, such as clipping, happens on each
    rank. Slots start anew. The global step is not counted.

    Args:
        train_op: what `tf.compat.v1.train.Optimizer.minimize` or `apply_gradients` returned.
        loss: as of `program_from_loss`, as are all other arguments.
        session: of the loss's graph.
        inputs: (placeholder, index of the data set's field).
        updates: operations to run in every step.
        tensor_with_value: values of placeholders.
        reduction: "mean" or "sum".

    Returns:
        The program, and a Keras optimizer of the same formula and hyperparameters.

    Raises:
        ProgramError: as `program_from_loss`, or nothing is applied to a variable.
        UnsupportedRuleError: names the operation that has no Keras optimizer of its formula.
    """
    graph = check_loss(loss, session, [tensor for tensor, _ in inputs])
    initialize(session)
    variables = variables_by_op(graph)
    applied = [op for op in ancestors([getattr(train_op, "op", train_op)]).values() if _applies(op)]
    if not applied:
        raise ProgramError(
            "A training operation applies gradients to variables. "
            f"Received: {train_op.name!r}, which applies none. Pass what minimize(loss) returned."
        )
    applied.sort(key=lambda op: op.name)
    kind = _rule_name(applied[0].type)
    optimizers = [_optimizer(op, session, variables) for op in applied]
    with eager_mode():
        configs = [_without_name(optimizer) for optimizer in optimizers]
    if any(config != configs[0] for config in configs):
        raise UnsupportedRuleError(
            "A training operation has one rule with the same hyperparameters for all variables. "
            f"Received: {', '.join(f'{op.name} ({op.type})' for op in applied)}. {_REMEDY}"
        )
    copy = copy_of(graph)
    gradient = _RULES[kind].inputs.index("grad")
    pairs = [
        (variables[_variable_op(op).name], copy.get_tensor_by_name(op.inputs[gradient].name))
        for op in applied
    ]
    bound = program_of_gradients(
        copy, loss, pairs, session, inputs, None, updates, tensor_with_value, reduction
    )
    return bound, optimizers[0]


def _applies(op: Any) -> bool:
    inputs = [tensor.op.type for tensor in op.inputs[:1]]
    scatters = op.type.startswith(("Scatter", "ResourceScatter"))
    return bool(inputs) and inputs[0] in VARIABLE_OPS and ("Apply" in op.type or scatters)


def _rule_name(kind: str) -> str:
    return kind.removeprefix("Resource").removeprefix("Apply")


def _variable_op(op: Any) -> Any:
    return op.inputs[0].op


def _optimizer(op: Any, session: Any, variables: Mapping[str, Any]) -> Any:
    """The Keras optimizer of an Apply operation's rule."""
    rule = _RULES.get(_rule_name(op.type))
    if rule is None:
        raise UnsupportedRuleError(
            f"A training operation applies one of {', '.join(_RULES)} to dense gradients. "
            f"Received: {op.name!r} of type {op.type}. {_REMEDY}"
        )
    tensors = dict(zip(rule.inputs, op.inputs, strict=True))
    for name in rule.hyperparameters:
        moving = [
            source.name
            for source in ancestors([tensors[name].op]).values()
            if source.type in (*VARIABLE_OPS, "Placeholder")
        ]
        if moving:
            raise UnsupportedRuleError(
                "The hyperparameters of a training operation must be constants. "
                f"Received: {name!r} of {op.name!r}, which depends on {', '.join(moving)}. "
                f"{_REMEDY} Its learning rate may be a schedule."
            )
    values = {name: float(session.run(tensors[name])) for name in rule.hyperparameters}

    def slot(name: str) -> float:
        value = np.asarray(session.run(variables[tensors[name].op.name]))
        if value.size and not np.all(value == value.flat[0]):
            raise UnsupportedRuleError(
                "A training operation starts with fresh slots. "
                f"Received: {name_of(variables[tensors[name].op.name])!r}, which has been "
                f"trained already. {_REMEDY}"
            )
        return float(value.flat[0]) if value.size else 0.0

    with eager_mode():  # not in the user's graph, which may be finalized
        return rule.optimizer(values, op, slot)


def _without_name(optimizer: Any) -> dict[str, Any]:
    return {key: value for key, value in optimizer.get_config().items() if key != "name"}
