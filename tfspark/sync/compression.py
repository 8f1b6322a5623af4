"""How weights and gradients are rounded on their way between ranks. By default they are not.

What every rank owns stays in full precision, and so does every sum: only what is sent is rounded,
to nearest, to half its bytes. Each engine rounds at the same places, what stays at a rank included,
so all give the same bits.

Gradients travel as sums over the rows of a rank. To keep them in the range of float16 they are
divided by a power of two near the size of the global batch, which loses nothing, and multiplied
again after the sum.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Protocol

import ml_dtypes  # noqa: F401  (makes bfloat16 known to np.dtype)
import numpy as np
import tensorflow as tf

from tfspark.graphdef.loader import Loaded, array_of, load
from tfspark.graphdef.variables import trace

WIRE_DTYPES = ("bfloat16", "float16")


class Compression(Protocol):
    """What is done to a vector before it is sent and after it has come."""

    @property
    def dtype(self) -> np.dtype:
        """Of what is sent."""

    @property
    def gradient_scale(self) -> float:
        """What a sum of gradients is to be multiplied with."""

    def weights(self, values: np.ndarray) -> np.ndarray:
        """Weights as they are sent."""

    def gradient(self, values: np.ndarray) -> np.ndarray:
        """A gradient as it is sent."""

    def restored(self, values: np.ndarray) -> np.ndarray:
        """What was sent, in full precision; of gradients a fraction, see `gradient_scale`."""


class Exact:
    """Sends vectors as they are."""

    gradient_scale = 1.0

    def __init__(self, dtype: str):
        self.dtype = np.dtype(dtype)

    def weights(self, values: np.ndarray) -> np.ndarray:
        """The same array."""
        return values

    def gradient(self, values: np.ndarray) -> np.ndarray:
        """The same array."""
        return values

    def restored(self, values: np.ndarray) -> np.ndarray:
        """The same array."""
        return values


class Rounded:
    """Sends vectors in a type of 16 bits.

    Args:
        dtype: "bfloat16" (the range of float32, 8 bits of precision) or "float16" (11 bits of
            precision; what is above 65504 becomes infinite).
        full: dtype of the vectors.
        batch_size: rows of a global batch.
    """

    def __init__(self, dtype: str, full: str, batch_size: int):
        self.dtype = np.dtype(dtype)
        self._full = full
        self.gradient_scale = float(2 ** (batch_size - 1).bit_length())

    def weights(self, values: np.ndarray) -> np.ndarray:
        """Rounded to nearest."""
        return self._sent(values, 1.0)

    def gradient(self, values: np.ndarray) -> np.ndarray:
        """Divided by `gradient_scale` and rounded to nearest."""
        return self._sent(values, 1.0 / self.gradient_scale)

    def restored(self, values: np.ndarray) -> np.ndarray:
        """In full precision again."""
        (restored,) = self._restore(values.view(np.uint16))
        return array_of(restored)

    def _sent(self, values: np.ndarray, factor: float) -> np.ndarray:
        (sent,) = self._round(values, np.asarray(factor, self._full))
        return array_of(sent).view(self.dtype)

    # TensorFlow's casts take a third of the time of NumPy's or less. Arrays and tensors have no
    # type of 16 bits in common but integers.

    @cached_property
    def _round(self) -> Loaded:
        def rounded(values: tf.Tensor, factor: tf.Tensor) -> list[tf.Tensor]:
            return [tf.bitcast(tf.cast(values * factor, self.dtype.name), tf.uint16)]

        vector, scalar = tf.TensorSpec([None], self._full), tf.TensorSpec([], self._full)
        return load(trace(rounded, [vector, scalar]).graph)

    @cached_property
    def _restore(self) -> Loaded:
        def restored(values: tf.Tensor) -> list[tf.Tensor]:
            return [tf.cast(tf.bitcast(values, self.dtype.name), self._full)]

        return load(trace(restored, [tf.TensorSpec([None], tf.uint16)]).graph)


@lru_cache(maxsize=8)
def compression(wire_dtype: str | None, full: str, batch_size: int) -> Compression:
    """The compression of a run; see `Rounded` for the arguments."""
    return Exact(full) if wire_dtype is None else Rounded(wire_dtype, full, batch_size)
