"""What the front ends of eager variables share: from a traced step to a bound program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfspark.graph.assembly import (
    BoundProgram,
    Step,
    assemble,
    join,
    state_kind,
    unique_names,
)
from tfspark.graph.program import StateSlot, Weight
from tfspark.graphdef.variables import purify_function


def bind(
    graph: Any,
    trained: Sequence[Any],
    fields: int,
    group_of: Callable[[str], int] | None,
    states: Sequence[Any] | None = None,
) -> BoundProgram:
    """The program of a traced step, bound to the variables that it uses.

    Args:
        graph: FuncGraph with the inputs of `step_signature`; its outputs are the loss sum, then one
            gradient per entry of `trained`.
        trained: the weights, sorted by group: Keras variables or `tf.Variable`.
        fields: number of batch inputs.
        group_of: parameter group by name; None: all are of group 0.
        states: the model state; the step's changes of other variables are dropped. None: all that
            it uses.
    """
    purified = purify_function(graph, [*trained, *(states or ())], seeded=True)
    end = len(purified.variables) if states is None else len(trained) + len(states)
    if states is None:
        states = purified.variables[len(trained) :]
    names = unique_names([name_of(variable) for variable in [*trained, *states]])
    written = purified.written[len(trained) : end]
    weights = tuple(
        Weight(name, tuple(v.shape), group_of(name_of(v)) if group_of else 0)
        for name, v in zip(names, trained, strict=False)
    )
    slots = tuple(
        StateSlot(
            name, dtype_of(v), tuple(v.shape), state_kind(name, dtype_of(v), v.shape, changes)
        )
        for name, v, changes in zip(names[len(trained) :], states, written, strict=True)
    )
    rest = tuple(variable.numpy() for variable in purified.variables[end:])
    program = assemble(Step(purified.graph, weights, slots, tuple(range(fields)), rest))
    return BoundProgram(
        program,
        join(_read(trained), program.dtype),
        tuple(_read(states)),
        tuple(trained),
        tuple(states),
        _write,
        _read,
    )


def name_of(variable: Any) -> str:
    """The path of a Keras variable, the name of a `tf.Variable`."""
    return getattr(variable, "path", None) or variable.name.split(":")[0]


def dtype_of(variable: Any) -> str:
    """TensorFlow's name of a variable's dtype."""
    return tf.as_dtype(variable.dtype).name


def _slot(name: str, variable: Any, changes: bool) -> StateSlot:
    dtype, shape = dtype_of(variable), tuple(variable.shape)
    return StateSlot(name, dtype, shape, state_kind(name, dtype, shape, changes))


def _write(variables: Sequence[Any], values: Sequence[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _read(variables: Sequence[Any]) -> list[np.ndarray]:
    return [variable.numpy() for variable in variables]
