"""Programs from Keras 3 models: Sequential, functional and subclassed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.trainers.compile_utils import CompileLoss

from tfspark.data.spec import RowSpec
from tfspark.errors import ProgramError
from tfspark.graph import keras_metrics
from tfspark.graph.assembly import (
    SUMS,
    BoundProgram,
    batch_infos,
    check_weight_dtypes,
    step_signature,
)
from tfspark.graph.eager import bind, dtype_of
from tfspark.graph.fused import fused_batch_norm, replaced
from tfspark.graph.keras_metrics import is_sum
from tfspark.graphdef.functions import trace_graph


def program_from_keras(
    model: keras.Model,
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
    infos = batch_infos(row_spec)
    build(model, row_spec)
    compile_loss = compile_loss_of(model, loss, loss_weights)
    connected: list[Any] = []
    sums: list[tf.Variable] = []
    if tracks_metrics:
        keras_metrics.reset(model)

    def step(*inputs: Any) -> list[Any]:
        *batch, rows, global_rows, _ = inputs
        x, y, sample_weight = unpack(row_spec, batch)
        share = tf.cast(global_rows, tf.float64) / tf.cast(rows, tf.float64)
        with tf.GradientTape() as tape, fused_batch_norm(model):
            predictions = call_model(model, x, training=True)
            with keras_metrics.losses_by_rows(compile_loss, y, predictions, rows, share):
                total = model_loss(model, compile_loss, share, x, y, predictions, sample_weight)
            mean, total = total, total * tf.cast(rows, total.dtype)
        if tracks_metrics:
            keras_metrics.update_metrics(model, mean, rows, x, y, predictions, sample_weight)
            added = keras_metrics.metric_sums(model.metrics_variables)
            sums[:] = sums_for(model)
            for variable, value in zip(sums, added, strict=True):
                variable.assign_add(value)
        trainable = model.trainable_variables
        gradients = tape.gradient(total, [variable.value for variable in trainable])
        pairs = [(v, g) for v, g in zip(trainable, gradients, strict=True) if g is not None]
        pairs.sort(key=lambda pair: group_of(pair[0].path) if group_of else 0)
        if not pairs:
            raise ProgramError(
                "The loss must depend on a trainable weight. Received: "
                f"model {model.name!r} with {len(trainable)} trainable weights, on none of which "
                "its loss depends. Unfreeze a layer, or check the loss."
            )
        connected.extend(variable for variable, _ in pairs)
        check_weight_dtypes([(v.path, dtype_of(v)) for v in connected])
        total = tf.cast(total, connected[0].dtype)
        return [total, *(tf.convert_to_tensor(gradient) for _, gradient in pairs)]

    graph = trace_graph(step, step_signature(infos))
    model._clear_losses()  # they are tensors of the traced graph
    states = _used_states(model, graph, connected, compile_loss)
    return bind(graph, connected, len(infos), group_of, states)


def sums_for(model: keras.Model) -> list[tf.Variable]:
    """A variable for the sums of each variable of the model's metrics; their names sort alike."""
    with tf.init_scope():
        return [
            tf.Variable(np.zeros(v.shape), name=f"{SUMS}{number:03d}/{v.path}", dtype=tf.float64)
            for number, v in enumerate(model.metrics_variables)
        ]


def check_model(model: Any) -> None:
    """Refuses what is not a Keras 3 model, and a model that trains itself.

    Raises:
        ProgramError: names the class and the remedy.
    """
    if not isinstance(model, keras.Model):
        raise ProgramError(
            "A Keras 3 model is expected. "
            f"Received: {type(model).__module__}.{type(model).__qualname__}."
        )
    if type(model).train_step is not keras.Model.train_step:
        raise ProgramError(
            "A model with its own train_step computes more than the gradient of a loss. "
            f"Received: {type(model).__qualname__}. Override compute_loss instead, or write the "
            "loss as a function and use from_function."
        )


def build(model: keras.Model, row_spec: RowSpec) -> None:
    """Creates the weights of a model that is not built, from symbolic inputs."""
    # A subclassed model may call itself built before its layers are.
    if all(layer.built for layer in model._flatten_layers()):
        return
    inputs = [
        keras.KerasTensor((None, *field.shape), dtype=field.dtype) for field in row_spec.fields
    ]
    x, _, _ = unpack(row_spec, inputs)
    call_model(model, x, training=False)


