"""What a row may hold, and the message where it may not."""

import numpy as np
import pandas as pd
import pytest

from tfspark.data.rows import RowBuffer
from tfspark.data.spec import Field, RowSpec
from tfspark.errors import DataError


def stored(value, dtype, shape):
    """One value through a buffer and back."""
    spec = RowSpec.of(Field("x", dtype, shape))
    buffer = RowBuffer(spec, partition=5)
    buffer.add_row(value)
    return buffer._columns[0][0]


@pytest.mark.parametrize(
    ("value", "dtype", "shape", "expected"),
    [
        (np.float64(0.5), "float32", (), 0.5),
        ([1, 2], "float32", (2,), [1.0, 2.0]),
        (True, "int32", (), 1),
        (127, "int8", (), 127),
        (np.uint64(7), "int8", (), 7),
        (np.float32([1.5]), "bfloat16", (1,), [1.5]),
        (3, "complex64", (), 3 + 0j),
        ("é", "string", (), b"\xc3\xa9"),
        (bytearray(b"a\0"), "string", (), b"a\0"),
        (["a\0", b"b"], "string", (2,), [b"a\0", b"b"]),
        (np.array(["ab", "c"]), "string", (2,), [b"ab", b"c"]),
        ((1, 2), "int64", (None,), [1, 2]),
    ],
)
def test_values_are_cast_where_nothing_is_lost(value, dtype, shape, expected):
    result = stored(value, dtype, shape)
    assert np.array_equal(result, np.array(expected, np.asarray(result).dtype))


@pytest.mark.parametrize(
    ("value", "dtype", "shape", "message"),
    [
        (300, "int8", (), "int8.*Received: int64.*with the value 300"),
        (-1, "uint16", (), "with the value -1"),
        (2**63, "int64", (), "with the value 9223372036854775808"),
        (3.5, "int32", (), r"int32 \[\].*Received: float64 \[\].*declared dtype"),
        (1j, "float32", (), "Received: complex128"),
        (2, "bool", (), "Received: int64"),
        ("7", "int32", (), r"Received: string \[\]"),
        (7, "string", (), "Received: int"),
        (
            [1.0],
            "float32",
            (2,),
            r"float32 \[2\].*Received: float64 \[1\].*declared dtype or shape",
        ),
        ([[1, 2], [3]], "float32", (2, 2), "Received: a ragged value.*Pad"),
        ([["a"], ["b", "c"]], "string", (2, 1), "Received: a ragged value.*Pad"),
        (None, "float32", (2,), "Received: null.*Fill or drop"),
        ([1.0, None], "float32", (2,), "Received: a null.*Fill or drop"),
        (["a", None], "string", (2,), "Received: a null.*Fill or drop"),
        (float("nan"), "string", (), "Received: a null.*Fill or drop"),
        ([pd.NA, 1.0], "float32", (2,), "Received: a null"),
        (pd.NaT, "string", (), "Received: a null"),
        (object(), "float32", (), "unknown objects"),
    ],
)
def test_values_that_do_not_fit_are_named(value, dtype, shape, message):
    spec = RowSpec.of(Field("x", dtype, shape))
    buffer = RowBuffer(spec, partition=5)
    buffer.add_row(np.full(shape, "s", object) if dtype == "string" else np.zeros(shape, bool))
    with pytest.raises(DataError, match=r"(?s)\[partition 5, row 1, field x\].*" + message):
        buffer.add_row(value)


@pytest.mark.parametrize(
    ("column", "dtype", "message"),
    [
        (np.array([1, 2, 3, 400, 5]), "int8", "row 13.*value 400"),
        (np.array([1.0, 2.0]), "int8", "row 10.*Received: float64"),
        (np.array(["a", "b", None], object), "string", "row 12.*Received: a null"),
        (np.array([1, None], object), "int8", "row 11.*Received: a null"),
        (np.zeros((3, 2), np.int8), "int8", r"row 10.*Received: int8 \[2\]"),
    ],
)
def test_columns_name_the_row(column, dtype, message):
    buffer = RowBuffer(RowSpec.of(Field("x", dtype, ())), partition=2)
    buffer.add_columns(
        [np.array(list("abcdefghij"), object) if dtype == "string" else np.ones(10, bool)]
    )
    with pytest.raises(DataError, match=r"\[partition 2, " + message):
        buffer.add_columns([column])


def test_another_structure_is_named():
    spec = RowSpec.of({"a": Field("a", "int32", ()), "b": (Field("b", "int32", ()),)})
    buffer = RowBuffer(spec, partition=0)
    buffer.add_row({"b": [1], "a": 2})  # a list for a tuple is fine
    for row, message in [
        ({"a": 1}, r"keys \['a', 'b'\].*not \['a'\]"),
        ((1, 2), "not tuple"),
        ({"a": 1, "b": (1, 2)}, "a tuple or list of 1 was expected, not one of 2"),
        (None, "not NoneType"),
    ]:
        with pytest.raises(DataError, match=r"(?s)row 1\].*declared structure.*" + message):
            buffer.add_row(row)
    assert buffer.rows == 1


def test_a_failed_row_leaves_no_trace():
    buffer = RowBuffer(RowSpec.of((Field("x", "int8", ()), Field("y", "int8", ()))), partition=0)
    with pytest.raises(DataError, match="row 0"):
        buffer.add_row((1, 300))
    buffer.add_row((2, 3))
    assert buffer.rows == 1 and buffer.drain().num_rows == 1
