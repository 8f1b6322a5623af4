"""The metrics of a Keras model over rows that Spark holds, without a training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from tfspark.data.batches import chunk_batches
from tfspark.data.dataset import TFDataset
from tfspark.data.failures import driver_errors, reporting
from tfspark.data.spec import RowSpec
from tfspark.errors import DataError
from tfspark.graph.program import SEED, MetricSums
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
