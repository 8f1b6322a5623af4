"""The data of the examples."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

PATH = Path(__file__).parent.parent.parent / "examples" / "digits.py"


@pytest.fixture(scope="module")
def digits():
    spec = importlib.util.spec_from_file_location("digits", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shapes_dtypes_and_range(digits):
    (images, labels), (test_images, test_labels) = digits.load_digits_28x28()
    assert images.shape == (1437, 28, 28, 1)
    assert test_images.shape == (360, 28, 28, 1)
    assert (labels.shape, test_labels.shape) == ((1437,), (360,))
    assert (images.dtype, labels.dtype) == (np.float32, np.int32)
    assert (images.min(), images.max()) == (0.0, 1.0)


def test_the_split_is_fixed_and_has_every_digit_in_both_parts(digits):
    first, second = digits.load_digits_28x28(), digits.load_digits_28x28()
    for (images, labels), (same_images, same_labels) in zip(first, second, strict=True):
        np.testing.assert_array_equal(images, same_images)
        np.testing.assert_array_equal(labels, same_labels)
        assert np.bincount(labels).min() >= 20


def test_all_rows_are_there_once(digits):
    (_, labels), (_, test_labels) = digits.load_digits_28x28()
    counts = np.bincount(labels) + np.bincount(test_labels)
    np.testing.assert_array_equal(counts, np.bincount(load_digits().target))


def test_an_enlarged_digit_is_still_the_same_picture(digits):
    small = load_digits().images[:100] / 16.0
    large = digits.enlarge(small)
    # Means over blocks of 3.5 pixels, as 7 pixels of the picture doubled, give back the small one.
    doubled = large.repeat(2, axis=1).repeat(2, axis=2)
    means = doubled.reshape(100, 8, 7, 8, 7).mean(axis=(2, 4))
    assert np.corrcoef(means.ravel(), small.ravel())[0, 1] > 0.99
