"""The metrics of a model over rows that Spark holds, without a training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras
import numpy as np

from tfspark.data.batches import chunk_batches
from tfspark.data.dataset import TFDataset
from tfspark.data.failures import driver_errors, reporting
from tfspark.data.spec import RowSpec
from tfspark.errors import DataError
from tfspark.graph.output_sums import results_of_sums, sums_of_outputs
from tfspark.graph.program import SEED, MetricSums, Prediction
from tfspark.graphdef.loader import Loaded, configure_threads, load
from tfspark.graphdef.pure import PureGraph
from tfspark.inference.shipping import Shipped, active_context, ship_graph

PHASE = "evaluate"


def evaluate_dataset(sums: MetricSums, dataset: TFDataset, batch_size: int) -> list[np.ndarray]:
    """What all rows of a data set add to the metrics of a model, computed by Spark.

    Args:
        sums: the model.
        dataset: rows `(x, y)` or `(x, y, sample_weight)`.
        batch_size: most rows of one call of the model.

    Returns:
        One array per variable of the model's metrics.

    Raises:
        DataError: there is no row, or a row breaks its declaration.
        ClusterError: there is no SparkContext.
    """
    context = active_context()
    shipped = ship_graph(sums.graph, sums.weights, context)
    task = _Evaluate(shipped, _Rows(dataset.spec, dataset.mapping, batch_size))
    try:
        with driver_errors():
            parts = dataset.partitions(context).mapPartitionsWithIndex(task).collect()
    finally:
        shipped.content.destroy()
    return _total(parts)


def evaluate_locally(sums: MetricSums, dataset: TFDataset, batch_size: int) -> list[np.ndarray]:
    """The same as `evaluate_dataset`, computed in this process.

    Args, Returns, Raises: see there.
    """
    rows = _Rows(dataset.spec, dataset.mapping, batch_size)
    run = load(sums.graph)
    return _total([rows.added(run, sums.weights, 0, dataset.local_chunks())])


def evaluate_outputs(
    prediction: Prediction,
    dataset: TFDataset,
    metrics: Mapping[str, Any],
    batch_size: int,
    *,
    means: Sequence[str] = (),
    local: bool = False,
) -> dict[str, Any]:
    """Metrics of labels and a model's outputs over all rows of a data set.

    Args:
        prediction: of the first fields of a row, as many as it has inputs.
        dataset: rows `(x, y)`; weights of rows are not looked at, as in metrics of Keras.
        metrics: Keras metrics by name, of labels and outputs.
        batch_size: most rows of one call of the model.
        means: names for the first outputs, of which the mean over rows is taken; metrics see the
            others: one as it is, several as a list.
        local: compute in this process.

    Returns:
        By name: the means, then the metrics.
    """
    rows = dataset.row_spec
    averages = {name: keras.metrics.Mean(name=name) for name in means}

    def update(batch: Sequence[Any], outputs: Sequence[Any]) -> None:
        for average, output in zip(averages.values(), outputs, strict=False):
            average.update_state(output)
        labels = rows.unflatten(batch)[1] if dataset.labelled else None
        predicted = list(outputs[len(means) :])
        for metric in metrics.values():
            metric.update_state(labels, predicted[0] if len(predicted) == 1 else predicted)

    every = {**averages, **metrics}
    sums = sums_of_outputs(prediction, rows, every, update)
    found = (evaluate_locally if local else evaluate_dataset)(sums, dataset, batch_size)
    return results_of_sums(every, found)


Part: TypeAlias = tuple[int, list[np.ndarray]]
"""Rows, and what they add; nothing where there are none."""


def _total(parts: Sequence[Part]) -> list[np.ndarray]:
    held = [part for rows, part in parts if rows]
    if not held:
        raise DataError("An evaluation needs at least one row. Received: none.")
    # In the order of partitions, so that it repeats bit by bit.
    return [np.sum(each, axis=0) for each in zip(*held, strict=True)]


@dataclass(frozen=True)
class _Rows:
    """How rows are read.

    Attributes:
        spec: of them as they are in chunks.
        mapping: of the data set.
        batch_size: most rows of one call.
    """

    spec: RowSpec
    mapping: PureGraph | None
    batch_size: int

    def added(
        self, run: Loaded, weights: Sequence[np.ndarray], partition: int, chunks: Iterable[bytes]
    ) -> Part:
        """What the rows of chunks add."""
        rows, total = 0, None
        batches = chunk_batches(chunks, self.spec, self.mapping, self.batch_size, partition)
        for batch, count in batches:
            rows += count
            new = [value.numpy() for value in run(*batch, SEED, *weights)]
            pairs = zip(total or new, new, strict=True)
            total = [old + value for old, value in pairs] if total else new
        return rows, total or []


@dataclass(frozen=True)
class _Evaluate:
    """What a task does with chunks of a data set."""

    shipped: Shipped
    rows: _Rows

    def __call__(self, partition: int, chunks: Iterable[bytes]) -> Iterator[Part]:
        with reporting(partition=partition, phase=PHASE):
            configure_threads(self.shipped.threads)
            graph, weights = self.shipped.unpack()
            yield self.rows.added(load(graph), weights, partition, chunks)
