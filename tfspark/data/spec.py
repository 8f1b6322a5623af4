"""What one row of a data set looks like: a structure of named, typed, shaped fields."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import optree

from tfspark.errors import DataError

STRING = "string"
"""The dtype name of text and bytes; such values are bytes objects in NumPy object arrays."""

_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_FLOATS = ("float16", "bfloat16", "float32", "float64")
NUMERIC_DTYPES = frozenset(("bool", *_INTEGERS, *_FLOATS, "complex64", "complex128"))


@dataclass(frozen=True)
class Field:
    """One tensor of a row.

    Attributes:
        name: unique within the row; the placeholder and the Arrow column are called the same.
        dtype: TensorFlow's dtype name, `"string"` for text and bytes.
        shape: shape of one row's value, without the batch dimension. `None` in a dimension means:
            whatever the first row has, and every other row must agree.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if self.dtype != STRING and self.dtype not in NUMERIC_DTYPES:
            known = ", ".join(sorted(NUMERIC_DTYPES | {STRING}))
            raise DataError(
                f"A field's dtype must be one of {known}. Received: {self.dtype!r} "
                f"for field {self.name!r}."
            )
        if any(size is not None and size < 0 for size in self.shape):
            raise DataError(
                "A field's dimensions must be None or at least 0. "
                f"Received: {self.shape} for field {self.name!r}."
            )

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype of this field in NumPy: object for strings, ml_dtypes' bfloat16."""
        if self.dtype == STRING:
            return np.dtype(object)
        if self.dtype == "bfloat16":
            import ml_dtypes

            return np.dtype(ml_dtypes.bfloat16)
        return np.dtype(self.dtype)


