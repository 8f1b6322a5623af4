"""What the tests of trainings share: rows as arrays, and the batches that ranks make of them."""

import itertools

import numpy as np
import optree
from keras_reference import global_batches

from tfspark.data.order import BatchOrder


def classified(rows, seed=0, features=6, classes=3):
    """Rows of a learnable classification: `x [rows, features]`, `y [rows]`."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, features)).astype(np.float32)
    y = np.argmax(x[:, :classes] + 0.1 * rng.normal(size=(rows, classes)), 1)
    return x, y.astype(np.int32)


def order_and_parts(dataset, tensors, num_ranks):
    """The order of a data set made by `from_ndarrays(tensors, …)`, and the rows of each rank."""
    arrays = optree.tree_leaves(tensors)
    rows = len(arrays[0])
    bounds = [rank * rows // num_ranks for rank in range(num_ranks + 1)]
    parts = [tuple(a[low:high] for a in arrays) for low, high in itertools.pairwise(bounds)]
    sizes = tuple(len(part[0]) for part in parts)
    return BatchOrder(sizes, dataset.batch_size, dataset.seed, dataset.shuffle), parts


def batches(dataset, tensors, num_ranks, steps):
    """The global batches of a data set made by `from_ndarrays(tensors, …)`, flat, in rank order."""
    return global_batches(*order_and_parts(dataset, tensors, num_ranks), steps)


def assert_close(left, right, rtol=1e-4, atol=1e-6):
    """Two lists of arrays, to float tolerance."""
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def assert_same_bits(left, right):
    """Two lists of arrays, bit for bit."""
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def differ(left, right):
    """Whether any two arrays of two lists differ: that something was trained at all."""
    return any(not np.array_equal(a, b) for a, b in zip(left, right, strict=True))
