"""The evaluation of a prediction, wherever its model came from: sums of Keras metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

from tfspark.data.mapping import DATASET_OPS
from tfspark.data.spec import RowSpec
from tfspark.errors import ProgramError
from tfspark.graph.keras_metrics import add_sums, metric_sums
from tfspark.graph.program import MetricSums, Prediction
from tfspark.graphdef.functions import trace_graph
from tfspark.graphdef.variables import call, purify_function

Update = Callable[[Sequence[Any], Sequence[Any]], None]
"""Adds a batch to metrics: given its tensors, and the outputs of the model."""


def sums_of_outputs(
    prediction: Prediction, rows: RowSpec, metrics: Mapping[str, Any], update: Update
) -> MetricSums:
    """What batches add to metrics that compare them with a model's outputs.

    Args:
        prediction: of the first fields of a row, as many as it has inputs.
        rows: of a row.
        metrics: Keras metrics by name; they are reset.
        update: updates them.

    Raises:
        ProgramError: a metric has no variables before it sees a batch.
    """
    with context.eager_mode():
        for metric in metrics.values():
            metric.reset_state()
    variables = _variables(metrics)
    inputs, batch = len(prediction.inputs.fields), len(rows.fields)

    def added(*tensors: Any) -> list[Any]:
        *_, seed = tensors[: batch + 1]
        outputs = call(prediction.graph, [*tensors[:inputs], seed, *tensors[batch + 1 :]])
        update(tensors[:batch], outputs)
        return metric_sums(variables)

    signature = [
        *(tf.TensorSpec([None, *field.shape], field.dtype) for field in rows.fields),
        tf.TensorSpec([2], tf.int64),
        *(tf.TensorSpec(weight.shape, weight.dtype) for weight in prediction.weights),
    ]
    purified = purify_function(trace_graph(added, signature), allow=DATASET_OPS)
    if len(_variables(metrics)) != len(variables):
        raise ProgramError(
            "A metric has its variables before it sees a batch. "
            f"Received: one of {', '.join(metrics)} that makes them later. Make them in __init__."
        )
    count = len(purified.graph.outputs) - len(purified.variables)
    graph = replace(purified.graph, outputs=purified.graph.outputs[:count])
    captured = (variable.numpy() for variable in purified.variables)
    return MetricSums(graph, (*prediction.weights, *captured), rows)


def results_of_sums(metrics: Mapping[str, Any], sums: Sequence[np.ndarray]) -> dict[str, Any]:
    """The metrics of sums, by name.

    Args:
        metrics: as given to `sums_of_outputs`.
        sums: one array for each of their variables.
    """
    with context.eager_mode():
        for metric in metrics.values():
            metric.reset_state()
        add_sums(_variables(metrics), sums)
        found = {name: np.asarray(metric.result()) for name, metric in metrics.items()}
    return {name: float(value) if value.ndim == 0 else value for name, value in found.items()}


def _variables(metrics: Mapping[str, Any]) -> list[Any]:
    return [variable for metric in metrics.values() for variable in metric.variables]
