"""Rows that a rank reads for itself, with TensorFlow's readers: tf.data, TFRecord files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optree
import tensorflow as tf
from tensorflow.core.framework import graph_pb2
from tensorflow.python.data.ops import dataset_ops
from tensorflow.python.eager import context

from tfspark.data.chunks import encode_columns, encode_rows
from tfspark.data.failures import user_rows
from tfspark.data.spec import Field, RowSpec, declared
from tfspark.errors import DataError

_READ_ROWS = 64
_PYTHON_OPS = {"PyFunc", "PyFuncStateless", "EagerPyFunc"}


class RecordReader(ABC):
    """Reads the rows of one rank; pickles."""

    @abstractmethod
    def dataset(self, num_ranks: int, rank: int) -> tf.data.Dataset:
        """The rank's rows; called in eager mode, where they are read."""

    def chunks(self, spec: RowSpec, num_ranks: int, rank: int) -> Iterator[bytes]:
        """The rank's rows as chunks.

        Raises:
            DataError: an element does not match the spec.
            UserFunctionError: reading, or a function of the data set, failed; names the row.
        """
        with context.eager_mode():
            dataset = self.dataset(num_ranks, rank)
            if any(None in field.shape for field in spec.fields):
                rows = user_rows(dataset.as_numpy_iterator(), rank)
                yield from encode_rows(spec, rows, rank)
            else:
                yield from encode_columns(spec, _columns(dataset, spec, rank), rank)


@dataclass(frozen=True)
class GraphReader(RecordReader):
    """A tf.data data set as a serialised graph, sharded by rank.

    Attributes:
        graph: from `serialised`.
        element_spec: of its elements.
        auto_shard_files: shard by files where there are enough, and by elements otherwise.
    """

    graph: bytes
    element_spec: Any
    auto_shard_files: bool = False

    def dataset(self, num_ranks: int, rank: int) -> tf.data.Dataset:
        """The rank's shard of the shipped data set."""
        variant = tf.raw_ops.DatasetFromGraph(graph_def=self.graph)
        dataset = dataset_ops._VariantDataset(variant, self.element_spec)
        if self.auto_shard_files:
            from tensorflow.python.data.experimental.ops import distribute

            return distribute._AutoShardDataset(dataset, num_ranks, rank)
        return dataset.shard(num_ranks, rank)


@dataclass(frozen=True)
class FunctionReader(RecordReader):
    """A data set that the user's function builds where it is read."""

    build: Callable[[int, int], tf.data.Dataset]

    def dataset(self, num_ranks: int, rank: int) -> tf.data.Dataset:
        """What the function builds."""
        return self.build(num_ranks, rank)


@dataclass(frozen=True)
class TFRecordReader(RecordReader):
    """TFRecord files, as raw records or parsed.

    Attributes:
        files: in the order in which they are dealt to ranks; if there are fewer files than ranks,
            every rank reads all of them and keeps every N-th record.
        features: `{name: tf.io.FixedLenFeature}`, or None for raw records.
    """

    files: tuple[str, ...]
    features: Mapping[str, Any] | None

    def dataset(self, num_ranks: int, rank: int) -> tf.data.Dataset:
        """The rank's files, or its share of their records."""
        if len(self.files) >= num_ranks:
            dataset = tf.data.TFRecordDataset(list(self.files[rank::num_ranks]))
        else:
            dataset = tf.data.TFRecordDataset(list(self.files)).shard(num_ranks, rank)
        if self.features is None:
            return dataset
        features = dict(self.features)
        return dataset.map(lambda record: tf.io.parse_single_example(record, features))


def serialised(dataset: tf.data.Dataset, seed: int) -> bytes:
    """The graph of a data set, for `GraphReader`.

    Args:
        dataset: made in eager or in graph mode.
        seed: for its operations that have none; without it every rank would shuffle differently,
            and rows would be lost between the shards.

    Raises:
        DataError: the data set is infinite, runs Python code, or holds what cannot be shipped.
    """
    cardinality, graph = _fetched(
        lambda: [
            tf.data.experimental.cardinality(dataset),
            tf.raw_ops.DatasetToGraphV2(
                input_dataset=dataset._variant_tensor,
                external_state_policy=1,  # randomness is seeded below; Python is refused below
                strip_device_assignment=True,
            ),
        ],
        dataset,
    )
    if cardinality == tf.data.INFINITE_CARDINALITY:
        raise DataError(
            "A data set must end, because every row is used once per epoch. Received: a tf.data "
            "data set without end. Remove repeat(), or limit it with take(n)."
        )
    definition = graph_pb2.GraphDef.FromString(graph)
    for node in _nodes(definition):
        if node.op in _PYTHON_OPS:
            raise DataError(
                "A tf.data data set is shipped to the executors as a graph, without Python. "
                f"Received: one with {node.name!r} of type {node.op} (py_function, "
                "numpy_function or from_generator). Pass a function build(num_shards, index) "
                "that makes the data set there, or use an RDD."
            )
    _seed_randomness(definition, seed)
    return definition.SerializeToString(deterministic=True)


