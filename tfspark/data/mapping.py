"""The user's map over rows, traced once on the driver into a pure graph over batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import optree
import tensorflow as tf

from tfspark.data.spec import Field, RowSpec, declared
from tfspark.errors import DataError, ProgramError
from tfspark.graphdef.pure import PureGraph
from tfspark.graphdef.variables import call, trace

# What a data set that lives and dies within one call of the graph is made of.
DATASET_OPS = frozenset(
    {"TensorSliceDataset", "ParallelMapDatasetV2", "BatchDatasetV2", "DatasetToSingleElement"}
)
# Functions that are mapped one after the other draw from different seeds.
_NEXT_FUNCTION = np.array([0x632BE59BD9B4E019, 0x9E6C63D0876A9A47], np.uint64).view(np.int64)


@dataclass(frozen=True)
class RowMapping:
    """Functions from row to row, one after the other, as pure graphs.

    Attributes:
        source: spec of the rows that go in.
        target: spec of the rows that come out; all dimensions are known.
        functions: one pure graph each. Inputs: one tensor per field, then a seed int64 `[2]`.
    """

    source: RowSpec
    target: RowSpec
    functions: tuple[PureGraph, ...]

    @classmethod
    def identity(cls, spec: RowSpec) -> RowMapping:
        """The mapping that changes nothing."""
        return cls(spec, spec, ())

    def then(self, function: Callable[..., Any]) -> RowMapping:
        """This mapping and then a function as `tf.data.Dataset.map` takes it.

        Args:
            function: called once, with symbolic tensors in the structure of a row; a tuple's
                elements are separate arguments. Returns a structure of tensors of known shapes.
                Random operations in it become functions of seed, epoch and row.

        Raises:
            DataError: it calls Python code in every row, keeps a state, or returns something else
                than tensors of known shapes.
        """
        spec = self.target
        converted = with_autograph(function)
        structures: list[Any] = []

        def flat(*tensors: Any) -> list[Any]:
            row = spec.unflatten(tensors[:-1])
            result = converted(*row) if isinstance(row, tuple) else converted(row)
            structure = optree.tree_map(_tensor, result, none_is_leaf=True)
            structures.append(structure)
            return optree.tree_leaves(structure)

        signature = [
            tf.TensorSpec(field.shape, field.dtype, field.name.replace("/", "_"))
            for field in spec.fields
        ]
        try:
            graph = trace(flat, [*signature, tf.TensorSpec([2], tf.int64)], seeded=True).graph
        except ProgramError as error:
            raise DataError(f"In {_name(function)} given to map(): {error.message}") from error
        return RowMapping(
            self.source, _spec(structures[-1], spec, function), (*self.functions, graph)
        )

    @cached_property
    def batch(self) -> PureGraph:
        """The whole mapping over a batch.

        Inputs: one tensor `[rows, *shape]` per field of `source`, then `row_seeds` int64
        `[rows, 2]`. Outputs: one tensor `[rows, *shape]` per field of `target`.
        """

        def row(*tensors: Any) -> tuple[Any, ...]:
            *values, seed = tensors
            for function in self.functions:
                values = call(function, [*values, seed])
                seed = seed + tf.constant(_NEXT_FUNCTION)
            return tuple(values)

        def over_batch(*tensors: Any) -> Any:
            rows = tf.shape(tensors[-1], out_type=tf.int64)[0]
            dataset = tf.data.Dataset.from_tensor_slices(tensors)
            dataset = dataset.map(row, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
            return dataset.batch(rows).get_single_element()

        signature = [
            tf.TensorSpec([None, *field.shape], field.dtype) for field in self.source.fields
        ]
        seeds = tf.TensorSpec([None, 2], tf.int64, "row_seeds")
        return trace(over_batch, [*signature, seeds], allow=DATASET_OPS).graph


def with_autograph(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose Python conditions on tensors become TensorFlow's.

    Objects whose `__call__` is marked with `do_not_convert` stay as they are: AutoGraph, called for
    them, would leave the function alone and still wrap its errors in errors of its own.
    """
    if hasattr(type(function).__call__, "autograph_info__"):
        return function
    autograph = tf.__internal__.autograph
    return autograph.tf_convert(function, autograph.control_status_ctx())


def _tensor(value: Any) -> Any:
    if isinstance(value, (tf.SparseTensor, tf.RaggedTensor)) or value is None:
        raise DataError(
            "A function for map() returns dense tensors. "
            f"Received: {type(value).__name__}. Use tf.sparse.to_dense or "
            "RaggedTensor.to_tensor(shape=…)."
        )
    return tf.convert_to_tensor(value)


def _spec(structure: Any, source: RowSpec, function: Callable[..., Any]) -> RowSpec:
    for tensor in optree.tree_leaves(structure):
        if not tensor.shape.is_fully_defined():
            raise DataError(
                "A function for map() returns tensors of known shapes, so that rows make a "
                f"batch. Received: {tensor.shape} from {_name(function)}. "
                "Give it a shape with tf.ensure_shape, or tensor.set_shape."
            )
    specs = optree.tree_map(lambda tensor: tf.TensorSpec(tensor.shape, tensor.dtype), structure)
    spec = RowSpec.of(declared(specs))
    if spec.treedef != source.treedef:
        return spec
    fields: list[Field] = [
        replace(field, name=old.name) for field, old in zip(spec.fields, source.fields, strict=True)
    ]
    return RowSpec(tuple(fields), spec.treedef)


def _name(function: Callable[..., Any]) -> str:
    return f"the function {getattr(function, '__name__', repr(function))!r}"
