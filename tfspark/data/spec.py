"""What one row of a data set looks like: a structure of named, typed, shaped fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

    def flatten(self, row: Any) -> list[Any]:
        """The leaves of one row of this structure, in flat order.

        Raises:
            ValueError: the row has another structure (from optree; callers add partition and row).
        """
        return self.treedef.flatten_up_to(row)

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The structure with these leaves."""
        return optree.tree_unflatten(self.treedef, leaves)
