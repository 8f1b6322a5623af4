"""Columns of a DataFrame as the inputs of a model, in training and in use alike.

| column | what preprocessing, or the model, gets of a row |
|---|---|
| number | scalar |
| array, ML vector | `[n]`, or as many dimensions as arrays are nested |
| string, binary | scalar string |
| image | uint8 `[height, width, 3]`, RGB |

An image is the struct of Spark's own image source and of `NNImageReader`. Without preprocessing it
is resized (bilinear) to what the model takes, and keeps values from 0 to 255. In the end numbers
are cast to the dtype of the model's input and laid out in its shape, so 784 doubles fit into a
float32 input of `[28, 28, 1]`; and where a model has one input, several columns are joined to one
vector, in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from pyspark.sql import DataFrame
from pyspark.sql import types as T

from tfspark.data.columns import column_named
from tfspark.data.mapping import with_autograph
from tfspark.data.spec import STRING, RowSpec
from tfspark.errors import DataError, InvalidInputError

IMAGE_SCHEMA = T.StructType(
    [
        T.StructField("origin", T.StringType()),
        T.StructField("height", T.IntegerType()),
        T.StructField("width", T.IntegerType()),
        T.StructField("nChannels", T.IntegerType()),
        T.StructField("mode", T.IntegerType()),
        T.StructField("data", T.BinaryType()),
    ]
)
"""Of an image, as Spark's own image source has it: rows of pixels, channels in the order BGR."""

_PARTS_OF_IMAGE = ("data", "height", "width", "nChannels")


@dataclass(frozen=True)
class FeatureColumns:
    """Which columns make a row's features.

    Attributes:
        names: of the user's columns.
        images: for each, whether it is an image.
    """

    names: tuple[str, ...]
    images: tuple[bool, ...]

    @classmethod
    def of(cls, frame: DataFrame, names: str | Sequence[str]) -> FeatureColumns:
        """The columns of a DataFrame.

        Raises:
            DataError: one is missing; names those there are. One is a struct that is no image.
        """
        chosen = (names,) if isinstance(names, str) else tuple(names)
        images = []
        for name in chosen:
            kind = frame.select(column_named(frame, name)).schema.fields[0].dataType
            is_image = isinstance(kind, T.StructType) and set(_PARTS_OF_IMAGE) <= set(kind.names)
            if isinstance(kind, T.StructType) and not is_image:
                fields = ", ".join(f"{name}.{field}" for field in kind.names)
                raise DataError(
                    "A feature column holds numbers, text, arrays, vectors or images. "
                    f"Received: a struct in {name!r}. Name its fields: {fields}."
                )
            images.append(is_image)
        return cls(chosen, tuple(images))

    @property
    def flat(self) -> list[str]:
        """The columns that are read: of an image several fields."""
        return [part for name, image in self._each() for part in _parts(name, image)]

    def values(self, tensors: Sequence[Any]) -> list[Any]:
        """A row's values by column, from tensors in the order of `flat`.

        Args:
            tensors: of one row, without a batch dimension.
        """
        left, values = list(tensors), []
        for name, image in self._each():
            parts = [left.pop(0) for _ in _parts(name, image)]
            values.append(_pixels(*parts) if image else parts[0])
        return values

    def _each(self) -> zip[tuple[str, bool]]:
        return zip(self.names, self.images, strict=True)


def _parts(name: str, image: bool) -> list[str]:
    return [f"{name}.{part}" for part in _PARTS_OF_IMAGE] if image else [name]


def _pixels(data: Any, height: Any, width: Any, channels: Any) -> Any:
    """An image struct as uint8 `[height, width, 3]`, RGB; grey becomes RGB, alpha is left out."""
    stored = tf.reshape(tf.io.decode_raw(data, tf.uint8), [height, width, channels])
    order = tf.where(channels >= 3, [2, 1, 0], [0, 0, 0])
    return tf.ensure_shape(tf.gather(stored, order, axis=-1), [None, None, 3])


Preprocessing = Sequence[Callable[..., Any]]
"""Functions of one row, one after the other; see `preprocessing_of`."""


def preprocessing_of(value: Any, argument: str) -> tuple[Callable[..., Any], ...]:
    """A chain of functions of one row.

    Args:
        value: None; a function or a Keras layer, which gets one tensor per column and returns one
            or several; the shape that a column's numbers are laid out in, such as `[28, 28, 1]`;
            or a list of functions and shapes, applied one after the other.
        argument: its name, for the error.

    Raises:
        InvalidInputError: it is something else.
    """
    if value is None:
        return ()
    parts = [value] if callable(value) or _is_shape(value) else value
    if isinstance(parts, (list, tuple)) and all(callable(p) or _is_shape(p) for p in parts):
        return tuple(part if callable(part) else Reshape(part) for part in parts)
    raise InvalidInputError(
        f"{argument} is a function of a row, a Keras layer, a shape, or a list of these. "
        f"Received: {value!r}."
    )


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(size, (int, np.integer)) for size in value)
    )


