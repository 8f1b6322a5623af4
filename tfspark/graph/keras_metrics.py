"""The metrics of a compiled Keras model as sums over rows, which ranks and steps can add up.

Keras keeps a metric in variables that `update_state` changes. Of a batch only the change is taken:
what it adds to the variables as they are after `reset_state`. Changes are added in float64, so that
an epoch of any length is as exact as its batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

from tfspark.graph.keras_view import KerasView


def metric_sums(variables: Sequence[Any]) -> list[Any]:
    """What variables of metrics have become in this graph, less what they are outside of it.

    To be called in the graph that updates them, after a reset.
    """
    with tf.init_scope():
        before = [variable.numpy() for variable in variables]
    return [
        tf.cast(tf.convert_to_tensor(variable), tf.float64) - tf.constant(value, tf.float64)
        for variable, value in zip(variables, before, strict=True)
    ]


def reset(view: KerasView) -> None:
    """Sets the metrics of a model to what they are without a row."""
    with context.eager_mode():
        view.reset_metrics()


def results_of(view: KerasView, sums: Sequence[np.ndarray]) -> dict[str, float]:
    """The metrics of sums, by their names and in the order of Keras's own logs.

    Args:
        view: of the model whose `metric_sums` were added up.
        sums: one array per variable of its metrics.
    """
    with context.eager_mode():
        view.reset_metrics()
        add_sums(view.metric_variables(), sums)
        found = view.metric_results()
        view.reset_metrics()
    return {name: _plain(value) for name, value in found.items()}


def add_sums(variables: Sequence[Any], sums: Sequence[np.ndarray]) -> None:
    """Adds sums to the variables of metrics that were reset; in eager mode."""
    for variable, value in zip(variables, sums, strict=True):
        start = np.asarray(variable.numpy())
        variable.assign((start.astype(np.float64) + value).astype(start.dtype))


def _plain(value: Any) -> Any:
    array = np.asarray(value)
    return float(array) if array.ndim == 0 else array