def element_spec_of(dataset: Any) -> RowSpec:
    """The row spec of a data set's elements.

    Raises:
        DataError: it is no data set, or has elements that are not dense tensors of known rank.
    """
    if not isinstance(dataset, tf.data.Dataset):
        raise DataError(
            "Rows come from a tf.data.Dataset, or from a function build(num_shards, index) that "
            f"returns one. Received: {type(dataset).__name__}."
        )
    for spec in optree.tree_leaves(dataset.element_spec):
        if not isinstance(spec, tf.TensorSpec):
            raise DataError(
                "The elements of a data set must be dense tensors. "
                f"Received: {spec!r}. Use tf.sparse.to_dense or RaggedTensor.to_tensor."
            )
    return RowSpec.of(declared(dataset.element_spec))


def feature_fields(features: Mapping[str, Any] | None) -> Any:
    """The structure of rows that a feature spec parses; without one, a record is one string."""
    if features is None:
        return Field("record", "string", ())
    for name, feature in features.items():
        if not isinstance(feature, tf.io.FixedLenFeature):
            raise DataError(
                "A feature of TFRecord files is a tf.io.FixedLenFeature, so that rows have one "
                f"shape. Received: {type(feature).__name__} for {name!r}. Read raw records and "
                "parse them in map()."
            )
    return declared(
        {name: (feature.dtype, list(feature.shape)) for name, feature in features.items()}
    )


def find_files(paths: str | Sequence[str]) -> tuple[str, ...]:
    """Files of a path, a glob pattern, a folder, or a list of these, sorted within each.

    Raises:
        DataError: one of them matches no file.
    """
    files: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        if tf.io.gfile.isdir(path):
            found = [
                tf.io.gfile.join(path, name)
                for name in sorted(tf.io.gfile.listdir(path))
                if not name.startswith(("_", "."))
            ]
            found = [name for name in found if not tf.io.gfile.isdir(name)]
        else:
            found = sorted(tf.io.gfile.glob(path))
        if not found:
            raise DataError(
                "TFRecord files are given as a file, a folder, a glob pattern, or a list of "
                f"these. Received: {path!r}, where there is no file."
            )
        files += found
    return tuple(files)


def _columns(dataset: tf.data.Dataset, spec: RowSpec, rank: int) -> Iterator[list[np.ndarray]]:
    """The elements as arrays of many rows; one by one only to find the row that fails."""
    done = 0
    batches = iter(dataset.batch(_READ_ROWS))
    while True:
        try:
            batch = next(batches, None)
        except tf.errors.OpError:
            rows = dataset.skip(done).take(_READ_ROWS).as_numpy_iterator()
            for _ in user_rows(rows, rank, done):
                pass
            raise
        if batch is None:
            return
        arrays = [tensor.numpy() for tensor in spec.flatten(batch)]
        yield arrays
        done += len(arrays[0])


def _fetched(make: Callable[[], list[Any]], dataset: tf.data.Dataset) -> list[Any]:
    """Values of tensors about a data set, in whichever mode it was made."""
    variant = dataset._variant_tensor
    try:
        if isinstance(variant, tf.__internal__.EagerTensor):
            with context.eager_mode():
                return [tensor.numpy() for tensor in make()]
        with variant.graph.as_default(), tf.compat.v1.Session(graph=variant.graph) as session:
            return session.run(make())
    except tf.errors.OpError as error:
        raise DataError(
            "A tf.data data set is shipped to the executors as a graph. "
            f"Received: one that cannot be written as a graph ({error.message}). Pass a function "
            "build(num_shards, index) that makes the data set there."
        ) from error


def _nodes(definition: graph_pb2.GraphDef) -> Iterator[Any]:
    yield from definition.node
    for function in definition.library.function:
        yield from function.node_def


def _seed_randomness(definition: graph_pb2.GraphDef, seed: int) -> None:
    """Gives random operations without a seed one of their own."""
    scopes = [definition.node, *(f.node_def for f in definition.library.function)]
    number = 0
    for nodes in scopes:
        zeros = {node.name for node in nodes if node.op == "Const" and _is_zero(node)}
        for node in list(nodes):
            attributes = [node.attr[name] for name in ("seed", "seed2") if name in node.attr]
            if len(attributes) == 2 and not any(attribute.i for attribute in attributes):
                number += 1
                attributes[0].i, attributes[1].i = seed % 2**31 + 1, number
            places = _SEED_INPUTS.get(node.op)
            if places and all(node.input[place].split(":")[0] in zeros for place in places):
                number += 1
                for place, value in zip(places, (seed % 2**31 + 1, number), strict=True):
                    constant = nodes.add(name=f"tfspark_seed_{number}_{place}", op="Const")
                    constant.attr["dtype"].type = tf.int64.as_datatype_enum
                    constant.attr["value"].tensor.CopyFrom(
                        tf.make_tensor_proto(value, tf.int64, shape=[])
                    )
                    suffix = ":output:0" if nodes is not definition.node else ""
                    node.input[place] = constant.name + suffix


# Where data sets with randomness take seed and seed2.
_SEED_INPUTS = {
    "ShuffleDataset": (2, 3),
    "ShuffleDatasetV3": (2, 3),
    "ShuffleAndRepeatDataset": (2, 3),
    "ShuffleAndRepeatDatasetV2": (2, 3),
    "RandomDataset": (0, 1),
    "RandomDatasetV2": (0, 1),
    "AnonymousSeedGenerator": (0, 1),
    "AnonymousRandomSeedGenerator": (0, 1),
}


def _is_zero(node: Any) -> bool:
    tensor = node.attr["value"].tensor
    if tensor.dtype != tf.int64.as_datatype_enum or tensor.tensor_shape.dim:
        return False
    return tf.make_ndarray(tensor) == 0
