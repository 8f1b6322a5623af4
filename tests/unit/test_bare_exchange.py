"""The processes of benchmarks/bare_exchange.py: they exchange what the formula says."""

from __future__ import annotations

import os

import pytest
from bare_exchange import bare, bare_shared, on_ranks, raw_pair, shared_copy, sum_of_bytes


def test_bytes_of_a_step_by_hand():
    # Of 300 weights, each of 3 ranks sends 2 slices of 100, once as gradients, once as weights.
    assert sum_of_bytes(3, 300) == 2 * 2 * 100 * 4
    assert sum_of_bytes(1, 300) == 0


def test_a_rank_receives_what_the_formula_says():
    large, small = bare(3, [300_000, 3_000], seconds=0.05)
    assert (large.num_ranks, large.weights) == (3, 300_000)
    expected = 2 * 2 / 3 * 300_000 * 4
    headers = large.received_bytes - expected
    assert 0 < headers < 2000
    assert small.received_bytes - 2 * 2 / 3 * 3_000 * 4 == pytest.approx(headers, abs=200)
    assert large.scatter_cpu_s > 0 and 0 < large.gather_s < large.step_s


def test_through_shared_memory_only_headers_pass_sockets():
    (found,) = bare_shared(2, [300_000], seconds=0.05)
    assert 0 < found.received_bytes < 2000
    assert found.scatter_cpu_s > 0


def test_the_same_bytes_without_tfspark():
    assert 0 < raw_pair(100_000, 0.01) < 10
    assert 0 < shared_copy(100_000, 0.01) < 10


def test_a_process_that_dies_ends_the_measurement():
    with pytest.raises(RuntimeError, match="the process of rank 1 died"):
        on_ranks(2, _die_at_rank_1)


def _die_at_rank_1(rank, sockets):
    if rank == 1:
        os._exit(3)