def unpack(row_spec: RowSpec, batch: Sequence[Any]) -> tuple[Any, Any, Any]:
    """A flat batch as `x, y, sample_weight`, of which the last two may be None.

    Raises:
        ProgramError: the row is a tuple or list of more than three.
    """
    row = row_spec.unflatten(batch)
    if not isinstance(row, (tuple, list)):
        return row, None, None
    if len(row) > 3:
        raise ProgramError(
            "A Keras model trains on rows (x, y) or (x, y, sample_weight). "
            f"Received: a row of {len(row)} parts, {', '.join(row_spec.names)}. Group the inputs "
            "of the model and its labels: features=[…], labels=[…]."
        )
    x, y, sample_weight = (*row, None, None)[:3]
    return x, y, sample_weight


def call_model(model: keras.Model, x: Any, training: bool) -> Any:
    """The model's outputs, as its trainer calls it."""
    if model._call_has_training_arg:
        return model(x, training=training)
    return model(x)


def compile_loss_of(model: keras.Model, loss: Any, loss_weights: Any) -> Any:
    """The loss to use instead of the compiled one, or the compiled one, or None."""
    if loss is None:
        return model._compile_loss
    return CompileLoss(loss, loss_weights, output_names=getattr(model, "output_names", None))


def model_loss(
    model: keras.Model,
    compile_loss: Any,
    share: Any,
    x: Any,
    y: Any,
    predictions: Any,
    sample_weight: Any,
    training: bool = True,
) -> Any:
    """The model's loss, with what is a sum over rows multiplied by `share`."""
    _check_masks(model, predictions)
    custom = type(model).compute_loss is not keras.Model.compute_loss
    if compile_loss is None and not custom and not model.losses:
        raise ProgramError(
            "A model needs a loss to train. "
            f"Received: model {model.name!r} without one. Compile it, or give loss=…."
        )
    if compile_loss is not None and not custom and y is None:
        raise ProgramError(
            "A loss compares predictions with labels. Received: rows without labels for model "
            f"{model.name!r}. Make rows (x, y), or name the columns of labels."
        )
    with replaced(model, "_compile_loss", compile_loss):
        total = model._compute_loss(x, y, predictions, sample_weight, training=training)
        flat = compile_loss._flat_losses if compile_loss is not None and compile_loss.built else []
        _check_reductions(flat, sample_weight is not None)
        if any(is_sum(entry.loss) for entry in flat):
            scaled = [_scaled(entry, share) if is_sum(entry.loss) else entry for entry in flat]
            with replaced(compile_loss, "_flat_losses", scaled):
                total = model._compute_loss(x, y, predictions, sample_weight, training=training)
    if total.shape.rank != 0:
        raise ProgramError(
            f"The loss must be a scalar. Received: shape {total.shape} from {model.name!r}."
        )
    return total


def _scaled(entry: Any, share: Any) -> Any:
    *path_and_loss, weight, name = entry
    share = tf.cast(share, entry.loss.dtype)
    return type(entry)(*path_and_loss, share if weight is None else share * weight, name)


def _check_reductions(entries: Sequence[Any], weighted: bool) -> None:
    for entry in entries:
        reduction = getattr(entry.loss, "reduction", "mean")
        exact = reduction in ("sum", "mean", "sum_over_batch_size")
        if not exact and not (reduction == "mean_with_sample_weight" and not weighted):
            raise ProgramError(
                "A loss must be a sum or a mean over rows to be exact over several ranks. "
                f"Received: loss {entry.loss.name!r} with reduction={reduction!r}. Use "
                'reduction="sum_over_batch_size" or "sum".'
            )


def _check_masks(model: keras.Model, predictions: Any) -> None:
    for tensor in tf.nest.flatten(predictions):
        if getattr(tensor, "_keras_mask", None) is not None:
            raise ProgramError(
                "A loss over masked predictions is divided by the number of unmasked values, "
                "which differs from rank to rank. "
                f"Received: model {model.name!r}, whose output carries a mask. End the model with "
                "a layer that drops the mask, and give sample weights."
            )


def _used_states(
    model: keras.Model, graph: Any, connected: Sequence[Any], compile_loss: Any
) -> list[Any]:
    """The variables that the traced step uses, besides its weights and metrics."""
    # In the order in which the graph came to know them: `graph.variables` is a set.
    captured = dict.fromkeys(id(external) for external, _ in graph.captures)
    metrics = [*model.metrics_variables, *(compile_loss.variables if compile_loss else ())]
    left_out = {id(v.value.handle) for v in [*connected, *metrics]}
    keras_variables = {id(v.value.handle): v for v in model.variables}
    every = {**{id(v.handle): v for v in graph.variables}, **keras_variables}
    order = {**keras_variables, **captured}
    return [every[key] for key in order if key in every and key in captured.keys() - left_out]
