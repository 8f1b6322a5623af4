"""Where rows come from: RDDs, arrays, tf.data data sets, TFRecord files. DataFrames: `columns.py`.

A source makes chunks of checked rows (see `chunks.py`), one partition per rank, on Spark
(`chunks`) or in this process (`local_chunks`); both give every rank the same rows in the same
order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pyspark import SparkContext
from pyspark.rdd import RDD

from tfspark.data.chunks import PHASE, collect_dealt, encode_columns, encode_rows, regroup
from tfspark.data.failures import driver_errors, reporting, user_rows
from tfspark.data.spec import RowSpec

if TYPE_CHECKING:
    from tfspark.data.records import RecordReader


class Source(ABC):
    """Rows, not computed yet.

    Attributes:
        spec: of the rows.
        is_here: whether the rows lie in this process, not where Spark computes or reads them.
    """

    spec: RowSpec
    is_here: ClassVar[bool] = False

    @property
    def num_partitions(self) -> int:
        """Partitions of the rows as the user gave them."""
        return 1

    @abstractmethod
    def chunks(self, context: SparkContext, num_ranks: int) -> RDD:
        """RDD of chunks, partition `r` holding those of rank `r`; lazy."""

    def partitions(self, context: SparkContext) -> RDD:
        """RDD of chunks in partitions as they come; lazy.

        Rows that Spark or this process holds are in their order, others as partitions read them.
        """
        return self.chunks(context, context.defaultParallelism)

    @abstractmethod
    def local_chunks(self, num_ranks: int) -> Iterator[tuple[int, Iterable[bytes]]]:
        """(rank, its chunks) in this process, by rank; ranks without rows may be left out."""


class SparkSource(Source):
    """Rows that Spark computes."""

    @abstractmethod
    def encoded(self) -> RDD:
        """RDD of chunks in the partitions of the source."""

    def partitions(self, context: SparkContext) -> RDD:
        """See `Source`."""
        return self.encoded()

    def chunks(self, context: SparkContext, num_ranks: int) -> RDD:
        """See `Source`."""
        return regroup(self.encoded(), num_ranks)

    def local_chunks(self, num_ranks: int) -> Iterator[tuple[int, Iterable[bytes]]]:
        """See `Source`."""
        tagged = regroup(self.encoded(), num_ranks).mapPartitionsWithIndex(_tag)
        with driver_errors():
            for rank, pairs in groupby(tagged.toLocalIterator(), key=lambda pair: pair[0]):
                yield rank, (chunk for _, chunk in pairs)


@dataclass(frozen=True)
class RddSource(SparkSource):
    """An RDD of rows in the structure of the spec."""

    rdd: RDD
    spec: RowSpec

    @property
    def num_partitions(self) -> int:
        """Partitions of the RDD."""
        return self.rdd.getNumPartitions()

    def encoded(self) -> RDD:
        """RDD of chunks in the partitions of the RDD."""
        return self.rdd.mapPartitionsWithIndex(_EncodeRows(self.spec))


@dataclass(frozen=True)
class ArraySource(Source):
    """Arrays `[rows, *shape]`, one per field; rank `r` gets rows `r·n/N` to `(r+1)·n/N`."""

    is_here: ClassVar[bool] = True

    arrays: tuple[np.ndarray, ...]
    spec: RowSpec

    def chunks(self, context: SparkContext, num_ranks: int) -> RDD:
        """See `Source`."""
        pairs = [
            (rank, (0, number, chunk))
            for rank, chunks in self.local_chunks(num_ranks)
            for number, chunk in enumerate(chunks)
        ]
        return collect_dealt(context.parallelize(pairs, num_ranks), num_ranks)

    def local_chunks(self, num_ranks: int) -> Iterator[tuple[int, Iterable[bytes]]]:
        """See `Source`."""
        rows = len(self.arrays[0])
        for rank in range(num_ranks):
            part = slice(rank * rows // num_ranks, (rank + 1) * rows // num_ranks)
            yield rank, encode_columns(self.spec, [[a[part] for a in self.arrays]], rank)


@dataclass(frozen=True)
class RecordSource(Source):
    """Rows that every rank reads for itself: a tf.data data set, TFRecord files."""

    reader: RecordReader
    spec: RowSpec

    def chunks(self, context: SparkContext, num_ranks: int) -> RDD:
        """See `Source`."""
        ranks = context.parallelize(range(num_ranks), num_ranks)
        return ranks.mapPartitionsWithIndex(_ReadRank(self.reader, self.spec, num_ranks))

    def local_chunks(self, num_ranks: int) -> Iterator[tuple[int, Iterable[bytes]]]:
        """See `Source`."""
        for rank in range(num_ranks):
            yield rank, self.reader.chunks(self.spec, num_ranks, rank)


@dataclass(frozen=True)
class _EncodeRows:
    spec: RowSpec

    def __call__(self, partition: int, rows: Iterable[Any]) -> Iterator[bytes]:
        with reporting(partition=partition, phase=PHASE):
            yield from encode_rows(self.spec, user_rows(rows, partition), partition)


@dataclass(frozen=True)
class _ReadRank:
    reader: RecordReader
    spec: RowSpec
    num_ranks: int

    def __call__(self, rank: int, elements: Iterable[Any]) -> Iterator[bytes]:
        for _ in elements:
            pass
        with reporting(rank=rank, phase=PHASE):
            yield from self.reader.chunks(self.spec, self.num_ranks, rank)


def _tag(rank: int, chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    return ((rank, chunk) for chunk in chunks)
