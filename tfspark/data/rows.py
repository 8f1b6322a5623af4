"""Rows, checked against their declaration, as Arrow record batches.

Physical columns: a numeric field is fixed-size binary, one value the raw bytes of one row's tensor
in C order; a string field is a fixed-size list of large binary. So every dtype, bfloat16 and
complex ones too, is read back as a view, and nothing is ever decoded.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from tfspark.data.spec import STRING, Field, RowSpec
from tfspark.errors import DataError

CHUNK_BYTES = 4 * 2**20
_MOST_CHUNK_ROWS = 65_536
_REMEDY = "Convert the value, or change the declared dtype or shape."


class RowBuffer:
    """Collects checked rows and gives them out as record batches of bounded size.

    Args:
        spec: of the rows. Dimensions of `None` are taken from the first row.
        partition: named in errors, beside the row's index.
        chunk_bytes: a buffer is full with so many bytes, or one row.

    Attributes:
        spec: with the dimensions of the first row, once there was one.
        rows: rows added since the beginning; the index of the next one.
    """

    def __init__(self, spec: RowSpec, partition: int, chunk_bytes: int = CHUNK_BYTES):
        self.spec = spec
        self.rows = 0
        self._partition = partition
        self._chunk_bytes = chunk_bytes
        self._capacity = 0
        self._filled = 0
        self._string_bytes = 0
        self._columns: list[np.ndarray] = []

    @property
    def full(self) -> bool:
        """Whether `drain` is due before the next row."""
        return self._filled > 0 and (
            self._filled == self._capacity or self._string_bytes >= self._chunk_bytes
        )

    @property
    def pending(self) -> int:
        """Rows that the next `drain` gives."""
        return self._filled

    def add_row(self, row: Any) -> None:
        """Adds one row of the spec's structure.

        Raises:
            DataError: its structure, a dtype or a shape differs from the spec, a value is null,
                ragged or does not fit; names partition, row and field.
        """
        try:
            leaves = self.spec.flatten(row)
        except ValueError as error:
            raise DataError(
                f"Every row must have the declared structure. Received: {error}. Its fields are "
                f"{', '.join(self.spec.names)}.",
                partition=self._partition,
                row=self.rows,
            ) from error
        if not self._columns:
            values = [
                self.checked(leaf, field)
                for leaf, field in zip(leaves, self.spec.fields, strict=True)
            ]
            self._allocate([value.shape for value in values])
        at = self._filled
        for column, leaf, field in zip(self._columns, leaves, self.spec.fields, strict=True):
            if (
                type(leaf) is not np.ndarray
                or leaf.dtype != column.dtype
                or leaf.shape != column.shape[1:]
                or leaf.dtype.kind == "O"
            ):
                leaf = self.checked(leaf, field)
            # Of a string scalar the bytes, not the array around them.
            column[at] = leaf[()]
            if field.dtype == STRING:
                self._string_bytes += sum(map(len, leaf.flat))
        self._filled += 1
        self.rows += 1

    def add_columns(self, columns: Sequence[np.ndarray], start: int = 0) -> int:
        """Adds rows of arrays `[rows, *shape]`, one per field, from row `start` until it is full.

        Returns:
            How many rows were added.

        Raises:
            DataError: as `add_row`.
        """
        if not self._columns:
            self._allocate([np.shape(column)[1:] for column in columns])
        stop = min(len(columns[0]), start + self._capacity - self._filled)
        parts = []
        for column, field in zip(columns, self.spec.fields, strict=True):
            part = column[start:stop]
            if np.shape(part)[1:] != field.shape:
                self._refuse(field, _describe(part[0] if len(part) else part))
            if part.dtype != field.numpy_dtype or field.dtype == STRING:
                part = self._cast_rows(part, field)
            parts.append(part)
        added = stop - start
        for own, part, field in zip(self._columns, parts, self.spec.fields, strict=True):
            own[self._filled : self._filled + added] = part
            if field.dtype == STRING:
                self._string_bytes += sum(map(len, part.flat))
        self._filled += added
        self.rows += added
        return added

    def drain(self) -> pa.RecordBatch:
        """The collected rows. The batch shares the buffer's memory: use it before the next row."""
        count, self._filled, self._string_bytes = self._filled, 0, 0
        arrays = [
            _to_arrow(column[:count], field)
            for column, field in zip(self._columns, self.spec.fields, strict=True)
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=physical_schema(self.spec))

    def _allocate(self, shapes: Sequence[tuple[int, ...]]) -> None:
        fields = [
            replace(field, shape=shape) if _agrees(shape, field.shape) else field
            for field, shape in zip(self.spec.fields, shapes, strict=True)
        ]
        # A field whose shape does not agree keeps its declaration; the check of the row says so.
        self.spec = RowSpec(tuple(fields), self.spec.treedef)
        shapes = [fixed_shape(field) for field in fields]
        sizes = [
            math.prod(shape) * _item_bytes(field)
            for shape, field in zip(shapes, fields, strict=True)
        ]
        self._capacity = max(min(self._chunk_bytes // max(sum(sizes), 1), _MOST_CHUNK_ROWS), 1)
        self._columns = [
            np.empty((self._capacity, *shape), field.numpy_dtype)
            for shape, field in zip(shapes, fields, strict=True)
        ]

    def checked(self, value: Any, field: Field) -> np.ndarray:
        """The value of the next row as an array of the field's dtype and shape.

        Raises:
            DataError: as `add_row`.
        """
        if hasattr(value, "toArray"):  # pyspark.ml.linalg.Vector
            value = value.toArray()
        if value is None:
            self._refuse(field, "null", "Fill or drop missing values.")
        if field.dtype == STRING:
            array = original = _object_array(value)
            array = self._strings(array, field, self.rows)
        else:
            try:
                array = original = np.asarray(value)
            except (ValueError, TypeError) as error:
                self._refuse(field, f"a ragged value ({error})", "Pad it to one shape.")
            array = self._cast(array, field, self.rows)
        if not _agrees(array.shape, field.shape):
            self._refuse(field, _describe(original))
        return array

    def _cast_rows(self, column: np.ndarray, field: Field) -> np.ndarray:
        """`_cast` or `_strings` for many rows at once; row by row only to find the culprit."""
        convert = self._strings if field.dtype == STRING else self._cast
        try:
            return convert(column, field, self.rows)
        except DataError:
            for index, value in enumerate(column):
                array = _object_array(value) if field.dtype == STRING else np.asarray(value)
                convert(array, field, self.rows + index)
            raise

    def _cast(self, array: np.ndarray, field: Field, row: int) -> np.ndarray:
        target = field.numpy_dtype
        if array.dtype == target:
            return array
        if array.dtype.kind == "O":
            missing = any(_is_missing(value) for value in array.flat)
            what = "a null" if missing else f"{_describe(array)}, a ragged value or unknown objects"
            remedy = "Fill or drop missing values." if missing else "Pad it to one shape."
            self._refuse(field, what, remedy, row)
        ranks = [_KINDS.get(_kind(dtype), -1) for dtype in (array.dtype, target)]
        if ranks[0] < 0 or ranks[0] > ranks[1]:
            self._refuse(field, _describe(array), row=row)
        if ranks == [1, 1] and array.size:
            limits, low, high = np.iinfo(target), int(array.min()), int(array.max())
            if low < limits.min or high > limits.max:
                out = low if low < limits.min else high
                self._refuse(field, f"{_describe(array)} with the value {out}", row=row)
        with np.errstate(over="ignore"):
            return array.astype(target)

    def _strings(self, array: np.ndarray, field: Field, row: int) -> np.ndarray:
        array = array.astype(object) if array.dtype.kind in "SU" else array
        if array.dtype.kind != "O":
            self._refuse(field, _describe(array), row=row)
        result = np.empty(array.shape, object)
        source, encoded = array.reshape(-1), result.reshape(-1)
        for index, value in enumerate(source):
            if isinstance(value, str):
                encoded[index] = value.encode()
            elif isinstance(value, (bytes, bytearray, memoryview)):
                encoded[index] = bytes(value)
            elif _is_missing(value):
                self._refuse(field, "a null", "Fill or drop missing values.", row)
            elif isinstance(value, (list, tuple)):
                self._refuse(field, "a ragged value", "Pad it to one shape.", row)
            else:
                self._refuse(field, f"{type(value).__name__} ({value!r:.80})", row=row)
        return result

    def _refuse(
        self, field: Field, received: str, remedy: str = _REMEDY, row: int | None = None
    ) -> Any:
        raise DataError(
            f"Every row must match the declaration of its fields: {field.name!r} is {field.dtype} "
            f"{list(field.shape)}. Received: {received}. {remedy}",
            partition=self._partition,
            row=self.rows if row is None else row,
            field=field.name,
        )


class RowDigest:
    """A checksum of rows that does not depend on how they were cut into chunks."""

    def __init__(self, spec: RowSpec):
        self._crcs = {field.name: [0, 0] for field in spec.fields}
        self._rows = 0

    def update(self, batch: pa.RecordBatch) -> None:
        """Adds the rows of a batch of the physical schema."""
        self._rows += batch.num_rows
        for name, crcs in self._crcs.items():
            column = batch.column(name)
            if pa.types.is_fixed_size_list(column.type):
                offsets, data = string_buffers(column)
                crcs[0] = zlib.crc32(np.diff(offsets).tobytes(), crcs[0])
                crcs[1] = zlib.crc32(data[offsets[0] : offsets[-1]], crcs[1])
            else:
                crcs[0] = zlib.crc32(_raw_bytes(column), crcs[0])

    def hexdigest(self) -> str:
        """The checksum of all rows so far."""
        content = json.dumps([self._rows, sorted(self._crcs.items())])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def fixed_shape(field: Field) -> tuple[int, ...]:
    """The field's shape, where an undecided dimension (there was no row) counts as 0."""
    return tuple(size or 0 for size in field.shape)


def physical_schema(spec: RowSpec) -> pa.Schema:
    """The Arrow schema of stored rows; its metadata describes the fields."""
    columns = []
    for field in spec.fields:
        elements = math.prod(fixed_shape(field))
        if field.dtype == STRING:
            # An Arrow list has at least one element; a field without any stores one empty string.
            kind = pa.list_(pa.large_binary(), max(elements, 1))
        else:
            kind = pa.binary(elements * field.numpy_dtype.itemsize)
        columns.append(pa.field(field.name, kind, nullable=False))
    described = [[field.name, field.dtype, field.shape] for field in spec.fields]
    return pa.schema(columns, {"tfspark": json.dumps({"version": 1, "fields": described})})


def physical_spec(schema: pa.Schema, spec: RowSpec) -> RowSpec:
    """The spec with the dimensions that a physical schema describes."""
    described = json.loads(schema.metadata[b"tfspark"])["fields"]
    fields = [
        replace(field, shape=tuple(shape))
        for field, (_, _, shape) in zip(spec.fields, described, strict=True)
    ]
    return RowSpec(tuple(fields), spec.treedef)


def column_view(column: pa.Array, field: Field) -> np.ndarray:
    """A numeric column of the physical schema as an array `[rows, *shape]`, without a copy."""
    flat = np.frombuffer(_raw_bytes(column), np.uint8).view(field.numpy_dtype)
    return flat.reshape((len(column), *fixed_shape(field)))


def columns_of(batch: pa.RecordBatch, spec: RowSpec) -> list[np.ndarray]:
    """The fields of a batch of the physical schema as arrays `[rows, *shape]`; text is copied."""
    found = []
    for field in spec.fields:
        column = batch.column(field.name)
        if field.dtype == STRING:
            shape = fixed_shape(field)
            flat = column.flatten().to_numpy(zero_copy_only=False)
            found.append(flat[: len(column) * math.prod(shape)].reshape(len(column), *shape))
        else:
            found.append(column_view(column, field))
    return found


def string_buffers(column: pa.Array) -> tuple[np.ndarray, memoryview]:
    """Offsets int64 `[rows * elements + 1]` and the bytes of a string column, without a copy."""
    values = column.flatten()
    _, offsets, data = values.buffers()
    starts = np.frombuffer(offsets, np.int64)[values.offset : values.offset + len(values) + 1]
    return starts, memoryview(data) if data is not None else memoryview(b"")


def _raw_bytes(column: pa.Array) -> memoryview:
    width = column.type.byte_width
    data = memoryview(column.buffers()[1]) if width and len(column) else memoryview(b"")
    return data[column.offset * width : (column.offset + len(column)) * width]


def _to_arrow(column: np.ndarray, field: Field) -> pa.Array:
    if field.dtype != STRING:
        width = math.prod(column.shape[1:]) * column.dtype.itemsize
        raw = pa.py_buffer(column.reshape(-1).view(np.uint8))
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(column), [None, raw])
    elements = math.prod(column.shape[1:])
    flat = list(column.flat) if elements else [b""] * len(column)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.large_binary()), max(elements, 1))


