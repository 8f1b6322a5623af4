"""The evaluation of a compiled Keras model, without a program to train it: sums of its metrics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf

from tfspark.data.spec import STRING, RowSpec
from tfspark.errors import ProgramError
from tfspark.graph.keras_metrics import metric_sums, reset
from tfspark.graph.keras_view import KerasView, unpack
from tfspark.graph.program import SEED, MetricSums
from tfspark.graphdef.functions import trace_graph
from tfspark.graphdef.loader import load
from tfspark.graphdef.variables import purify_function


def sums_from_keras(view: KerasView, inputs: RowSpec) -> MetricSums:
    """What batches add to the loss and the metrics of a compiled model, as `evaluate` does.

    Args:
        view: of a compiled model, which is built if it is not, and otherwise stays as it is.
        inputs: of a row.

    Raises:
        ProgramError: the model has no loss, or one that is no mean or sum over rows.
    """
    view.build(inputs)
    reset(view)

    def added(*tensors: Any) -> list[Any]:
        return batch_sums(view, inputs, *tensors[:-1], None, None, None)

    signature = [
        *(tf.TensorSpec([None, *field.shape], field.dtype) for field in inputs.fields),
        tf.TensorSpec([2], tf.int64),
    ]
    purified = purify_function(trace_graph(added, signature), seeded=True)
    view.clear()  # of tensors of the traced graph
    count = len(purified.graph.outputs) - len(purified.variables)
    graph = replace(purified.graph, outputs=purified.graph.outputs[:count])
    return MetricSums(graph, tuple(v.numpy() for v in purified.variables), inputs)


def batch_sums(view: KerasView, spec: RowSpec, *tensors: Any) -> list[Any]:
    """What a batch adds to the metrics of a model, in the graph that is being built.

    Args:
        view: of the model, after `reset`.
        spec: of a row.
        *tensors: the batch, then three that a step has besides: rows, rows of all ranks, a seed.
    """
    x, y, sample_weight = unpack(spec, tensors[:-3])
    rows = tf.shape(tf.nest.flatten(x)[0])[0]
    predictions = view.call(x, training=False)
    loss = view.loss(rows, 1.0, x, y, predictions, sample_weight, training=False)
    view.update_metrics(loss, rows, x, y, predictions, sample_weight)
    return metric_sums(view.metric_variables())


def check_additive(view: KerasView, sums: MetricSums) -> None:
    """Refuses metrics that cannot be added over batches and ranks.

    Compares what made-up rows add with what two halves of them add.

    Raises:
        ProgramError: names the metric.
    """
    rng, rows = np.random.default_rng(0), 8
    batch = []
    for field in sums.inputs.fields:
        shape = [rows, *(2 if size is None else size for size in field.shape)]
        if field.dtype == STRING:
            batch.append(np.full(shape, b"0", object))
        elif field.numpy_dtype.kind == "f":
            batch.append(rng.uniform(size=shape).astype(field.numpy_dtype))
        else:
            batch.append(rng.integers(0, 2, shape).astype(field.numpy_dtype))
    run = load(sums.graph)

    def added(part: slice) -> list[np.ndarray]:
        return [x.numpy() for x in run(*(c[part] for c in batch), SEED, *sums.weights)]

    try:
        parts = added(slice(None)), added(slice(3)), added(slice(3, None))
    except tf.errors.InvalidArgumentError:
        return  # made-up rows that this model cannot read, such as encoded images
    for name, whole, first, second in zip(view.metric_names(), *parts, strict=True):
        if not np.allclose(whole, first + second, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise ProgramError(
                "A metric's variables must be sums over rows, to be added over batches and ranks. "
                f"Received: {name!r}, which is not. Use a metric that sums in "
                "update_state and divides in result, and a loss that is a mean over rows."
            )
