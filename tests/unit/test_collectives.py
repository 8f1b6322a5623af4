"""What ranks compute together, against NumPy in rank order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from mesh import mesh

from tfspark.errors import InvalidInputError, TrainingError
from tfspark.sync.collectives import (
    all_gather,
    all_gather_small,
    all_reduce_sum,
    barrier,
    reduce_scatter,
)
from tfspark.sync.links import PeerLostError

AT = {"phase": "norms", "step": 3, "timeout_s": 10.0}
SIZES = [1, 2, 3, 5, 8]


def on_all(size, function):
    """`function(links)` of every rank, at once."""
    with mesh(size) as links, ThreadPoolExecutor(size) as pool:
        return list(pool.map(function, links))


def vectors(size, elements, dtype):
    """One per rank, of which the order of the sum shows in the last bits."""
    random = np.random.default_rng(size)
    scale = 10.0 ** random.integers(-3, 4, (size, elements))
    return (random.normal(size=(size, elements)) * scale).astype(dtype)


def sum_in_order(parts):
    total = np.zeros_like(parts[0])
    for part in parts:
        total = total + part
    return total


def uneven(size, elements):
    """Slices of different lengths, the second one empty."""
    cuts = np.linspace(0, elements, size + 1).astype(int)
    cuts[1:-1] -= np.arange(size - 1) % 3
    if size > 2:
        cuts[2] = cuts[1]
    return list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("size", SIZES)
class TestSums:
    def test_all_reduce(self, size, dtype):
        parts = vectors(size, 1001, dtype)
        expected = sum_in_order(parts)
        for total in on_all(size, lambda own: all_reduce_sum(own, parts[own.rank], **AT)):
            assert total.dtype == dtype
            assert total.tobytes() == expected.tobytes()

    def test_reduce_scatter_and_all_gather(self, size, dtype):
        parts, bounds = vectors(size, 1001, dtype), uneven(size, 1001)
        before = parts.copy()

        def run(own):
            total = reduce_scatter(own, parts[own.rank], bounds, **AT)
            into = np.zeros(1001, dtype)
            all_gather(own, total, into, bounds, **AT)
            return total, into

        expected = sum_in_order(parts)
        for rank, (total, into) in enumerate(on_all(size, run)):
            assert total.tobytes() == expected[slice(*bounds[rank])].tobytes()
            assert into.tobytes() == expected.tobytes()
        assert parts.tobytes() == before.tobytes()


def test_the_order_matters_here():
    parts = vectors(5, 1001, np.float32)
    assert sum_in_order(parts).tobytes() != sum_in_order(parts[::-1]).tobytes()


def test_own_slice_may_lie_where_it_belongs():
    bounds = [(0, 2), (2, 5)]

    def run(own):
        into = np.full(5, own.rank, np.float32)
        all_gather(own, into[slice(*bounds[own.rank])], into, bounds, **AT)
        return into.tolist()

    assert on_all(2, run) == [[0, 0, 1, 1, 1]] * 2


def test_sums_of_more_dimensions():
    for total in on_all(3, lambda own: all_reduce_sum(own, np.full((2, 3), own.rank), **AT)):
        assert total.tolist() == [[3] * 3] * 2


@pytest.mark.parametrize("size", SIZES)
def test_small_values_by_rank(size):
    values = on_all(size, lambda own: all_gather_small(own, {"r": (own.rank, 0.1)}, **AT))
    assert values == [[{"r": [rank, 0.1]} for rank in range(size)]] * size


@pytest.mark.parametrize("size", SIZES)
def test_nobody_passes_a_barrier_before_all_have_come(size):
    came = []

    def run(own):
        came.append(own.rank)
        barrier(own, **AT)
        return len(came)

    assert on_all(size, run) == [size] * size


def test_a_rank_that_does_not_come_is_named():
    with mesh(2) as links, pytest.raises(PeerLostError, match="silent") as caught:
        barrier(links[0], phase="norms", step=3, timeout_s=0.1)
    assert caught.value.where == {"rank": 0, "step": 3, "phase": "norms", "peer": 1}


@pytest.mark.parametrize(
    ("mine", "others"),
    [
        (lambda own: barrier(own, **AT), lambda own: all_gather_small(own, 1, **AT)),
        (lambda own: barrier(own, **AT), lambda own: barrier(own, **{**AT, "step": 4})),
        (
            lambda own: all_reduce_sum(own, np.zeros(3), **AT),
            lambda own: all_reduce_sum(own, np.zeros(4), **AT),
        ),
        (
            lambda own: all_reduce_sum(own, np.zeros(3), **AT),
            lambda own: all_reduce_sum(own, np.zeros(3, np.float32), **AT),
        ),
        (
            lambda own: reduce_scatter(own, np.zeros(4), [(0, 1), (1, 4)], **AT),
            lambda own: reduce_scatter(own, np.zeros(4), [(0, 2), (2, 4)], **AT),
        ),
    ],
)
def test_ranks_that_do_different_things_are_told(mine, others):
    def run(own):
        try:
            (mine if own.rank == 0 else others)(own)
        except TrainingError as error:
            return error
        return None

    errors = on_all(2, run)
    for rank, error in enumerate(errors):
        assert error is not None
        assert (error.rank, error.peer) == (rank, 1 - rank)
        assert "All ranks" in str(error)


@pytest.mark.parametrize(
    "bounds", [[(0, 4)], [(0, 2), (2, 5)], [(0, 2), (3, 2)], [(-1, 2), (2, 4)]]
)
def test_bounds_are_checked(bounds):
    with mesh(2) as links:
        with pytest.raises(InvalidInputError, match="of 2 ranks has a slice"):
            reduce_scatter(links[0], np.zeros(4), bounds, **AT)
        with pytest.raises(InvalidInputError, match="of 2 ranks has a slice"):
            all_gather(links[0], np.zeros(2), np.zeros(4), bounds, **AT)


def test_the_own_slice_is_checked():
    with mesh(2) as links, pytest.raises(InvalidInputError, match="fills 2 elements of float64"):
        all_gather(links[0], np.zeros(3), np.zeros(4), [(0, 2), (2, 4)], **AT)
