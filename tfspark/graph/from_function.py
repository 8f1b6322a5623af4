"""Programs from plain functions: a batch in, a scalar loss out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfspark.data.spec import RowSpec
from tfspark.errors import ProgramError
from tfspark.graph.assembly import (
    BoundProgram,
    batch_infos,
    check_weight_dtypes,
    step_signature,
)
from tfspark.graph.eager import TracedStep, bind, dtype_of, name_of
from tfspark.graphdef.functions import trace_graph
from tfspark.graphdef.variables import tensorflow_variable


def program_from_function(
    loss_fn: Callable[[Any], Any],
    variables: Sequence[Any],
    row_spec: RowSpec,
    *,
    group_of: Callable[[str], int] | None = None,
    reduction: str = "mean",
) -> BoundProgram:
    """The gradient of a function as a program.

    Args:
        loss_fn: called with a batch in the data set's structure, `[rows, …]` per field; returns a
            scalar. It may be a `tf.function`, use Python control flow on tensors (AutoGraph), and
            read and assign any variables.
        variables: what to train: `tf.Variable` or Keras variables. Other variables that the
            function uses become model state.
        row_spec: of the data set's rows.
        group_of: parameter group of a variable by its name; None: all in group 0.
        reduction: how the loss reduces over rows, "mean" or "sum".

    Raises:
        ProgramError: the result is not a scalar float, or does not depend on one of `variables`.

    Example:
        >>> from tfspark.data.spec import Field
        >>> kernel = tf.Variable(tf.zeros([3, 1]), name="kernel")
        >>> def loss_fn(batch):
        ...     return tf.reduce_mean((batch["x"] @ kernel - batch["y"]) ** 2)
        >>> spec = RowSpec.of({"x": Field("x", "float32", (3,)), "y": Field("y", "float32", (1,))})
        >>> program_from_function(loss_fn, [kernel], spec).program.size
        3
    """
    if reduction not in ("mean", "sum"):
        raise ProgramError(f'A reduction is "mean" or "sum". Received: {reduction!r}.')
    trained = list({id(tensorflow_variable(v).handle): v for v in variables}.values())
    if not trained:
        raise ProgramError("A function needs variables to train. Received: none. Pass variables=…")
    check_weight_dtypes([(name_of(v), dtype_of(v)) for v in trained])
    trained.sort(key=lambda v: group_of(name_of(v)) if group_of else 0)
    converted = (
        tf.autograph.experimental.do_not_convert(loss_fn)
        if _is_function(loss_fn)
        else (
            tf.__internal__.autograph.tf_convert(
                loss_fn, tf.__internal__.autograph.control_status_ctx(), convert_by_default=True
            )
        )
    )

    def step(*inputs: Any) -> list[Any]:
        *batch, rows, global_rows, _ = inputs
        with tf.GradientTape() as tape:
            # Whatever `trainable` says: the caller listed them.
            tape.watch([tensorflow_variable(v) for v in trained])
            loss = converted(row_spec.unflatten(batch))
            _check_scalar(loss)
            factor = rows if reduction == "mean" else global_rows
            total = loss * tf.cast(factor, loss.dtype)
        gradients = tape.gradient(total, [tensorflow_variable(v) for v in trained])
        unused = [name_of(v) for v, g in zip(trained, gradients, strict=True) if g is None]
        if unused:
            raise ProgramError(
                "The loss must depend on every variable that is to be trained. "
                f"Received: {', '.join(unused)}, on which it does not depend. Leave them out of "
                "variables=…, or use them in the function."
            )
        total = tf.cast(total, trained[0].dtype)
        return [total, *(tf.convert_to_tensor(gradient) for gradient in gradients)]

    def trace(rows: int | None) -> TracedStep:
        return TracedStep(trace_graph(step, step_signature(batch_infos(row_spec, rows))), trained)

    return bind(trace, len(row_spec.fields), group_of)


def _is_function(function: Any) -> bool:
    return isinstance(function, tf.types.experimental.GenericFunction)


def _check_scalar(loss: Any) -> None:
    if not tf.is_tensor(loss) or loss.shape.rank != 0 or not loss.dtype.is_floating:
        shown = f"shape {loss.shape}, {loss.dtype.name}" if tf.is_tensor(loss) else repr(loss)
        raise ProgramError(
            f"The loss must be a scalar float tensor. Received: {shown}. Reduce it, for example "
            "with tf.reduce_mean."
        )
