"""What the front ends share: from a model's step with variables to a program over a flat vector."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from tfspark.data.spec import RowSpec
from tfspark.errors import ProgramError
from tfspark.graph.program import Program, StateSlot, Weight
from tfspark.graphdef.functions import trace_graph
from tfspark.graphdef.pure import PureGraph, TensorInfo
from tfspark.graphdef.variables import call, purify_function

SUMS = "tfspark_sums/"
"""Begins the names of variables that every rank adds to."""


@dataclass(frozen=True)
class BoundProgram:
    """A program, the values it starts from, and the variables it was made of.

    Attributes:
        program: the gradient.
        flat: `[P]`, the weights as they were in the variables when the program was made.
        state: the model state as it was then.
        weight_variables: the variable of each weight.
        state_variables: the variable of each state slot.
        write: sets variables to arrays, in the user's session or eagerly.
        read: the arrays that variables hold.
        retrace: the same program for an exact number of rows, traced from the model as it is at the
            first call for so many; None where that would be of no less work, or is not possible.
    """

    program: Program
    flat: np.ndarray
    state: tuple[np.ndarray, ...]
    weight_variables: tuple[Any, ...]
    state_variables: tuple[Any, ...]
    write: Callable[[Sequence[Any], Sequence[np.ndarray]], None]
    read: Callable[[Sequence[Any]], Sequence[np.ndarray]]
    retrace: Callable[[int], Program] | None = None

    def expecting(self, rows: Iterable[int]) -> BoundProgram:
        """With graphs of less work for these numbers of rows, if there are such.

        Raises:
            ProgramError: the model cannot compute so many rows.
        """
        if self.retrace is None:
            return self
        exact = {}
        for count in rows:
            try:
                program = self.retrace(count)
            except (TypeError, ValueError, tf.errors.OpError) as error:
                raise ProgramError(
                    "A model must be able to compute the rows that a rank has of a batch. "
                    f"Received: a model that cannot compute {count} rows "
                    f"({_complaint(error)}). Give its inputs no batch size of their own, "
                    "or choose batch_size and num_ranks so that every rank has as many rows."
                ) from error
            # What looks at the number of rows in Python may have become another model.
            if replace(program, graph=self.program.graph) == self.program:
                exact[count] = program.graph
        return replace(self, program=replace(self.program, exact_graphs=exact))

    def values(self) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """The flat vector and the model state as the variables hold them now."""
        values = self.read([*self.weight_variables, *self.state_variables])
        count = len(self.weight_variables)
        state = tuple(np.asarray(value) for value in values[count:])
        return join(values[:count], self.program.dtype), state

    def assign(self, flat: np.ndarray, state: Sequence[np.ndarray]) -> None:
        """Sets the variables to trained values.

        Args:
            flat: `[P]`.
            state: one array per state slot.
        """
        values = [*split(flat, self.program.weights), *state]
        changes = [slot.kind != "constant" for slot in self.program.state]
        kept = [True] * len(self.program.weights) + changes
        variables = [*self.weight_variables, *self.state_variables]
        self.write(
            [variable for variable, keep in zip(variables, kept, strict=True) if keep],
            [value for value, keep in zip(values, kept, strict=True) if keep],
        )


@dataclass(frozen=True)
class Step:
    """A model's gradient as a pure graph over separate tensors.

    Inputs of `graph`: the batch, rows, global rows, seed, the weights, the state, then `rest`.
    Outputs: loss sum, one gradient per weight, then the new values of weights, state and rest.

    Attributes:
        graph: see above.
        weights: trainable tensors, sorted by group.
        state: the model state.
        batch: indices of the fields that are the batch inputs.
        rest: values of the last inputs, whose new values nobody needs.
    """

    graph: PureGraph
    weights: tuple[Weight, ...]
    state: tuple[StateSlot, ...]
    batch: tuple[int, ...]
    rest: tuple[np.ndarray, ...] = ()


def step_signature(fields: Sequence[TensorInfo]) -> list[tf.TensorSpec]:
    """The inputs of a step before its variables: batch, rows, global rows, seed."""
    return [
        *(tf.TensorSpec(info.shape, info.dtype) for info in fields),
        tf.TensorSpec([], tf.int64),
        tf.TensorSpec([], tf.int64),
        tf.TensorSpec([2], tf.int64),
    ]


def batch_infos(spec: RowSpec, rows: int | None = None) -> list[TensorInfo]:
    """Batches of rows of this spec: `[rows, *shape]` for each field; None: of any number."""
    return [TensorInfo(f.name, f.dtype, (rows, *f.shape)) for f in spec.fields]


def assemble(step: Step) -> Program:
    """Makes a program of a step: slices of the flat vector become its weights."""
    dtype = flat_dtype(step.weights, step.graph, len(step.batch) + 3)
    counts = (len(step.batch), len(step.weights), len(step.state))
    infos = step.graph.inputs[: counts[0]]
    state = [tf.TensorSpec(slot.shape, slot.dtype) for slot in step.state]
    size = sum(weight.size for weight in step.weights)

    def program(flat: Any, *inputs: Any) -> list[Any]:
        states, batch = inputs[: counts[2]], inputs[counts[2] :]
        weights = split(flat, step.weights)
        rest = [tf.constant(value) for value in step.rest]
        loss, *outputs = call(step.graph, [*batch, *weights, *states, *rest])
        gradients = [tf.reshape(gradient, [-1]) for gradient in outputs[: counts[1]]]
        new_state = outputs[2 * counts[1] : 2 * counts[1] + counts[2]]
        return [loss, *gradients, *new_state]

    signature = [tf.TensorSpec([size], dtype), *state, *step_signature(infos)]
    graph = trace_graph(program, signature, ordered=False)
    purified = purify_function(graph, seeded=True)
    return Program(step.weights, step.state, step.batch, dtype, purified.graph)


def _complaint(error: Exception) -> str:
    """In one line and plain text; Keras adds emphasis, and the arguments of the call."""
    plain = re.sub(r"\x1b\[\d*m", "", str(error)).split("Arguments received by")[0]
    return " ".join(plain.split())


def split(flat: Any, weights: Sequence[Weight]) -> list[Any]:
    """The weights in a flat vector, each in its shape; of an array or a tensor."""
    tensors, start = [], 0
    for weight in weights:
        part = flat[start : start + weight.size]
        tensors.append(
            part.reshape(weight.shape)
            if isinstance(flat, np.ndarray)
            else tf.reshape(part, weight.shape)
        )
        start += weight.size
    return tensors


def join(values: Sequence[np.ndarray], dtype: str) -> np.ndarray:
    """The flat vector of weights."""
    return np.concatenate([np.asarray(value, dtype).reshape(-1) for value in values])


def flat_dtype(weights: Sequence[Weight], graph: PureGraph, first: int) -> str:
    """The one dtype of all weights.

    Raises:
        ProgramError: they have several, or one that is neither float32 nor float64.
    """
    dtypes = [(w.name, graph.inputs[first + i].dtype) for i, w in enumerate(weights)]
    check_weight_dtypes(dtypes)
    return dtypes[0][1]


def check_weight_dtypes(dtypes: Sequence[tuple[str, str]]) -> None:
    """Refuses weights that do not fit into one flat vector of full precision.

    Raises:
        ProgramError: names them and the remedy.
    """
    odd = [(name, dtype) for name, dtype in dtypes if dtype not in ("float32", "float64")]
    if odd:
        raise ProgramError(
            "Trainable weights must be float32 or float64. "
            f"Received: {', '.join(f'{name} ({dtype})' for name, dtype in odd)}. For "
            "half precision use the policy mixed_bfloat16 or mixed_float16, which computes in "
            "half precision and keeps float32 weights."
        )
    if len({dtype for _, dtype in dtypes}) > 1:
        raise ProgramError(
            "All trainable weights must have one dtype. "
            f"Received: {', '.join(f'{name} ({dtype})' for name, dtype in dtypes)}. "
            "Freeze the odd ones or give them the dtype of the others."
        )


def state_kind(name: str, dtype: str, shape: Sequence[int], written: bool) -> str:
    """How ranks merge a tensor of the model state; see `StateSlot`."""
    if not written:
        return "constant"
    if name.startswith(SUMS):
        return "sum"
    if "seed_generator_state" in name and "int" in dtype and tuple(shape) == (2,):
        return "seed"
    return "mean" if dtype.startswith(("float", "bfloat")) else "first"


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that occurred before."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        count = seen[name] = seen.get(name, 0) + 1
        result.append(name if count == 1 else f"{name}_{count - 1}")
    return result
