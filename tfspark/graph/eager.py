"""What the front ends of eager variables share: from a traced step to a bound program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
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
from tfspark.graph.program import Program, StateSlot, Weight
from tfspark.graphdef.loops import adapts_shapes_in_loops
from tfspark.graphdef.variables import purify_function


@dataclass(frozen=True)
class TracedStep:
    """A step as a graph that reads variables.

    Attributes:
        graph: FuncGraph with the inputs of `step_signature`; its outputs are the loss sum, then one
            gradient per entry of `trained`.
        trained: the weights, sorted by group: Keras variables or `tf.Variable`.
        states: the model state; the step's changes of other variables are dropped. None: all that
            it uses.
    """

    graph: Any
    trained: Sequence[Any]
    states: Sequence[Any] | None = None


def bind(
    trace: Callable[[int | None], TracedStep],
    fields: int,
    group_of: Callable[[str], int] | None,
) -> BoundProgram:
    """The program of a step, bound to the variables that it uses.

    Args:
        trace: the step for an exact number of rows; None: for any.
        fields: number of batch inputs.
        group_of: parameter group by name; None: all are of group 0.
    """

    @cache  # a training that starts again after a fault must take the very same steps
    def retrace(rows: int) -> Program:
        return _program(trace(rows), fields, group_of)[0]

    traced = trace(None)
    program, states = _program(traced, fields, group_of)
    return BoundProgram(
        program,
        join(_read(traced.trained), program.dtype),
        tuple(_read(states)),
        tuple(traced.trained),
        tuple(states),
        _write,
        _read,
        retrace if adapts_shapes_in_loops(program.graph) else None,
    )


def _program(
    traced: TracedStep, fields: int, group_of: Callable[[str], int] | None
) -> tuple[Program, Sequence[Any]]:
    """The program of a traced step, and the variables of its model state."""
    trained, states = traced.trained, traced.states
    purified = purify_function(traced.graph, [*trained, *(states or ())], seeded=True)
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
    return assemble(Step(purified.graph, weights, slots, tuple(range(fields)), rest)), states


def name_of(variable: Any) -> str:
    """The path of a Keras variable, the name of a `tf.Variable`."""
    return getattr(variable, "path", None) or variable.name.split(":")[0]


def dtype_of(variable: Any) -> str:
    """TensorFlow's name of a variable's dtype."""
    return tf.as_dtype(variable.dtype).name


def _write(variables: Sequence[Any], values: Sequence[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _read(variables: Sequence[Any]) -> list[np.ndarray]:
    return [variable.numpy() for variable in variables]
