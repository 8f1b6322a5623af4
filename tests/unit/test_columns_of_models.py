"""Arrow columns as batches and back, against NumPy."""

import numpy as np
import pyarrow as pa
import pytest

from tfspark.data.spec import Field
from tfspark.errors import DataError
from tfspark.inference.columns import batch_of, column_of
from tfspark.inference.dataframe import predicted_type


def field(dtype, *shape):
    return Field("x", dtype, shape)


@pytest.mark.parametrize(
    ("column", "spec", "expected"),
    [
        (pa.array([1, 2, 3]), field("int64"), np.array([1, 2, 3])),
        (pa.array([1, 2, 3]), field("float32"), np.array([1, 2, 3], np.float32)),
        (pa.array([1.5, 2.5]), field("float32", 1), np.array([[1.5], [2.5]], np.float32)),
        (pa.array([True, False]), field("int32"), np.array([1, 0], np.int32)),
        (
            pa.array([[1.0, 2.0], [3.0, 4.0]]),
            field("float32", 2),
            np.array([[1, 2], [3, 4]], np.float32),
        ),
        (
            pa.array([[1.0, 2.0, 3.0, 4.0]], pa.list_(pa.float32())),
            field("float32", 2, 2, 1),
            np.array([[[[1], [2]], [[3], [4]]]], np.float32),
        ),
        (
            pa.array([[[1, 2]], [[3, 4]]]),
            field("int64", 1, 2),
            np.array([[[1, 2]], [[3, 4]]]),
        ),
        (
            pa.array([[1, 2, 3], [], [4]]),
            field("int64", None),
            np.array([[1, 2, 3], [0, 0, 0], [4, 0, 0]]),
        ),
        (
            pa.array([[[1], [2, 3]], [], [[4, 5, 6]]]),
            field("int64", None, None),
            np.array(
                [[[1, 0, 0], [2, 3, 0]], [[0, 0, 0], [0, 0, 0]], [[4, 5, 6], [0, 0, 0]]],
            ),
        ),
        (
            pa.array([[[1, 2], [3, 4]], [[5, 6]]]),
            field("float64", None, 2),
            np.array([[[1, 2], [3, 4]], [[5, 6], [0, 0]]], np.float64),
        ),
        (pa.array(["a", "é"]), field("string"), np.array([b"a", "é".encode()], object)),
        (
            pa.array([["a"], ["b", "c"]]),
            field("string", None),
            np.array([[b"a", b""], [b"b", b"c"]], object),
        ),
        (pa.array([b"\xff", b""]), field("string"), np.array([b"\xff", b""], object)),
        (pa.array([], pa.list_(pa.float32())), field("float32", 3), np.empty((0, 3), np.float32)),
    ],
)
@pytest.mark.parametrize("sliced", [False, True])
def test_a_column_is_a_batch(column, spec, expected, sliced):
    if sliced:  # the same rows in the middle of longer buffers
        column = pa.concat_arrays([column, column, column]).slice(len(column), len(column))
    batch = batch_of(column, spec)
    assert batch.dtype == expected.dtype and batch.shape == expected.shape
    np.testing.assert_array_equal(batch, expected)


def test_vectors_of_spark_are_rows_of_doubles():
    kind = pa.struct(
        [
            ("type", pa.int8()),
            ("size", pa.int32()),
            ("indices", pa.list_(pa.int32())),
            ("values", pa.list_(pa.float64())),
        ]
    )
    dense = {"type": 1, "size": None, "indices": None, "values": [1.0, 2.0, 3.0]}
    sparse = {"type": 0, "size": 3, "indices": [2], "values": [5.0]}
    for rows, expected in (
        ([dense, dense], [[1, 2, 3], [1, 2, 3]]),
        ([dense, sparse], [[1, 2, 3], [0, 0, 5]]),
    ):
        batch = batch_of(pa.array(rows, kind), field("float32", 3))
        np.testing.assert_array_equal(batch, np.array(expected, np.float32))
    with pytest.raises(DataError, match="null") as caught:
        batch_of(pa.array([dense, None], kind), field("float32", 3))
    assert caught.value.row == 1


@pytest.mark.parametrize(
    ("column", "spec", "said", "row"),
    [
        (pa.array([1.0, None]), field("float32"), "null", 1),
        (pa.array([[1.0], [2.0], [None]]), field("float32", 1), "null", 2),
        (pa.array([[1.0, 2.0], None]), field("float32", 2), "null", 1),
        (pa.array([[1.0, 2.0], [3.0]]), field("float32", 2), "1 elements instead of 2", 1),
        (pa.array([[1.0], [1.0, 2.0]]), field("float32", 2, 2), "1 elements instead of 4", 0),
        (pa.array([[[1], [2]], [[3]]]), field("int64", 2, 1), "1 elements instead of 2", 1),
        (pa.array([1.5]), field("int32"), "double", None),
        (pa.array([300]), field("int8"), "from 300 to 300", None),
        (pa.array(["1"]), field("float32"), "string", None),
        (pa.array([1]), field("string"), "int64", None),
        (pa.array([1.0]), field("float32", 2), "0 dimensions", None),
        (pa.array([[1.0]]), field("float32", None, 1), "1 dimensions", None),
        (pa.array([{"a": 1}]), field("float32"), "struct", None),
    ],
)
def test_what_a_model_cannot_take_is_named(column, spec, said, row):
    with pytest.raises(DataError, match=said) as caught:
        batch_of(column, spec)
    assert caught.value.field == "x" and getattr(caught.value, "row", None) == row


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("float32", np.arange(6, dtype=np.float32).reshape(3, 2)),
        ("float32", np.arange(3, dtype=np.float32).reshape(3, 1)),
        ("float64", np.arange(12, dtype=np.float64).reshape(3, 2, 2)),
        ("uint8", np.array([0, 200, 255], np.uint8)),
        ("bool", np.array([True, False, True])),
        ("float16", np.array([1, 2, 3], np.float16)),
        ("string", np.array([[b"a", b"b"], [b"c", b"d"], ["é".encode(), b""]], object)),
    ],
)
def test_an_output_is_a_column(dtype, values):
    spark, kind = predicted_type(Field("y", dtype, values.shape[1:]))
    column = column_of(values, kind)
    assert column.type.equals(kind)
    shown = values.reshape(len(values)) if values.shape[1:] in ((), (1,)) else values
    if dtype == "string":
        shown = np.vectorize(bytes.decode)(shown)
    assert column.to_pylist() == shown.tolist()
    assert spark.simpleString().count("array") == (0 if shown.ndim == 1 else shown.ndim - 1)


def test_an_output_that_is_no_text():
    with pytest.raises(DataError, match="base64") as caught:
        column_of(np.array([[b"a", b"b"], [b"c", b"\xff"]], object), pa.list_(pa.string()))
    assert caught.value.row == 1
    with pytest.raises(DataError, match="complex64"):
        predicted_type(Field("y", "complex64", ()))
