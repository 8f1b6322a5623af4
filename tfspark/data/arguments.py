"""What the constructors of a data set are given: declarations, arrays, tf.data, columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optree
from pyspark.rdd import RDD

from tfspark.data.failures import driver_errors
from tfspark.data.sources import ArraySource, RecordSource
from tfspark.data.spec import RowSpec, declared, dtype_name, inferred
from tfspark.errors import DataError, InvalidInputError


def declared_rows(names: Any, shapes: Any, types: Any, features: Any, labels: Any) -> Any:
    """The structure of fields that `from_rdd` was given, or None."""
    by_lists = names is not None or shapes is not None or types is not None
    if by_lists and (features is not None or labels is not None):
        raise DataError(
            "Rows are declared by names, shapes and types, or by features and labels. "
            "Received: some of both. Leave one of them out."
        )
    if labels is not None and features is None:
        raise DataError("Labels need features beside them. Received: labels without features.")
    if features is not None:
        if labels is None:
            return declared(features, "features")
        return declared(features, "features"), declared(labels, "labels")
    if not by_lists:
        return None
    counts = {len(given) for given in (names, shapes, types) if given is not None}
    if len(counts) != 1 or shapes is None:
        raise DataError(
            "names, shapes and types have one entry per element of a row, and shapes are needed. "
            f"Received: names={names!r}, shapes={shapes!r}, types={types!r}."
        )
    (count,) = counts
    names = names or [f"input_{index}" for index in range(count)]
    types = types or ["float32"] * count
    return tuple(
        declared((dtype_name(dtype), shape), name)
        for name, shape, dtype in zip(names, shapes, types, strict=True)
    )


def first_row(rdd: RDD) -> Any:
    """The structure of fields that the first row of an RDD has."""
    with driver_errors():
        rows = rdd.take(1)
    if not rows:
        raise DataError(
            "A data set needs at least one row. Received: an empty RDD. Check the filters and "
            "joins that made it, or declare the rows with names, shapes and types."
        )
    (row,) = rows
    if isinstance(row, (tuple, list)) and len(row) in (2, 3) and _has_arrays(row):
        prefixes = ("features", "labels", "weights")
        return tuple(inferred(part, name) for part, name in zip(row, prefixes, strict=False))
    return inferred(row)


def _has_arrays(row: Any) -> bool:
    return isinstance(row, tuple) or any(hasattr(part, "dtype") for part in row)


def array_source(argument: str, tensors: Any) -> ArraySource:
    """The rows of a structure of arrays."""

    def is_array(node: Any) -> bool:
        if isinstance(node, list):
            return not any(
                hasattr(item, "dtype") or isinstance(item, (list, tuple)) for item in node
            )
        return not isinstance(node, (tuple, dict))

    leaves, treedef = optree.tree_flatten(tensors, is_leaf=is_array, none_is_leaf=True)
    arrays = tuple(np.asarray(leaf) for leaf in leaves)
    lengths = sorted({len(array) if array.ndim else -1 for array in arrays})
    if len(lengths) != 1 or lengths[0] < 0:
        raise DataError(
            f"The arrays of {argument} need one first dimension: their rows. "
            f"Received: shapes {', '.join(str(list(array.shape)) for array in arrays)}."
        )
    if lengths == [0]:
        raise DataError(f"A data set needs at least one row. Received: {argument} of 0 rows.")
    structure = optree.tree_unflatten(treedef, [_RowOf(array) for array in arrays])
    if isinstance(structure, tuple) and len(structure) in (2, 3):
        prefixes = ("features", "labels", "weights")
        fields: Any = tuple(
            declared(part, name) for part, name in zip(structure, prefixes, strict=False)
        )
    else:
        fields = declared(structure)
    return ArraySource(arrays, RowSpec.of(fields))


@dataclass(frozen=True)
class _RowOf:
    """What one row of an array declares."""

    array: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape[1:]


def tf_data_source(dataset: Any, auto_shard_files: bool, seed: int) -> RecordSource:
    """The elements of a `tf.data.Dataset`, or of a function that builds one."""
    from tensorflow.python.eager import context

    from tfspark.data.records import FunctionReader, GraphReader, element_spec_of, serialised

    if callable(dataset):
        with context.eager_mode():
            spec = element_spec_of(dataset(1, 0))
        return RecordSource(FunctionReader(dataset), spec)
    spec = element_spec_of(dataset)
    reader = GraphReader(serialised(dataset, seed), dataset.element_spec, auto_shard_files)
    return RecordSource(reader, spec)


def columns_structure(columns: str | Sequence[str]) -> Any:
    """One column for one tensor, several for a list of them."""
    names = [columns] if isinstance(columns, str) else list(columns)
    if not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"Columns are given by their names. Received: {columns!r}.")
    return names[0] if len(names) == 1 else names


def check_type(argument: str, value: Any, kind: type) -> None:
    """Refuses a value of another type."""
    if not isinstance(value, kind):
        raise InvalidInputError(
            f"{argument} must be of type {kind.__name__}. Received: {type(value).__name__}."
        )