@dataclass(frozen=True)
class RowSpec:
    """The fields of a row in flat order, and the tuple, list or dict that they hang in.

    Attributes:
        fields: the leaves, in flat order (dictionaries by sorted key, as in TensorFlow).
        treedef: the structure, for `flatten` and `unflatten`.

    Example:
        >>> spec = RowSpec.of({"x": Field("x", "float32", (2,)), "y": Field("y", "int32", ())})
        >>> spec.flatten({"y": 1, "x": [0.5, 1.5]})
        [[0.5, 1.5], 1]
    """

    fields: tuple[Field, ...]
    treedef: optree.PyTreeSpec

    @classmethod
    def of(cls, structure: Any) -> RowSpec:
        """The spec of a structure whose leaves are fields.

        Raises:
            DataError: it has no leaves, a leaf that is not a `Field`, or two of one name.
        """
        fields, treedef = optree.tree_flatten(structure, none_is_leaf=True)
        strangers = [field for field in fields if not isinstance(field, Field)]
        if strangers or not fields:
            raise DataError(
                "A row is a tuple, list or dict of fields, with at least one. "
                f"Received: {structure!r}."
            )
        names = [field.name for field in fields]
        if len(set(names)) != len(names):
            raise DataError(f"The fields of a row need different names. Received: {names}.")
        return cls(tuple(fields), treedef)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the fields in flat order."""
        return tuple(field.name for field in self.fields)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of fields and structure: equal for equal specs, in every process."""
        return hashlib.sha256(f"{self.fields} {self.treedef}".encode()).hexdigest()

    def flatten(self, row: Any) -> list[Any]:
        """The leaves of one row of this structure, in flat order.

        Tuples and lists stand for each other, and so do dictionaries and Spark's `Row`.

        Raises:
            ValueError: the row has another structure (callers add partition and row).
        """
        leaves: list[Any] = []
        _collect(self.treedef, row, leaves)
        return leaves

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The structure with these leaves."""
        return optree.tree_unflatten(self.treedef, leaves)

    def structure(self) -> Any:
        """The fields in their structure; the inverse of `RowSpec.of`."""
        return self.unflatten(self.fields)


def _collect(treedef: optree.PyTreeSpec, row: Any, leaves: list[Any]) -> None:
    """Appends the leaves of a row to `leaves`."""
    if treedef.is_leaf():
        leaves.append(row)
        return
    keys = treedef.entries()
    if issubclass(treedef.type or tuple, Mapping):
        if hasattr(row, "asDict"):  # pyspark.sql.Row
            row = row.asDict()
        if not isinstance(row, Mapping) or set(row) != set(keys):
            received = sorted(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(f"a dict with the keys {sorted(keys)} was expected, not {received}")
        parts = [row[key] for key in keys]
    else:
        if not isinstance(row, (tuple, list)) or len(row) != len(keys):
            received = (
                f"one of {len(row)}" if isinstance(row, (tuple, list)) else type(row).__name__
            )
            raise ValueError(f"a tuple or list of {len(keys)} was expected, not {received}")
        parts = list(row)
    for child, part in zip(treedef.children(), parts, strict=True):
        _collect(child, part, leaves)


def dtype_name(dtype: Any) -> str:
    """TensorFlow's name of a dtype given as a `tf.DType`, a NumPy dtype or type, or a string.

    Raises:
        DataError: it is none of these, or a dtype that rows cannot have.
    """
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None)
    if not isinstance(name, str):
        try:
            name = np.dtype(dtype).name
        except TypeError:
            name = repr(dtype)
    name = name.removesuffix("_ref")
    if re.match(r"(str|bytes|object)_?\d*$", name):
        return STRING
    if name != STRING and name not in NUMERIC_DTYPES:
        known = ", ".join(sorted(NUMERIC_DTYPES | {STRING}))
        raise DataError(f"A dtype must be one of {known}. Received: {dtype!r}.")
    return name


def declared(structure: Any, prefix: str = "") -> Any:
    """The structure of fields that a user's structure of `(dtype, shape)` declares.

    Args:
        structure: leaves are `(dtype, shape)`, a `Field`, or anything with `dtype` and `shape`,
            such as a `tf.TensorSpec` or an array; tuples, lists and dicts around them.
        prefix: of the names, such as `"features"`.

    Raises:
        DataError: a leaf is none of these.

    Example:
        >>> declared({"x": ("float32", [2])}, "features")
        {'x': Field(name='features_x', dtype='float32', shape=(2,))}
    """

    def field(leaf: Any, name: str) -> Field:
        if isinstance(leaf, Field):
            return leaf
        dtype, shape = leaf if isinstance(leaf, (tuple, list)) else (leaf.dtype, leaf.shape)
        return Field(name, dtype_name(dtype), _static(shape, name))

    return _named(structure, prefix, _is_declaration, field)


def inferred(row: Any, prefix: str = "") -> Any:
    """The structure of fields of one example row.

    Tuples and dicts are structure; a list is structure if an array is in it, and a tensor
    otherwise. Arrays keep their dtype; Python's floats become float32 and its integers int64.

    Raises:
        DataError: a value is null or cannot be a tensor.
    """

    def field(value: Any, name: str) -> Field:
        if hasattr(value, "toArray"):  # pyspark.ml.linalg.Vector
            value = value.toArray()
        plain = not hasattr(value, "dtype")
        if isinstance(value, (str, bytes, bytearray)):
            return Field(name, STRING, ())
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise DataError(
                f"A row's values must be tensors. Received: a ragged value for {name!r} "
                f"({error}). Pad it to one shape."
            ) from error
        if array.dtype.kind == "O" and not all(isinstance(v, (str, bytes)) for v in array.flat):
            raise DataError(
                "A row's values must be numbers, text or bytes. "
                f"Received: {type(value).__name__} ({value!r:.80}) for {name!r}. "
                "Fill or drop missing values, pad ragged ones, or declare the fields."
            )
        if plain and array.dtype == np.float64:
            return Field(name, "float32", array.shape)
        return Field(name, dtype_name(array.dtype), array.shape)

    def is_value(node: Any) -> bool:
        if isinstance(node, list):
            return not any(hasattr(item, "dtype") for item in node)
        return not isinstance(node, (tuple, dict))

    return _named(row, prefix, is_value, field)


def _named(
    structure: Any,
    prefix: str,
    is_leaf: Callable[[Any], bool],
    make: Callable[[Any, str], Field],
) -> Any:
    """A structure with every leaf made into a field, which is named after its path."""
    leaves, treedef = optree.tree_flatten(structure, is_leaf=is_leaf, none_is_leaf=True)
    fields: list[Field] = []
    for path, leaf in zip(treedef.paths(), leaves, strict=True):
        if not is_leaf(leaf):
            raise DataError(
                "A declaration is (dtype, shape), or a tuple, list or dict of these, such as "
                f"(tf.float32, [28, 28, 1]). Received: {leaf!r}."
            )
        name = re.sub(r"[^A-Za-z0-9_.]", "_", "_".join(filter(None, [prefix, *map(str, path)])))
        name = name if re.match("[A-Za-z]", name) else f"field_{name}".rstrip("_")
        taken = {field.name for field in fields}
        fields.append(make(leaf, f"{name}_{len(fields)}" if name in taken else name))
    return optree.tree_unflatten(treedef, fields)


def _is_declaration(node: Any) -> bool:
    if isinstance(node, Field):
        return True
    if isinstance(node, (tuple, list)):
        return (
            len(node) == 2
            and (isinstance(node[0], (str, type, np.dtype)) or hasattr(node[0], "as_numpy_dtype"))
            and not isinstance(node[1], (str, dict))
            and (isinstance(node[1], (tuple, list)) or hasattr(node[1], "as_list"))
            and not any(isinstance(size, (tuple, list)) for size in node[1])
        )
    return hasattr(node, "dtype") and hasattr(node, "shape")


def _static(shape: Any, name: str) -> tuple[int | None, ...]:
    if hasattr(shape, "as_list"):  # tf.TensorShape
        if shape.rank is None:
            raise DataError(
                f"A field's number of dimensions must be known. Received: field {name!r} of an "
                "unknown rank. Give its shape, with None for a size that the first row decides."
            )
        shape = shape.as_list()
    try:
        return tuple(None if size is None else int(size) for size in shape)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"A shape is a list of sizes or None. Received: {shape!r} for field {name!r}."
        ) from error
