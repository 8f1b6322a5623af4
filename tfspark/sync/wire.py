"""RDDs of frames: raw bytes through Spark's shuffle, without a pickle on the way.

`partitionBy` and `zip` of PySpark pickle every element, and `zip` passes both sides through one
more Python worker to make their batches alike. Here a partition is a sequence of byte strings that
go straight between the JVM and our own functions. This file alone touches PySpark's internals
(`_jrdd`, `PairwiseRDD`, `NoOpSerializer`: the same from Spark 3.5 to 4.x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from pyspark import SparkContext, StorageLevel
from pyspark.rdd import RDD, PipelinedRDD
from pyspark.serializers import NoOpSerializer, PairDeserializer, pack_long

Frames: TypeAlias = RDD  # of bytes; PySpark has no type of its own for them


def frames(rdd: RDD, function: Callable[[int, Iterable[Any]], Iterable[bytes]]) -> Frames:
    """The frames that `function(partition, elements)` yields for each partition of any RDD."""
    mapped = PipelinedRDD(rdd, function)
    mapped._bypass_serializer = True
    return mapped


def exchange(
    rdd: RDD, function: Callable[[int, Iterable[Any]], Iterable[tuple[int, bytes]]], num_ranks: int
) -> Frames:
    """Frames sent from partitions to partitions through a shuffle.

    Args:
        rdd: any RDD.
        function: yields (destination rank, frame) for each partition.
        num_ranks: number of destinations.

    Returns:
        partition `r` holds what was sent to rank `r`, in no particular order.
    """
    keyed = frames(rdd, _Keyed(function))
    jvm = rdd.context._jvm
    assert jvm is not None
    pairs = jvm.PairwiseRDD(keyed._jrdd.rdd()).asJavaPairRDD()
    partitioner = jvm.PythonPartitioner(num_ranks, id(exchange))
    return RDD(
        jvm.PythonRDD.valueOfPair(pairs.partitionBy(partitioner)), rdd.context, NoOpSerializer()
    )


def zip_frames(left: Frames, right: Frames) -> RDD:
    """Pairs of frames, partition by partition; both sides must hold equally many."""
    return RDD(
        left._jrdd.zip(right._jrdd),
        left.context,
        PairDeserializer(NoOpSerializer(), NoOpSerializer()),
    )


def compute(rdd: Frames) -> int:
    """Computes every partition without sending it anywhere; the number of frames."""
    return rdd._jrdd.rdd().count()


def release(rdd: Frames) -> None:
    """Drops the persisted blocks of an RDD; does not wait."""
    rdd._jrdd.unpersist(False)


def clean_shuffles(rdd: Frames) -> None:
    """Deletes the shuffle files that lead to an RDD, back to the last persisted one."""
    rdd._jrdd.rdd().cleanShuffleDependencies(False)


def commit_level(context: SparkContext) -> StorageLevel:
    """Where a commit is kept: on two executors where there are two."""
    # One entry of the status map is the driver, unless the driver is the executor (local mode).
    others = context._jsc.sc().getExecutorMemoryStatus().size() - 1  # type: ignore[union-attr]
    return StorageLevel.MEMORY_AND_DISK_2 if others >= 2 else StorageLevel.MEMORY_AND_DISK


class _Keyed:
    """Interleaves destinations and frames, as Spark's PairwiseRDD reads them."""

    def __init__(self, function: Callable[[int, Iterable[Any]], Iterable[tuple[int, bytes]]]):
        self._function = function

    def __call__(self, partition: int, elements: Iterable[Any]) -> Iterator[bytes]:
        for destination, frame in self._function(partition, elements):
            yield pack_long(destination)
            yield frame
