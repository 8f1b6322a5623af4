"""Rows of DataFrames: Arrow columns become columns of the store without Python objects per row.

| column | field |
|---|---|
| boolean | bool |
| byte, short, int, long | int8, int16, int32, int64 |
| float, double | float32, float64 |
| string, binary | string |
| date | int32, days since 1970-01-01 |
| timestamp, timestamp_ntz | int64, microseconds since 1970-01-01 (UTC) |
| array of these, of one length | one more dimension |
| ML vector, dense or sparse | float64 with one dimension |
| struct | dict of its fields |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optree
import pyarrow as pa
from pyspark import TaskContext
from pyspark.rdd import RDD
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from tfspark.data.chunks import PHASE, encode, slices
from tfspark.data.failures import driver_errors, reporting
from tfspark.data.rows import physical_schema
from tfspark.data.sources import SparkSource
from tfspark.data.spec import STRING, Field, RowSpec
from tfspark.errors import DataError

_DTYPES: dict[type[T.DataType], str] = {
    T.BooleanType: "bool",
    T.ByteType: "int8",
    T.ShortType: "int16",
    T.IntegerType: "int32",
    T.LongType: "int64",
    T.FloatType: "float32",
    T.DoubleType: "float64",
    T.StringType: STRING,
    T.BinaryType: STRING,
    T.DateType: "int32",
    T.TimestampType: "int64",
    T.TimestampNTZType: "int64",
}


@dataclass(frozen=True)
class DataFrameSource(SparkSource):
    """Columns of a DataFrame.

    Attributes:
        frame: with one column `c0`, `c1` … per column of the user, vectors as arrays.
        spec: the fields of all columns, structs taken apart.
        paths: for each field in flat order, its column's index and the struct fields within it.
        num_classes: for each field, of how many classes it is the number of one; None: of none.
    """

    frame: DataFrame
    spec: RowSpec
    paths: tuple[tuple[int, ...], ...]
    num_classes: tuple[int | None, ...] = ()

    @classmethod
    def of(
        cls, frame: DataFrame, structure: Any, num_classes: Mapping[str, int] | None = None
    ) -> DataFrameSource:
        """A source of a structure whose leaves are column names.

        Array columns get the length that they have in the first row, which takes a small job.

        Args:
            frame: the DataFrame.
            structure: of names.
            num_classes: by column, where rows hold the number of a class, counted from 0.

        Raises:
            DataError: a column is missing, or has a type that cannot become a tensor.
        """
        names, treedef = optree.tree_flatten(structure)
        schema = frame.select(*[column_named(frame, name) for name in names]).schema
        parts = []
        for name, column in zip(names, schema.fields, strict=True):
            field = _field(name, column.dataType)
            parts.append(field)
        selected = frame.select(
            *[
                _plain(column_named(frame, name), column.dataType).alias(f"c{index}")
                for index, (name, column) in enumerate(zip(names, schema.fields, strict=True))
            ]
        )
        paths = []
        for index, part in enumerate(parts):
            accessors = optree.tree_paths(part)
            for keys in accessors:
                kind: Any = selected.schema.fields[index].dataType
                path = [index]
                for key in keys:
                    path.append(kind.names.index(key))
                    kind = kind[key].dataType
                paths.append(tuple(path))
        spec = RowSpec.of(optree.tree_unflatten(treedef, parts))
        if any(field.shape for field in spec.fields):
            spec = _measured(spec, selected, paths)
        counts = num_classes or {}
        for field, (first, *_) in zip(spec.fields, paths, strict=True):
            if field.dtype == STRING and names[first] in counts:
                raise DataError(
                    "A label is the number of a class. "
                    f"Received: text in {names[first]!r}. "
                    "Number the classes with a StringIndexer."
                )
        by_field = [counts.get(names[first]) for first, *_ in paths]
        return cls(selected, spec, tuple(paths), tuple(by_field))

    @property
    def num_partitions(self) -> int:
        """Partitions of the DataFrame."""
        return self.frame.rdd.getNumPartitions()

    def encoded(self) -> RDD:
        """RDD of chunks in the partitions of the DataFrame."""
        encoded = self.frame.mapInArrow(
            _EncodeArrow(self.spec, self.paths, self.num_classes), "chunk binary"
        )
        return encoded.rdd.map(_first)


@dataclass(frozen=True)
class _EncodeArrow:
    spec: RowSpec
    paths: tuple[tuple[int, ...], ...]
    num_classes: tuple[int | None, ...]

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        context = TaskContext.get()
        partition = context.partitionId() if context is not None else 0
        with reporting(partition=partition, phase=PHASE):
            done, spec = 0, self.spec
            for batch in batches:
                if batch.num_rows == 0:
                    continue
                try:
                    physical, spec = to_physical(batch, spec, self.paths)
                    self._check_classes(batch)
                except DataError as error:
                    where = {**error.where, "partition": partition, "row": done + error.row}
                    raise DataError(error.message, **where) from error
                done += batch.num_rows
                for part in slices(physical):
                    yield pa.record_batch([pa.array([encode(part)], pa.binary())], ["chunk"])

    def _check_classes(self, batch: pa.RecordBatch) -> None:
        """Refuses a label that is not the number of a class."""
        for field, path, count in zip(self.spec.fields, self.paths, self.num_classes, strict=False):
            if count is None or field.shape or len(path) > 1:
                continue
            labels = batch.column(path[0]).to_numpy(zero_copy_only=False)
            wrong = np.flatnonzero(~((labels >= 0) & (labels < count) & (labels % 1 == 0)))
            if wrong.size:
                raise DataError(
                    f"A label is the number of one of {count} classes, from 0 to {count - 1}. "
                    f"Received: {labels[wrong[0]]} in {field.name!r}. Number the classes with a "
                    "StringIndexer, or give the model as many outputs as there are classes.",
                    row=int(wrong[0]),
                    field=field.name,
                )


def to_physical(
    batch: pa.RecordBatch, spec: RowSpec, paths: Sequence[tuple[int, ...]]
) -> tuple[pa.RecordBatch, RowSpec]:
    """Columns of Spark as columns of the store.

    Args:
        batch: with at least one row.
        spec: of the rows; dimensions of `None` are taken from this batch.
        paths: as in `DataFrameSource`.

    Returns:
        The batch of the physical schema, and the spec with all dimensions.

    Raises:
        DataError: a null or an array of another length; has the attribute `row`, within the batch.
    """
    columns, fields = [], []
    for field, path in zip(spec.fields, paths, strict=True):
        values = batch.column(path[0])
        _check_nulls(values, field, 1)
        for index in path[1:]:
            # `flatten` would mask the fields of null structs; there are none here.
            values = values.field(index)
            _check_nulls(values, field, 1)
        shape: list[int] = []
        for declared in field.shape:
            values, length = _unnested(values, field, declared, math.prod(shape))
            shape.append(length)
            _check_nulls(values, field, math.prod(shape))
        fields.append(replace(field, shape=tuple(shape)))
        columns.append(_physical(values, batch.num_rows, fields[-1]))
    known = RowSpec(tuple(fields), spec.treedef)
    return pa.RecordBatch.from_arrays(columns, schema=physical_schema(known)), known


def _physical(values: pa.Array, rows: int, field: Field) -> pa.Array:
    """Flat values of all rows as a column of the store."""
    elements = math.prod(size or 0 for size in field.shape)
    if field.dtype == STRING:
        if elements == 0:
            values = pa.array([b""] * rows, pa.large_binary())
        return pa.FixedSizeListArray.from_arrays(values.cast(pa.large_binary()), max(elements, 1))
    if pa.types.is_timestamp(values.type):
        values = values.cast(pa.timestamp("us", values.type.tz)).view(pa.int64())
    elif pa.types.is_date32(values.type):
        values = values.view(pa.int32())
    numbers = np.ascontiguousarray(values.to_numpy(zero_copy_only=False), field.numpy_dtype)
    width = elements * field.numpy_dtype.itemsize
    raw = pa.py_buffer(numbers.view(np.uint8))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), rows, [None, raw])


def _unnested(
    values: pa.Array, field: Field, declared: int | None, per_row: int
) -> tuple[pa.Array, int]:
    """The elements of arrays of one length, and that length."""
    if pa.types.is_fixed_size_list(values.type):
        lengths = np.full(len(values), values.type.list_size)
    else:
        lengths = np.diff(values.offsets.to_numpy())
    expected = int(lengths[0]) if declared is None and len(lengths) else declared or 0
    wrong = np.flatnonzero(lengths != expected)
    if wrong.size:
        raise DataError(
            "The arrays of a column must have one length, that of the first row. "
            f"Received: {lengths[wrong[0]]} elements in {field.name!r} instead of {expected}. "
            "Pad or cut them to one length before training.",
            row=int(wrong[0]) // max(per_row, 1),
            field=field.name,
        )
    return values.flatten(), expected


def _check_nulls(values: pa.Array, field: Field, per_row: int) -> None:
    if values.null_count:
        first = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(
            f"A column must have a value in every row. Received: null in {field.name!r}. "
            "Fill or drop missing values, for example with df.na.drop().",
            row=first // max(per_row, 1),
            field=field.name,
        )


def _field(name: str, kind: T.DataType) -> Any:
    """The field of a column, or a dict of them for a struct."""
    if isinstance(kind, T.StructType):
        return {part.name: _field(f"{name}.{part.name}", part.dataType) for part in kind.fields}
    shape: tuple[None, ...] = ()
    if _is_vector(kind):
        return Field(name, "float64", (None,))
    while isinstance(kind, T.ArrayType):
        kind, shape = kind.elementType, (*shape, None)
    dtype = _DTYPES.get(type(kind))
    if dtype is None:
        remedy = (
            f'Cast it first: df.withColumn({name!r}, col({name!r}).cast("double")).'
            if isinstance(kind, T.DecimalType)
            else "Select other columns, or convert it to numbers, text or arrays first."
        )
        raise DataError(
            "A column must hold booleans, numbers, text, bytes, dates, timestamps, ML vectors, or "
            f"arrays or structs of these. Received: {kind.simpleString()} in {name!r}. {remedy}"
        )
    return Field(name, dtype, shape)


def _measured(spec: RowSpec, frame: DataFrame, paths: Sequence[tuple[int, ...]]) -> RowSpec:
    """The spec with the lengths of arrays in the first row, if there is one."""
    with driver_errors():
        first = frame.head()
    if first is None:
        return spec
    fields = []
    for field, path in zip(spec.fields, paths, strict=True):
        value: Any = first
        for index in path:
            value = value[index] if value is not None else None
        shape: list[int | None] = []
        for _ in field.shape:
            shape.append(len(value) if value is not None else None)
            value = value[0] if value else None
        fields.append(replace(field, shape=tuple(shape)))
    return RowSpec(tuple(fields), spec.treedef)


def column_named(frame: DataFrame, name: str) -> Column:
    """A column of a DataFrame, or, by a name with dots, a field of a struct.

    Raises:
        DataError: there is none; names those that there are.
    """
    top = name.split(".")[0]
    if name not in frame.columns and top not in frame.columns:
        raise DataError(
            "Features and labels name columns of the DataFrame. "
            f"Received: {name!r}, which is not among {', '.join(frame.columns)}."
        )
    return F.col(f"`{name}`" if name in frame.columns else name)


def _plain(column: Column, kind: T.DataType) -> Column:
    """The column without types that Arrow does not know."""
    if _is_vector(kind):
        from pyspark.ml.functions import vector_to_array

        return vector_to_array(column)
    if isinstance(kind, T.StructType) and _has_vector(kind):
        return F.struct(
            *[_plain(column[part.name], part.dataType).alias(part.name) for part in kind.fields]
        )
    return column


def _has_vector(kind: T.DataType) -> bool:
    if isinstance(kind, T.StructType):
        return any(_has_vector(part.dataType) for part in kind.fields)
    return _is_vector(kind)


def _is_vector(kind: T.DataType) -> bool:
    return isinstance(kind, T.UserDefinedType) and kind.typeName() in ("vector", "vectorudt")


def _first(row: Any) -> bytes:
    return bytes(row[0])
