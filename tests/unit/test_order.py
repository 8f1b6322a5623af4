"""Batch order against brute force: every row once, shares proportional, permutations uniform."""

from collections import Counter
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfspark.data.order import BatchOrder, permute
from tfspark.errors import DataError, InvalidInputError

partitions = st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(sum).map(tuple)


def webster(rows_per_rank, seats):
    """The definition: hand out one seat after the other to the greatest n / (2k + 1)."""
    counts = [0] * len(rows_per_rank)
    for _ in range(seats):
        rank = max(
            range(len(counts)),
            key=lambda r: (Fraction(rows_per_rank[r], 2 * counts[r] + 1), -r),
        )
        counts[rank] += 1
    return counts


@given(partitions, st.integers(1, 80), st.integers(-(2**40), 2**70), st.booleans())
@settings(deadline=None, max_examples=150)
def test_every_row_is_used_once_per_epoch(rows_per_rank, batch_size, seed, shuffle):
    order = BatchOrder(rows_per_rank, batch_size, seed, shuffle)
    used = [[] for _ in rows_per_rank]
    for step in range(order.steps_per_epoch):
        counts = order.rank_rows(step)
        assert sum(counts) == order.global_rows(step)
        for rank, count in enumerate(counts):
            ids = order.row_ids(rank, 3, step)
            assert ids.shape == (count,) and ids.dtype == np.int64
            used[rank].extend(ids.tolist())
    assert [sorted(ids) for ids in used] == [list(range(rows)) for rows in rows_per_rank]


@given(partitions, st.integers(1, 80))
@settings(deadline=None, max_examples=100)
def test_shares_follow_webster(rows_per_rank, batch_size):
    order = BatchOrder(rows_per_rank, batch_size, 0, False)
    given_out = np.zeros(len(rows_per_rank), int)
    for step in range(order.steps_per_epoch):
        given_out += order.rank_rows(step)
        assert given_out.tolist() == webster(rows_per_rank, int(given_out.sum()))


def test_large_partitions_are_apportioned_exactly():
    rows_per_rank = (10**15 + 1, 3, 10**15 - 7)
    order = BatchOrder(rows_per_rank, 10**14, 0, False)
    totals = np.sum([order.rank_rows(s) for s in range(order.steps_per_epoch)], axis=0)
    assert tuple(totals) == rows_per_rank


def test_order_depends_on_seed_epoch_and_rank_and_on_nothing_else():
    order = BatchOrder((1000, 1000), 2000, 7, True)
    first = order.row_ids(0, 0, 0)
    assert (first == BatchOrder((1000, 1000), 2000, 7, True).row_ids(0, 0, 0)).all()
    others = [
        order.row_ids(1, 0, 0),
        order.row_ids(0, 1, 0),
        BatchOrder((1000, 1000), 2000, 8, True).row_ids(0, 0, 0),
    ]
    for other in others:  # two random permutations agree in one place on average
        assert (first == other).sum() < 10


def test_without_shuffle_rows_come_in_order():
    order = BatchOrder((5, 0, 4), 3, 0, False)
    ids = np.concatenate([order.row_ids(2, 9, step) for step in range(3)])
    assert ids.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_permutations_are_uniform(size):
    trials = 8_000
    seen = Counter(tuple(permute(np.arange(size), size, key)) for key in range(trials))
    expected = trials / len(list(permutations(range(size))))
    chi2 = sum((seen[order] - expected) ** 2 / expected for order in permutations(range(size)))
    freedom = len(list(permutations(range(size)))) - 1
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


def test_large_permutations_look_random():
    size = 40_000
    orders = np.array([permute(np.arange(size), size, key) for key in range(30)])
    assert all((np.sort(order) == np.arange(size)).all() for order in orders)
    for order in orders:
        # Correlation with the position and between neighbours: standard error 1/sqrt(size).
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 5 / np.sqrt(size)
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 5 / np.sqrt(size)
    # Differences of neighbours repeat no more often than in NumPy's own permutations.
    reference = np.random.default_rng(0).permutation(size)
    ours, theirs = (np.unique(np.diff(o)).size for o in (orders[0], reference))
    assert abs(ours - theirs) < 0.02 * theirs


def test_row_seeds_differ_by_row_epoch_and_rank_and_are_uniform():
    order = BatchOrder((5000, 5000), 100, 1, True)
    rows = np.arange(5000)
    seeds = [order.row_seeds(rank, epoch, rows) for rank in (0, 1) for epoch in (0, 1)]
    assert np.unique(np.concatenate(seeds), axis=0).shape == (20_000, 2)
    assert seeds[0].dtype == np.int64
    assert (order.row_seeds(0, 0, rows[7:9]) == seeds[0][7:9]).all()
    bits = np.unpackbits(seeds[0].view(np.uint8)).mean()
    assert abs(bits - 0.5) < 0.005


def test_locate_counts_epochs():
    order = BatchOrder((5, 5), 4, 0, True)
    assert [order.locate(step) for step in (0, 2, 3, 7)] == [(0, 0), (0, 2), (1, 0), (2, 1)]


def test_bad_arguments_are_refused():
    with pytest.raises(InvalidInputError, match=r"at least one row.*batch_size=0"):
        BatchOrder((5,), 0, 0, True)
    with pytest.raises(DataError, match=r"at least one row to train on.*none on 2 ranks"):
        BatchOrder((0, 0), 4, 0, True)
