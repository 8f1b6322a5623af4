"""Structures of fields: declared, inferred, flattened."""

import numpy as np
import pytest
import tensorflow as tf
from pyspark.sql import Row

from tfspark.data.spec import Field, RowSpec, declared, dtype_name, inferred
from tfspark.errors import DataError


def test_declarations():
    structure = declared(
        {"x": (tf.float32, [28, None]), "t": [(np.int8, ()), ("string", tf.TensorShape([2]))]}, "f"
    )
    assert structure == {
        "t": [Field("f_t_0", "int8", ()), Field("f_t_1", "string", (2,))],
        "x": Field("f_x", "float32", (28, None)),
    }
    assert declared(tf.TensorSpec([3], tf.bfloat16), "y") == Field("y", "bfloat16", (3,))
    assert declared(("float32", [1])) == Field("field", "float32", (1,))


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ("float32", r"\(dtype, shape\).*'float32'"),
        ({"x": tf.float32}, r"\(dtype, shape\)"),
        (("float99", [1]), "dtype must be one of.*'float99'"),
        ((tf.float32, ["a"]), "list of sizes"),
        (tf.TensorSpec(None, tf.float32), "number of dimensions must be known"),
    ],
)
def test_what_declares_nothing(structure, message):
    with pytest.raises(DataError, match=message):
        declared(structure)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (tf.float32, "float32"),
        (tf.string, "string"),
        (np.float64, "float64"),
        (np.dtype("S3"), "string"),
        (str, "string"),
        (object, "string"),
        ("bfloat16", "bfloat16"),
        (tf.as_dtype("float32")._as_ref, "float32"),
    ],
)
def test_names_of_dtypes(dtype, name):
    assert dtype_name(dtype) == name


def test_rows_are_inferred():
    row = {"a": (np.zeros((2, 3), np.uint8), 1.5), "b": [1, 2], "c": "text", "d": [np.ones(1)]}
    structure = inferred(row)
    assert structure == {
        "a": (Field("a_0", "uint8", (2, 3)), Field("a_1", "float32", ())),
        "b": Field("b", "int64", (2,)),
        "c": Field("c", "string", ()),
        "d": [Field("d_0", "float64", (1,))],
    }
    for value, message in [(None, "NoneType"), ([[1], [1, 2]], "ragged"), ([1, None], "missing")]:
        with pytest.raises(DataError, match=message):
            inferred((1, value))


def test_fields_have_different_names():
    assert RowSpec.of(declared(({"a": ("int8", [])}, {"a": ("int8", [])}))).names == (
        "field_0_a",
        "field_1_a",
    )
    spec = RowSpec.of(declared([("int8", []), {"0": ("int8", [])}], "x"))
    assert len(set(spec.names)) == 2


def test_tuples_lists_dicts_and_rows_stand_for_each_other():
    spec = RowSpec.of(
        ({"b": Field("b", "int8", ()), "a": Field("a", "int8", ())}, Field("y", "int8", ()))
    )
    for row in [({"a": 1, "b": 2}, 3), [Row(b=2, a=1), 3]]:
        assert spec.flatten(row) == [1, 2, 3]
    for row in [({"a": 1}, 3), (1, 2), ({"a": 1, "b": 2},), "ab", None]:
        with pytest.raises(ValueError, match="was expected"):
            spec.flatten(row)


def test_equal_specs_have_equal_fingerprints():
    spec = RowSpec.of((Field("x", "int8", ()),))
    assert spec.fingerprint == RowSpec.of((Field("x", "int8", ()),)).fingerprint
    assert spec.fingerprint != RowSpec.of([Field("x", "int8", ())]).fingerprint
