"""The simulated cluster of benchmarks/cluster.py against times worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cluster import Cluster, Direct, Wire, Workload, next_first, rank_order, ring, simulate
from costs import Costs

FREE = Costs()
S, B, L = 1000.0, 1e6, 1e-3  # bytes of a slice, bytes/s of a link, seconds of latency
IN_RANK_ORDER, NEXT_FIRST = Direct(rank_order), Direct(next_first)


def done(exchange, cluster, costs=FREE, slice_bytes=S, ready=None):
    start = np.zeros(cluster.num_ranks) if ready is None else np.array(ready, float)
    return exchange(cluster, costs, slice_bytes, start).done_s


def hosts(num_ranks, **options):
    """One rank on each, a slice in one chunk."""
    return Cluster(num_ranks, **{"link_bytes_per_s": B, "chunk_bytes": S, **options})


def test_orders_of_peers():
    assert rank_order(3).tolist() == [[1, 2], [0, 2], [0, 1]]
    assert next_first(3).tolist() == [[1, 2], [2, 0], [0, 1]]
    for order in (rank_order, next_first):
        assert {frozenset((r, *row)) for r, row in enumerate(order(5).tolist())} == {
            frozenset(range(5))
        }


class TestLinks:
    @pytest.mark.parametrize("exchange", [IN_RANK_ORDER, NEXT_FIRST, ring])
    def test_two_ranks_send_one_slice_each_way_at_once(self, exchange):
        assert done(exchange, hosts(2)) == pytest.approx([S / B] * 2)
        assert done(exchange, hosts(2, latency_s=L)) == pytest.approx([S / B + L] * 2)

    @pytest.mark.parametrize("size", [3, 5, 16])
    def test_to_another_rank_each_at_any_time_fills_all_links(self, size):
        expected = (size - 1) * S / B + L
        assert done(NEXT_FIRST, hosts(size, latency_s=L)) == pytest.approx([expected] * size)

    @pytest.mark.parametrize("size", [3, 5, 16])
    def test_to_one_rank_all_at_once_the_last_waits_twice_as_long(self, size):
        # Rank j's slices leave their senders in slot j - 1 (those of ranks below j) or j. Its link
        # then serves N - 1 of them, one after the other.
        slots = [size - 1 + max(0, rank - 1) for rank in range(size)]
        cluster = hosts(size, latency_s=L)
        assert done(IN_RANK_ORDER, cluster) == pytest.approx([n * S / B + L for n in slots])

    def test_all_but_one_wait_in_the_switch(self):
        found = IN_RANK_ORDER(hosts(9), FREE, S, np.zeros(9))
        assert found.queue_bytes == pytest.approx(7 * S)
        assert NEXT_FIRST(hosts(9), FREE, S, np.zeros(9)).queue_bytes == pytest.approx(0, abs=1e-6)

    def test_small_chunks_fill_links_in_any_order(self):
        # 16 rounds of 4 chunks; the last link begins three chunks late.
        found = done(IN_RANK_ORDER, hosts(5, chunk_bytes=1.0))
        assert found.max() == pytest.approx((4 + 3 / 16) * S / B)

    def test_a_late_rank_delays_others_by_when_it_serves_them(self):
        late = 1.0
        found = done(NEXT_FIRST, hosts(4), ready=[0, late, 0, 0])
        expected = [late + 3 * S / B, late, late + S / B, late + 2 * S / B]
        assert found == pytest.approx(expected)

    def test_a_ring_takes_as_many_hops_as_there_are_others(self):
        assert done(ring, hosts(5, latency_s=L)) == pytest.approx([4 * (S / B + L)] * 5)

    def test_ranks_of_one_host_share_its_link(self):
        # Each host's two ranks send two slices each to the other host.
        cluster = hosts(4, ranks_per_host=2, latency_s=L)
        assert done(NEXT_FIRST, cluster).max() == pytest.approx(4 * S / B + L)

    def test_hosts_have_as_many_ranks_each(self):
        with pytest.raises(ValueError, match="Received: 5 ranks, 2 per host"):
            Cluster(5, ranks_per_host=2)


class TestProcessors:
    COSTS = Costs(exchange_s=3e-4, message_s=2e-5, byte_s=1e-8)

    @pytest.mark.parametrize("exchange", [IN_RANK_ORDER, NEXT_FIRST])
    @pytest.mark.parametrize("size", [1, 2, 7])
    def test_on_an_endless_network_only_they_count(self, exchange, size):
        expected = 3e-4 + (size - 1) * (2e-5 + S * 1e-8)
        found = done(exchange, Cluster(size), self.COSTS)
        assert found == pytest.approx([expected] * size)

    def test_ranks_on_too_few_cores_take_turns(self):
        alone = done(NEXT_FIRST, Cluster(4), self.COSTS)
        shared = done(NEXT_FIRST, Cluster(4, ranks_per_host=4, cores=2), self.COSTS)
        enough = done(NEXT_FIRST, Cluster(4, ranks_per_host=4, cores=8), self.COSTS)
        assert shared == pytest.approx(2 * alone)
        assert enough == pytest.approx(alone)

    def test_what_is_slower_counts_link_or_processor(self):
        many = {"chunk_bytes": S / 16}
        link = 7 * S / B
        for byte_s in (0.01 / B, 100 / B):
            found = done(NEXT_FIRST, hosts(8, **many), Costs(byte_s=byte_s)).max()
            bound = max(link, 7 * S * byte_s)
            # What is not bound waits for one chunk at most.
            assert bound * 0.9999 < found < bound * 1.02

    def test_a_rank_reads_when_it_has_written(self):
        # Half a second to send a message, half a second to read one. Rank 2 sends to 0 until 9.5,
        # to 1 until 10, and then reads what has been there for long.
        costs = Costs(message_s=1.0)
        assert done(NEXT_FIRST, Cluster(3), costs, ready=[0, 0, 9]) == pytest.approx([10, 10.5, 11])


class TestSteps:
    def run(self, cluster, workload, costs=FREE, exchange=NEXT_FIRST, wire=None, steps=4):
        random = np.random.default_rng(0)
        return simulate(cluster, costs, workload, exchange, wire or Wire(), steps, random)

    def test_a_step_is_two_exchanges_and_what_is_computed(self):
        costs = Costs(step_s=0.5, others_s=1e-3, shard_s=5e-3)
        found = self.run(hosts(4, latency_s=L), Workload("m", 1000, 2.0), costs)
        exchange = 3 * 1000 / 4 * 4 / B + L
        assert found.step_s == pytest.approx(2.0 + 2 * exchange + 0.5 + 0.75 + 1.25)
        assert found.compute_s == 2.0 and found.wait_s == pytest.approx(0)
        assert found.exchange_s == pytest.approx(2 * exchange)
        assert found.besides_s == pytest.approx(2.5)

    def test_half_as_many_bytes_take_half_as_long(self):
        exchanges = [
            self.run(hosts(4), Workload("m", 1000, 1.0), wire=Wire("w", width)).exchange_s
            for width in (4, 2)
        ]
        assert exchanges[0] == pytest.approx(2 * exchanges[1])

    def test_casts_of_all_that_is_sent_and_received(self):
        # Weights: a fourth is sent, three fourths are received; gradients: three fourths each.
        found = self.run(Cluster(4), Workload("m", 1000, 1.0), wire=Wire("w", 2, cast_s=1e-3))
        assert found.exchange_s == pytest.approx(0.25 + 0.75 + 0.75 + 0.75)

    def test_the_slowest_of_two_is_as_late_as_the_theory_says(self):
        # The mean of the larger of two log-normal numbers of mean 1 is 2 Phi(spread / sqrt 2),
        # and Phi(x) = (1 + erf(x / sqrt 2)) / 2.
        spread = 0.4
        found = self.run(Cluster(2), Workload("m", 10, 1.0, spread), steps=5_000)
        assert found.step_s == pytest.approx(1 + math.erf(spread / 2), rel=0.02)
        assert found.wait_s == pytest.approx(math.erf(spread / 2), rel=0.07)

    def test_computing_takes_its_mean(self):
        drawn = Workload("m", 1, 3.0, 0.5).draw(200_000, np.random.default_rng(0))
        assert drawn.mean() == pytest.approx(3.0, rel=0.01)
        assert np.log(drawn).std() == pytest.approx(0.5, rel=0.01)