# Which kinds of numbers hold which others: a value may become one of its own kind or of a later.
_KINDS = {"b": 0, "i": 1, "u": 1, "f": 2, "c": 3}


def _kind(dtype: np.dtype) -> str:
    return "f" if dtype.name == "bfloat16" else dtype.kind


def _item_bytes(field: Field) -> int:
    return 8 if field.dtype == STRING else field.numpy_dtype.itemsize


def _agrees(shape: tuple[int, ...], declared: tuple[int | None, ...]) -> bool:
    return len(shape) == len(declared) and all(
        expected is None or size == expected for size, expected in zip(shape, declared, strict=True)
    )


def _object_array(value: Any) -> np.ndarray:
    """Text as an object array: NumPy's own text dtypes cut trailing zeros off."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        array = np.empty((), object)
        array[()] = bytes(value)
        return array
    return np.array(value, dtype=object)


def _is_missing(value: Any) -> bool:
    # NaN is what pandas puts where a text is missing; pandas' own NA and NaT do not equal
    # themselves either.
    return (
        value is None
        or type(value).__name__ in ("NAType", "NaTType")
        or (isinstance(value, float) and value != value)
    )


def _describe(value: Any) -> str:
    array = np.asarray(value)
    return f"{'string' if array.dtype.kind in 'SU' else array.dtype} {list(array.shape)}"
