"""What benchmarks/simulate.py makes of measured points."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from bare_exchange import sum_of_bytes
from costs import Costs
from pages import fill
from simulate import MODELS, check, check_table, cluster_costs, train, variants
from simulate import Cluster as Hosts

BARE = Costs(exchange_s=3e-4, message_s=7e-5, byte_s=6e-10, others_s=2e-9, shard_s=4e-10)
GANG = Costs(message_s=9e-5, step_s=3e-3, others_s=1e-8, shard_s=1.5e-8)


@pytest.fixture
def content():
    """What scaling.py would write if two cores took exactly these costs."""
    exchanges, steps = [], []
    for size in (1, 2, 4, 8, 16):
        for weights in (2**18, 2**22):
            turns, shard = max(1, size / 2), weights / size
            # Both copy the own shard, which makes the cost of a step's.
            gather = BARE.exchange(size, shard * 4) + shard * 2e-10
            scatter = gather + (weights - shard) * 2e-9
            both = {"num_ranks": size, "weights": weights}
            exchanges.append(
                {
                    **both,
                    "scatter_cpu_s": scatter,
                    "gather_cpu_s": gather,
                    "step_s": (scatter + gather) * turns,
                }
            )
            cpu_s = GANG.step(size, weights)
            sent = sum_of_bytes(size, weights)
            steps.append({**both, "cpu_s": cpu_s, "step_s": cpu_s * turns, "sent_bytes": sent})
    return {
        "machine": {"cores": 2},
        "exchanges": exchanges,
        "steps": steps,
        "costs": {"bare exchange": asdict(BARE), "gang on Spark": asdict(GANG)},
    }


def test_points_that_costs_explain_are_simulated_exactly(content):
    found = check(content)
    assert len(found) == 20
    for one in found:
        assert one["error"] == pytest.approx(0, abs=1e-6)
        assert (one["held_out_error"] is None) == (one["num_ranks"] <= 4)
        assert one["held_out_error"] or pytest.approx(0, abs=1e-6) == 0


def test_the_report_counts_points_that_are_far_off(content):
    content["steps"][0]["step_s"] *= 2
    text = check_table(check(content))
    assert "largest 50%; 1 of 20 points are further off than 35%" in text


def test_costs_of_a_cluster(content):
    costs = cluster_costs(content)
    assert (costs.exchange_s, costs.message_s, costs.byte_s) == (3e-4, 7e-5, 6e-10)
    assert costs.step_s == pytest.approx(3e-3 - 2 * 3e-4)
    # Every weight travels twice, four bytes each.
    assert costs.others_s == pytest.approx(1e-8 - 8 * 6e-10)
    for one in content["steps"]:
        one["sent_bytes"] = 0.0  # through shared memory
    assert cluster_costs(content).others_s == pytest.approx(1e-8)


def test_efficiency_counts_all_that_is_not_computed():
    model, way = MODELS[0], variants(0.0)[0]
    alone = train(Costs(), Hosts(1), model, way, "none", fixed_s=0.0)
    # 5 ms of the driver for a round; nothing but the spread of this host's own steps.
    assert alone.efficiency == pytest.approx(1, abs=0.01)
    slower = train(Costs(step_s=model.compute_s), Hosts(1), model, way, "none", fixed_s=0.0)
    assert slower.efficiency == pytest.approx(0.5, abs=0.01)


def test_parts_of_a_page_are_replaced():
    page = "a\n<!-- begin: x -->\nold\n<!-- end: x -->\nb\n"
    once = fill(page, {"x": "new"})
    assert once == "a\n<!-- begin: x -->\n\nnew\n\n<!-- end: x -->\nb\n"
    assert fill(once, {"x": "new"}) == once
    with pytest.raises(ValueError, match="Received: none for 'y'"):
        fill(page, {"y": "new"})
