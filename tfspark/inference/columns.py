"""Arrow columns as the tensors of a batch, and tensors as Arrow columns.

Neither makes Python objects per row, but for text. What a column may be:

| column | input |
|---|---|
| boolean, integers, floats | a dtype that holds them; for a float also whole numbers |
| string, binary | string |
| array of these, nested as often as the input has dimensions | `[rows, …]` |
| array with as many elements as the input has | that shape: 784 elements for `(28, 28, 1)` |
| number, text | also an input of one element: `(1,)` |
| ML vector, dense or sparse | as an array of doubles |

Where a dimension of the input is None, rows may differ in it: a batch is padded with 0 (text: with
the empty string) up to its longest row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tfspark.data.spec import STRING, Field
from tfspark.errors import DataError

_ORDER = {"b": 0, "i": 1, "u": 1, "f": 2}
"""Which kinds of numbers hold which others: those of their own kind and of earlier ones."""


def batch_of(column: pa.Array, field: Field) -> np.ndarray:
    """A column as the tensor that a model takes.

    Args:
        column: one value per row; lists, nested, are dimensions.
        field: the model's input.

    Returns:
        `[rows, *shape]` of the field's dtype; text as bytes objects.

    Raises:
        DataError: a null, an array of a wrong length, another kind of value; has the attributes
            `row`, within the column, and `field`.
    """
    rows = len(column)
    lengths: list[np.ndarray] = []
    per_row = [np.arange(rows)]  # of each value at hand: its row
    _refuse_nulls(column, per_row[-1], field)
    values = _without_extension(column)
    while _is_list(values.type):
        counts = _lengths(values)
        lengths.append(counts)
        per_row.append(np.repeat(per_row[-1], counts))
        values = values.flatten()
        _refuse_nulls(values, per_row[-1], field)
    flat = _numbers(values, field)
    if not lengths and math.prod(size or 1 for size in field.shape) == 1:
        return flat.reshape(rows, *(1 for _ in field.shape))
    sizes = [size for size in field.shape if size is not None]
    if len(lengths) == 1 and len(field.shape) != 1 and len(sizes) == len(field.shape):
        size = math.prod(sizes)
        _refuse_lengths(lengths[0], size, per_row[0], field)
        return flat.reshape(rows, *sizes)
    if len(lengths) != len(field.shape):
        raise _mismatch(field, f"values with {len(lengths)} dimensions")
    return _placed(flat, rows, lengths, per_row, field)


def _placed(
    flat: np.ndarray,
    rows: int,
    lengths: Sequence[np.ndarray],
    per_row: Sequence[np.ndarray],
    field: Field,
) -> np.ndarray:
    """Flat values in their places of a tensor that is padded where rows differ."""
    places, sizes = np.arange(rows), []
    regular = True
    for counts, row, declared in zip(lengths, per_row, field.shape, strict=False):
        if declared is not None:
            _refuse_lengths(counts, declared, row, field)
        size = declared if declared is not None else int(counts.max(initial=0))
        sizes.append(size)
        regular = regular and bool((counts == size).all())
        if not regular:
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            places = np.repeat(places, counts) * size + within
        else:
            places = np.arange(len(places) * size)
    if regular:
        return flat.reshape(rows, *sizes)
    padded = np.full(rows * math.prod(sizes), b"" if field.dtype == STRING else 0, flat.dtype)
    padded[places] = flat
    return padded.reshape(rows, *sizes)


def _numbers(values: pa.Array, field: Field) -> np.ndarray:
    """Flat values in the input's dtype."""
    kind = values.type
    text = pa.types.is_string(kind) or pa.types.is_binary(kind)
    text |= pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)
    if text != (field.dtype == STRING):
        raise _mismatch(field, f"{kind} values")
    if text:
        return values.cast(pa.large_binary()).to_numpy(zero_copy_only=False)
    if not (pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise _mismatch(field, f"{kind} values")
    numbers = values.to_numpy(zero_copy_only=False)
    target = field.numpy_dtype
    if numbers.dtype == target:
        return numbers
    ranks = (
        _ORDER[numbers.dtype.kind],
        _ORDER.get("f" if field.dtype == "bfloat16" else target.kind),
    )
    if ranks[1] is None or ranks[0] > ranks[1]:
        raise _mismatch(field, f"{kind} values")
    if ranks == (1, 1) and numbers.size:
        limits = np.iinfo(target)
        if numbers.min() < limits.min or numbers.max() > limits.max:
            raise _mismatch(field, f"values from {numbers.min()} to {numbers.max()}")
    return numbers.astype(target)


def _without_extension(column: pa.Array) -> pa.Array:
    """ML vectors, which Spark hands over as structs, as lists of doubles."""
    kind = column.type
    if not (pa.types.is_struct(kind) and {"indices", "values"} <= {f.name for f in kind}):
        return column
    # type 0: sparse, 1: dense; see pyspark.ml.linalg.VectorUDT.
    dense = column.field("type").to_numpy(zero_copy_only=False) == 1
    values = column.field("values")
    if dense.all():
        return values
    parts = zip(
        column.field("type").to_pylist(),
        column.field("size").to_pylist(),
        column.field("indices").to_pylist(),
        values.to_pylist(),
        strict=True,
    )
    rows = []
    for which, size, indices, numbers in parts:
        if which == 0:
            row = np.zeros(size)
            row[indices] = numbers
            rows.append(row)
        else:
            rows.append(numbers)
    return pa.array(rows, pa.list_(pa.float64()))


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _lengths(values: pa.Array) -> np.ndarray:
    if pa.types.is_fixed_size_list(values.type):
        return np.full(len(values), values.type.list_size)
    return np.diff(values.offsets.to_numpy())


def _refuse_nulls(values: pa.Array, rows: np.ndarray, field: Field) -> None:
    if values.null_count:
        first = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(
            f"A model needs a value in every row. Received: null for {field.name!r}. "
            "Fill or drop missing values, for example with df.na.drop().",
            row=int(rows[first]),
            field=field.name,
        )


def _refuse_lengths(counts: np.ndarray, size: int, rows: np.ndarray, field: Field) -> None:
    wrong = np.flatnonzero(counts != size)
    if wrong.size:
        raise DataError(
            f"The model's input {field.name!r} has the shape {list(field.shape)} in every row. "
            f"Received: an array of {counts[wrong[0]]} elements instead of {size}. Pad or cut it, "
            "or declare the dimension as None, and rows are padded to the longest of a batch.",
            row=int(rows[wrong[0]]),
            field=field.name,
        )


def _mismatch(field: Field, received: str) -> DataError:
    return DataError(
        f"The model's input {field.name!r} takes {field.dtype} {list(field.shape)} of each row. "
        f"Received: {received}. Select or cast another column.",
        field=field.name,
    )


def column_of(tensor: np.ndarray, kind: pa.DataType) -> pa.Array:
    """A tensor as an Arrow column of the type that `arrow_type` gave.

    Args:
        tensor: `[rows, *shape]`; text as bytes objects.
        kind: of the column.

    Raises:
        DataError: text that is not UTF-8 for a column of strings; has the attribute `row`.
    """
    sizes = []
    while _is_list(kind):
        sizes.append(kind)
        kind = kind.value_type
    flat = np.ascontiguousarray(tensor).reshape(-1)
    values = _text(flat, kind, len(tensor)) if flat.dtype.kind == "O" else _cast(flat, kind)
    shape = tensor.shape[1 : 1 + len(sizes)]
    for depth in range(len(sizes) - 1, -1, -1):
        count = len(tensor) * math.prod(shape[:depth])
        offsets = pa.array(np.arange(count + 1, dtype=np.int32) * shape[depth])
        values = pa.ListArray.from_arrays(offsets, values)
    return values


def _cast(flat: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.array(flat.astype(kind.to_pandas_dtype(), copy=False))


def _text(flat: np.ndarray, kind: pa.DataType, rows: int) -> pa.Array:
    raw = pa.array(flat, pa.binary())
    try:
        return raw.cast(kind)
    except pa.ArrowInvalid as error:
        per_row = max(1, len(flat) // max(rows, 1))
        bad = next(index for index, value in enumerate(flat) if not _is_utf8(value))
        raise DataError(
            "Text that a model returns is UTF-8. "
            f"Received: {flat[bad]!r:.80}. Encode it, for example with tf.io.encode_base64.",
            row=bad // per_row,
        ) from error


def _is_utf8(value: Any) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
