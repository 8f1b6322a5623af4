"""The metrics of a Keras model over rows that Spark holds, without a training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from pyspark import SparkContext

from tfspark.data.batches import mapped
from tfspark.data.chunks import decode
from tfspark.data.dataset import TFDataset
from tfspark.data.failures import driver_errors, reporting
from tfspark.data.order import row_seeds
from tfspark.data.rows import columns_of, physical_spec
from tfspark.data.spec import RowSpec
from tfspark.errors import DataError
from tfspark.graph.program import SEED, MetricSums
from tfspark.graphdef.loader import configure_threads, load
from tfspark.graphdef.pure import PureGraph
from tfspark.inference.shipping import Shipped, ship_graph

PHASE = "evaluate"


def evaluate_dataset(sums: MetricSums, dataset: TFDataset, batch_size: int) -> list[np.ndarray]:
    """What all rows of a data set add to the metrics of a model.

    Args:
        sums: the model.
        dataset: rows `(x, y)` or `(x, y, sample_weight)`.
        batch_size: most rows of one call of the model.

    Returns:
        One array per variable of the model's metrics.

    Raises:
        DataError: there is no row, or a row breaks its declaration.
    """
    context = SparkContext.getOrCreate()
    shipped = ship_graph(sums.graph, sums.weights, context)
    task = _Evaluate(shipped, dataset.spec, dataset.mapping, batch_size)
    try:
        with driver_errors():
            parts = dataset.partitions(context).mapPartitionsWithIndex(task).collect()
    finally:
        shipped.content.destroy()
    if not sum(rows for rows, _ in parts):
        raise DataError("An evaluation needs at least one row. Received: none.")
    # In the order of partitions, so that it repeats bit by bit.
    held = [part for rows, part in parts if rows]
    return [np.sum(each, axis=0) for each in zip(*held, strict=True)]


@dataclass(frozen=True)
class _Evaluate:
    """What a task does with chunks of a data set."""

    shipped: Shipped
    spec: RowSpec
    mapping: PureGraph | None
    batch_size: int

    def __call__(
        self, partition: int, chunks: Iterable[bytes]
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        rows, total = 0, None
        with reporting(partition=partition, phase=PHASE):
            configure_threads(self.shipped.threads)
            graph, weights = self.shipped.unpack()
            run = load(graph)
            for chunk in chunks:
                decoded = decode(chunk)
                spec = physical_spec(decoded.schema, self.spec)
                for start in range(0, decoded.num_rows, self.batch_size):
                    part = decoded.slice(start, self.batch_size)
                    ids = np.arange(rows, rows + part.num_rows)
                    rows += part.num_rows
                    seeds = row_seeds(0, partition, 0, ids)
                    batch = mapped(self.mapping, columns_of(part, spec), ids, seeds, partition)
                    added = [value.numpy() for value in run(*batch, SEED, *weights)]
                    total = (
                        added
                        if total is None
                        else [old + new for old, new in zip(total, added, strict=True)]
                    )
            yield rows, total or []
