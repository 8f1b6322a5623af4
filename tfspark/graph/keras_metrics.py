"""The metrics of a compiled Keras model as sums over rows, which ranks and steps can add up.

Keras keeps a metric in variables that `update_state` changes. Of a batch only the change is taken:
what it adds to the variables as they are after `reset_state`. Changes are added in float64, so that
an epoch of any length is as exact as its batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

from tfspark.graph.fused import replaced


def update_metrics(
    model: keras.Model, loss: Any, rows: Any, x: Any, y: Any, predictions: Any, sample_weight: Any
) -> None:
    """Adds a batch to the model's metrics, as its `train_step` and `test_step` do.

    Args:
        model: compiled.
        loss: of the batch, a mean over rows.
        rows: of the batch.
        x, y, predictions, sample_weight: of the batch.
    """
    model._loss_tracker.update_state(loss, sample_weight=rows)
    model.compute_metrics(x, y, predictions, sample_weight=sample_weight)


@contextmanager
def losses_by_rows(
    compile_loss: Any, y: Any, predictions: Any, rows: Any, share: Any
) -> Iterator[None]:
    """Has the means that Keras keeps of each output's loss weighted by rows, in the block.

    Keras weights them by the rows of a batch where their number is part of a graph, and not at all
    where it is not, as here.

    Args:
        compile_loss: of the model, or None.
        y, predictions: of the batch; what `compile_loss` is built for.
        rows: of the batch.
        share: rows of all ranks over those of this one, which a loss that is a sum is multiplied
            with.
    """
    if compile_loss is None:
        yield
        return
    if not compile_loss.built:
        compile_loss.build(y, predictions)
    losses = [entry.loss for entry in compile_loss._flat_losses]
    factors = [share if is_sum(loss) else None for loss in losses]
    weighted = [
        _ByRows(metric, rows, factor)
        for metric, factor in zip(compile_loss._metrics, factors, strict=False)
    ]
    with replaced(compile_loss, "_metrics", weighted):
        yield


class _ByRows:
    """Updates a mean of Keras with rows as weights."""

    def __init__(self, metric: Any, rows: Any, factor: Any):
        self._metric, self._rows, self._factor = metric, rows, factor

    def update_state(self, value: Any, sample_weight: Any = None) -> None:
        """With the loss of a batch."""
        if self._factor is not None:
            value = value * tf.cast(self._factor, value.dtype)
        self._metric.update_state(value, sample_weight=self._rows)


def is_sum(loss: Any) -> bool:
    """Whether a loss of Keras is a sum over rows."""
    return getattr(loss, "reduction", None) == "sum"


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


def reset(model: keras.Model) -> None:
    """Sets the metrics to what they are without a row."""
    with context.eager_mode():
        model.reset_metrics()


def results_of(model: keras.Model, sums: Sequence[np.ndarray]) -> dict[str, float]:
    """The metrics of sums, by their names and in the order of Keras's own logs.

    Args:
        model: whose `metric_sums` were added up.
        sums: one array per variable of its metrics.
    """
    with context.eager_mode():
        model.reset_metrics()
        add_sums(model.metrics_variables, sums)
        found = model.get_metrics_result()
        model.reset_metrics()
    return {name: _plain(value) for name, value in found.items()}


def add_sums(variables: Sequence[Any], sums: Sequence[np.ndarray]) -> None:
    """Adds sums to the variables of metrics that were reset; in eager mode."""
    for variable, value in zip(variables, sums, strict=True):
        start = np.asarray(variable.numpy(), np.float64)
        variable.assign((start + value).astype(variable.dtype))


def _plain(value: Any) -> Any:
    array = np.asarray(value)
    return float(array) if array.ndim == 0 else array
