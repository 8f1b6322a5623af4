"""Programs from models of Keras 3 and tf-keras: Sequential, functional and subclassed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfspark.data.spec import RowSpec
from tfspark.errors import ProgramError
from tfspark.graph.assembly import (
    SUMS,
    BoundProgram,
    batch_infos,
    check_weight_dtypes,
    step_signature,
)
from tfspark.graph.eager import TracedStep, bind, dtype_of, name_of
from tfspark.graph.keras_2 import Keras2View, is_keras_2
from tfspark.graph.keras_3 import Keras3View
from tfspark.graph.keras_metrics import metric_sums, reset
from tfspark.graph.keras_view import KerasView, unpack
from tfspark.graphdef.functions import trace_graph
from tfspark.graphdef.variables import tensorflow_variable


def program_from_keras(
    model: Any,
    row_spec: RowSpec,
    *,
    loss: Any = None,
    loss_weights: Any = None,
    group_of: Callable[[str], int] | None = None,
    tracks_metrics: bool = False,
) -> BoundProgram:
    """The gradient of a Keras model's loss as a program.

    The model runs with `training=True` and its loss is computed as `fit` does: the compiled loss
    or `loss`, loss weights, sample weights, `add_loss`, regularizers, an overridden
    `compute_loss`. The loss of a global batch is exact on any number of ranks: a loss that is a
    mean over rows (Keras' default) as such, one with `reduction="sum"` as a sum; weight
    regularizers count once. A scalar that `add_loss` takes, or that a loss function or
    `compute_loss` returns, is taken as a mean over rows.

    Args:
        model: it is built if it is not, and otherwise stays as it is.
        row_spec: of a row `(x, y)` or `(x, y, sample_weight)`, or of `x` alone where the model
            adds its own losses. `x` and `y` are what the model's `fit` takes.
        loss: used instead of the compiled one, in any form that `compile` takes.
        loss_weights: go with `loss`.
        group_of: parameter group of a weight by its path; None: all in group 0.
        tracks_metrics: add what each step adds to the sums of the compiled metrics to the model
            state, in slots whose names begin with `SUMS`; see `keras_metrics`.

    Raises:
        ProgramError: the model has its own `train_step`, no loss, a loss whose reduction cannot
            be exact, no weight that the loss depends on, or weights of several precisions.

    Example:
        >>> from tfspark.data.spec import Field
        >>> model = keras.Sequential([keras.layers.Dense(1)])
        >>> spec = RowSpec.of((Field("x", "float32", (3,)), Field("y", "float32", (1,))))
        >>> program_from_keras(model, spec, loss="mse").program.size
        4
    """
    check_model(model)
    view = view_of(model, loss, loss_weights)
    view.build(row_spec)
    connected: list[Any] = []
    sums: list[tf.Variable] = []  # a graph does not keep its variables

    def step(*inputs: Any) -> list[Any]:
        *batch, rows, global_rows, _ = inputs
        x, y, sample_weight = unpack(row_spec, batch)
        share = tf.cast(global_rows, tf.float64) / tf.cast(rows, tf.float64)
        with tf.GradientTape() as tape, view.rewritten():
            predictions = view.call(x, training=True)
            mean = view.loss(rows, share, x, y, predictions, sample_weight)
            total = mean * tf.cast(rows, mean.dtype)
        if tracks_metrics:
            view.update_metrics(mean, rows, x, y, predictions, sample_weight)
            added = metric_sums(view.metric_variables())
            sums[:] = sums_for(view)
            for variable, value in zip(sums, added, strict=True):
                variable.assign_add(value)
        trainable = model.trainable_variables
        gradients = tape.gradient(total, [tensorflow_variable(v) for v in trainable])
        pairs = [(v, g) for v, g in zip(trainable, gradients, strict=True) if g is not None]
        pairs.sort(key=lambda pair: group_of(name_of(pair[0])) if group_of else 0)
        if not pairs:
            raise ProgramError(
                "The loss must depend on a trainable weight. Received: "
                f"model {model.name!r} with {len(trainable)} trainable weights, on none of which "
                "its loss depends. Unfreeze a layer, or check the loss."
            )
        connected[:] = [variable for variable, _ in pairs]
        check_weight_dtypes([(name_of(v), dtype_of(v)) for v in connected])
        total = tf.cast(total, connected[0].dtype)
        return [total, *(tf.convert_to_tensor(gradient) for _, gradient in pairs)]

    def trace(rows: int | None) -> TracedStep:
        if tracks_metrics:
            reset(view)
        graph = trace_graph(step, step_signature(batch_infos(row_spec, rows)))
        view.clear()  # of tensors of the traced graph
        return TracedStep(graph, tuple(connected), _used_states(view, graph, connected))

    return bind(trace, len(row_spec.fields), group_of)


def sums_for(view: KerasView) -> list[tf.Variable]:
    """A variable for the sums of each variable of the model's metrics; their names sort alike."""
    with tf.init_scope():
        return [
            tf.Variable(np.zeros(v.shape), name=f"{SUMS}{number:03d}/{name}", dtype=tf.float64)
            for number, (name, v) in enumerate(
                zip(view.metric_names(), view.metric_variables(), strict=True)
            )
        ]


def is_keras_model(value: Any) -> bool:
    """Whether it is a model of Keras 3 or of tf-keras."""
    return isinstance(value, keras.Model) or is_keras_2(value, "Model")


def view_of(model: Any, loss: Any = None, loss_weights: Any = None) -> KerasView:
    """What a model of Keras 3 or tf-keras is to programs, evaluations and predictions.

    Args:
        model: either.
        loss: used instead of the compiled one, in any form that `compile` takes.
        loss_weights: go with `loss`.

    Raises:
        ProgramError: it is no Keras model; names its class.
    """
    if isinstance(model, keras.Model):
        return Keras3View(model, loss, loss_weights)
    if is_keras_2(model, "Model"):
        return Keras2View(model, loss, loss_weights)
    raise ProgramError(
        f"A Keras model is expected. Received: {type(model).__module__}.{type(model).__qualname__}."
    )


def check_model(model: Any) -> None:
    """Refuses what is not a Keras model, and a model that trains itself.

    Raises:
        ProgramError: names the class and the remedy.
    """
    if view_of(model).has_own_step():
        raise ProgramError(
            "A model with its own train_step computes more than the gradient of a loss. "
            f"Received: {type(model).__qualname__}. Override compute_loss instead, or write the "
            "loss as a function and use from_function."
        )


def _used_states(view: KerasView, graph: Any, connected: Sequence[Any]) -> list[Any]:
    """The variables that the traced step uses, besides its weights and metrics."""
    # In the order in which the graph came to know them: `graph.variables` is a set.
    captured = dict.fromkeys(id(external) for external, _ in graph.captures)
    left_out = {_handle(v) for v in [*connected, *view.statistics()]}
    known = {_handle(v): v for v in view.model.variables}
    every = {**{id(v.handle): v for v in graph.variables}, **known}
    order = {**known, **captured}
    return [every[key] for key in order if key in every and key in captured.keys() - left_out]


def _handle(variable: Any) -> int:
    return id(tensorflow_variable(variable).handle)
