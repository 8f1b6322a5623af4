"""RDDs of frames: raw bytes through Spark's shuffle, without a pickle on the way.

`partitionBy` and `zip` of PySpark pickle every element, and `zip` passes both sides through one
more Python worker to make their batches alike. Here a partition is a sequence of byte strings that
go straight between the JVM and our own functions, and an RDD costs a fifth of the calls into the
JVM that PySpark makes for it: a round of 30 steps has some 120 RDDs, described while nothing else
runs.

Of the code that trains, this file alone touches PySpark's internals (`_jrdd`,
`SimplePythonFunction`, `PairwiseRDD`, `NoOpSerializer`: the same from Spark 3.5 to 4.x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from pyspark import Broadcast, SparkContext, StorageLevel
from pyspark.rdd import RDD
from pyspark.serializers import (
    CloudPickleSerializer,
    NoOpSerializer,
    PairDeserializer,
    pack_long,
)

Frames: TypeAlias = RDD  # of bytes; PySpark has no type of its own for them


def empty(context: SparkContext, partitions: int) -> RDD:
    """Partitions without elements, for functions that need to know their partition only."""
    # A range would be computed by a Python worker of its own, see `frames`.
    return context.parallelize([], partitions)


def frames(
    rdd: RDD,
    function: Callable[[int, Iterable[Any]], Iterable[bytes]],
    *,
    barrier: bool = False,
) -> Frames:
    """The frames that `function(partition, elements)` yields for each partition of any RDD.

    Where Python computes the elements too, a task has two workers at the same time. Spark hands
    idle workers out in turn, so that from then on twice as many load the model.

    Args:
        rdd: any RDD.
        function: see above.
        barrier: compute all partitions at the same time, in a barrier stage.
    """
    return _Described(
        _python_rdd(rdd, function, barrier).asJavaRDD(), rdd.context, NoOpSerializer()
    )


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
    jvm = _bridge(rdd.context)
    keyed = _python_rdd(rdd, _Keyed(function))
    pairs = jvm.pairwise_rdd(keyed).asJavaPairRDD()
    partitioned = pairs.partitionBy(jvm.partitioner_into(num_ranks))
    partitioned.rdd().setSerializer(jvm.serializer)
    return _Described(jvm.python_rdd.valueOfPair(partitioned), rdd.context, NoOpSerializer())


def zip_frames(left: Frames, right: Frames) -> RDD:
    """Pairs of frames, partition by partition; both sides must hold equally many."""
    return _Described(
        left._jrdd.zip(right._jrdd),
        left.context,
        PairDeserializer(NoOpSerializer(), NoOpSerializer()),
    )


def held(rdd: Frames) -> Frames:
    """The persisted frames of an RDD that has been computed, as an RDD that knows nothing else.

    What a barrier stage has computed makes every stage that reads it a barrier stage, persisted or
    not: it would need all slots at once. This one reads the blocks and has no past. If all copies
    of one are lost, a job that reads it fails.

    Args:
        rdd: persisted; its blocks live as long as it does.
    """
    context, jvm = rdd.context, _bridge(rdd.context)
    number = rdd.getNumPartitions()
    blocks = context._gateway.new_array(jvm.block_id, number)
    for partition in range(number):
        blocks[partition] = jvm.rdd_block_id(rdd.id(), partition)
    made = jvm.block_rdd(context._jsc.sc(), blocks, rdd._jrdd.classTag())
    return RDD(made.toJavaRDD(), context, NoOpSerializer())


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
    others = context._jsc.sc().getExecutorMemoryStatus().size() - 1
    return StorageLevel.MEMORY_AND_DISK_2 if others >= 2 else StorageLevel.MEMORY_AND_DISK


def scratch_folder(context: SparkContext) -> str:
    """A folder on the driver's host, in Spark's local folder; Spark deletes it when it stops."""
    return str(context._temp_dir)


class _Described(RDD):
    """An RDD that asks the JVM for its number when somebody wants to know, as PipelinedRDD does."""

    def __init__(self, jrdd: Any, context: SparkContext, deserializer: Any):
        self._jrdd, self._jrdd_deserializer, self.ctx = jrdd, deserializer, context
        self.is_cached = self.is_checkpointed = self.has_resource_profile = False
        self.partitioner = None
        self._id: int | None = None

    def id(self) -> int:
        """See `RDD.id`."""
        if self._id is None:
            self._id = self._jrdd.id()
        return self._id


@dataclass(frozen=True)
class _Bridge:
    """What PySpark looks up in the JVM, or sends there, for every RDD anew."""

    python_function: Any
    python_rdd: Any
    pairwise_rdd: Any
    partitioner: Any
    serializer: Any
    block_rdd: Any
    block_id: Any
    rdd_block_id: Any
    environment: Any
    includes: Any

    included: list[str]  # what is in `includes`, to see that addPyFile was called since

    partitioners: dict[int, Any] = field(default_factory=dict)
    lists: dict[frozenset[str], Any] = field(default_factory=dict)

    def partitioner_into(self, partitions: int) -> Any:
        """By the number that comes with each frame, which is its partition."""
        if partitions not in self.partitioners:
            self.partitioners[partitions] = self.partitioner(partitions, id(exchange))
        return self.partitioners[partitions]

    def list_of(self, context: SparkContext, broadcasts: Iterable[Broadcast]) -> Any:
        """Broadcasts as a list of the JVM, which must not be changed: all functions share it."""
        by_name = {each._jbroadcast._get_object_id(): each._jbroadcast for each in broadcasts}
        names = frozenset(by_name)
        if names not in self.lists:
            jvm = context._jvm
            assert jvm is not None
            made = jvm.java.util.ArrayList()
            for each in by_name.values():
                made.add(each)
            # All functions of a run hold the same ones; those of runs before are not kept alive.
            self.lists.clear()
            self.lists[names] = made
        return self.lists[names]


_bridges: WeakKeyDictionary[SparkContext, _Bridge] = WeakKeyDictionary()


def _bridge(context: SparkContext) -> _Bridge:
    known = _bridges.get(context)
    if known is None or known.included != context._python_includes:
        jvm = context._jvm
        assert jvm is not None
        environment, includes = jvm.java.util.HashMap(), jvm.java.util.ArrayList()
        for name, value in context.environment.items():
            environment.put(name, value)
        for path in context._python_includes or ():
            includes.add(path)
        known = _bridges[context] = _Bridge(
            jvm.SimplePythonFunction,
            jvm.PythonRDD,
            jvm.PairwiseRDD,
            jvm.PythonPartitioner,
            # For byte arrays Spark chooses Kryo, and every task makes some of it anew, each with
            # hundreds of registrations: two fifths of what an empty stage costs an executor.
            jvm.org.apache.spark.serializer.JavaSerializer(context._jsc.sc().conf()),
            jvm.org.apache.spark.rdd.BlockRDD,
            jvm.org.apache.spark.storage.BlockId,
            jvm.org.apache.spark.storage.RDDBlockId,
            environment,
            includes,
            list(context._python_includes or ()),
        )
    return known


def _python_rdd(
    rdd: RDD, function: Callable[[int, Iterable[Any]], Iterable[bytes]], barrier: bool = False
) -> Any:
    """A JVM RDD of the bytes that a Python function yields."""
    context, jvm = rdd.context, _bridge(rdd.context)
    # A call that was interrupted may have left its broadcasts there, which are destroyed by now.
    context._pickled_broadcast_vars.clear()
    command = CloudPickleSerializer().dumps(
        (function, None, rdd._jrdd_deserializer, NoOpSerializer())
    )
    # Pickling noted which broadcasts the function holds.
    broadcasts = jvm.list_of(context, context._pickled_broadcast_vars)
    context._pickled_broadcast_vars.clear()
    wrapped = jvm.python_function(
        bytearray(command),
        jvm.environment,
        jvm.includes,
        context.pythonExec,
        context.pythonVer,
        broadcasts,
        context._javaAccumulator,
    )
    return jvm.python_rdd(rdd._jrdd.rdd(), wrapped, False, barrier)


class _Keyed:
    """Interleaves destinations and frames, as Spark's PairwiseRDD reads them."""

    def __init__(self, function: Callable[[int, Iterable[Any]], Iterable[tuple[int, bytes]]]):
        self._function = function

    def __call__(self, partition: int, elements: Iterable[Any]) -> Iterator[bytes]:
        for destination, frame in self._function(partition, elements):
            yield pack_long(destination)
            yield frame