class Reshape:
    """Lays out a column's numbers in a shape, as float32: SeqToTensor of Analytics Zoo.

    Args:
        shape: of one row.
    """

    def __init__(self, shape: Sequence[int]):
        self.shape = [int(size) for size in shape]

    @tf.autograph.experimental.do_not_convert
    def __call__(self, tensor: Any) -> Any:
        """A value in the shape."""
        return tf.cast(tf.reshape(tensor, self.shape), tf.float32)


class Prepare:
    """What is done with the features of a row before a model gets them; for `TFDataset.map`.

    Args:
        columns: which features.
        preprocessing: of the user.
        inputs: that the model declares; None: none.
    """

    def __init__(
        self, columns: FeatureColumns, preprocessing: Preprocessing, inputs: RowSpec | None
    ):
        self._columns, self._inputs = columns, inputs
        self._preprocessing = [with_autograph(function) for function in preprocessing]

    @tf.autograph.experimental.do_not_convert
    def __call__(self, features: Any) -> Any:
        """The model's inputs in their structure.

        Args:
            features: a tensor, or a list of them, in the order of `columns.flat`.
        """
        tensors = features if isinstance(features, list) else [features]
        values: Any = self._columns.values(tensors)
        for function in self._preprocessing:
            result = function(*values)
            values = list(result) if isinstance(result, (list, tuple)) else [result]
        if self._inputs is None:
            values = [_floating(value) for value in values]
            return values[0] if len(values) == 1 else values
        return self._conformed(values)

    def _conformed(self, values: list[Any]) -> Any:
        assert self._inputs is not None
        fields = self._inputs.fields
        names = list(self._columns.names)
        if len(values) == len(names) == len(fields) and set(names) == set(self._inputs.names):
            values = [values[names.index(field.name)] for field in fields]
        if len(fields) == 1 and len(values) > 1:
            values = [_joined(values, names)]
        if len(values) != len(fields):
            raise DataError(
                f"There is a column for each input of a model: {', '.join(self._inputs.names)}. "
                f"Received: {len(values)} values of the columns {', '.join(names)}."
            )
        laid_out = [_fitted(value, field) for value, field in zip(values, fields, strict=True)]
        return self._inputs.unflatten(laid_out)


def _floating(value: Any) -> Any:
    return tf.cast(value, tf.float32) if value.dtype.is_floating else value


def _joined(values: Sequence[Any], names: Sequence[str]) -> Any:
    for value in values:
        if not (value.dtype.is_floating or value.dtype.is_integer or value.dtype.is_bool):
            raise DataError(
                "Columns are joined for a model of one input, and then they are numbers. "
                f"Received: {value.dtype.name} among {', '.join(names)}."
            )
    return tf.concat([tf.reshape(tf.cast(value, tf.float32), [-1]) for value in values], axis=0)


def _fitted(value: Any, field: Any) -> Any:
    """A value of a row in dtype and shape of an input."""
    if (field.dtype == STRING) != (value.dtype == tf.string):
        raise DataError(
            f"The model's input {field.name!r} is {field.dtype}. Received: {value.dtype.name}. "
            "Convert the column, or give a feature_preprocessing."
        )
    wanted, have = tuple(field.shape), value.shape
    sizes = [size for size in wanted if size is not None]
    if have.rank == 3 and len(wanted) == 3 and None in have.as_list() and len(sizes) == 3:
        value = _resized(value, wanted)
        have = value.shape
    fits = have.rank == len(wanted) and all(
        b is None or a == b for a, b in zip(have.as_list(), wanted, strict=True)
    )
    if not fits:
        known = have.is_fully_defined() and len(sizes) == len(wanted)
        if not known or math.prod(have.as_list()) != math.prod(sizes):
            raise DataError(
                f"The model's input {field.name!r} takes {list(wanted)} per row. "
                f"Received: {have.as_list()}. Choose other columns, or give a "
                "feature_preprocessing."
            )
        value = tf.reshape(value, wanted)
    return value if field.dtype == STRING else tf.cast(value, field.dtype)


def _resized(image: Any, wanted: Sequence[int]) -> Any:
    """An image of any size in that of an input, grey where that has one channel."""
    height, width, channels = wanted
    if channels not in (1, 3):
        raise DataError(
            "A model takes images of one or three channels. "
            f"Received: an input of {list(wanted)}. Give a feature_preprocessing."
        )
    resized = tf.image.resize(image, [height, width])
    return resized if channels == 3 else tf.image.rgb_to_grayscale(resized)
