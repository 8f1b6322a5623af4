"""Rounding for the wire, against the casts of NumPy."""

import ml_dtypes  # noqa: F401
import numpy as np
import pytest

from tfspark.errors import InvalidInputError
from tfspark.sync.compression import compression
from tfspark.train.recipe import Settings

VALUES = np.concatenate(
    [
        np.random.default_rng(0).normal(size=1001).astype(np.float32),
        np.float32([0, -0.0, 1e-9, 1e30, -1e30, 65504, 3.14159, 1 + 2**-8, 1 + 3 * 2**-8]),
    ]
)


def test_by_default_nothing_is_touched():
    exact = compression(None, "float32", 128)
    assert exact.weights(VALUES) is exact.gradient(VALUES) is exact.restored(VALUES) is VALUES
    assert exact.gradient_scale == 1 and exact.dtype == np.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("full", ["float32", "float64"])
def test_weights_are_rounded_to_nearest(dtype, full):
    rounded, values = compression(dtype, full, 128), VALUES.astype(full)
    sent = rounded.weights(values)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(sent, values.astype(dtype))
    assert sent.dtype == rounded.dtype and sent.nbytes == 2 * len(values)
    restored = rounded.restored(sent)
    assert restored.dtype == full
    np.testing.assert_array_equal(restored, sent.astype(full))


@pytest.mark.parametrize("batch_size, scale", [(1, 1), (2, 2), (3, 4), (128, 128), (129, 256)])
def test_gradients_are_scaled_by_a_power_of_two(batch_size, scale):
    rounded = compression("float16", "float32", batch_size)
    assert rounded.gradient_scale == scale
    sums = VALUES[:1001] * 1000
    sent = rounded.gradient(sums)
    np.testing.assert_array_equal(sent, (sums / scale).astype(np.float16))


def test_large_batches_stay_in_the_range_of_float16():
    sums = np.full(3, 5e6, np.float32)  # of 4,096 rows
    rounded = compression("float16", "float32", 4096)
    restored = rounded.restored(rounded.gradient(sums)) * rounded.gradient_scale
    np.testing.assert_allclose(restored, sums, rtol=1e-3)
    with np.errstate(over="ignore"):
        assert np.isinf(sums.astype(np.float16)).all()


def test_other_types_are_refused():
    with pytest.raises(InvalidInputError, match=r"'bfloat16', 'float16'\. Received: 'int8'"):
        Settings(wire_dtype="int8")


def test_local_sgd_does_not_round():
    with pytest.raises(InvalidInputError, match="'float16' with average_every=4"):
        Settings(wire_dtype="float16", average_every=4)
