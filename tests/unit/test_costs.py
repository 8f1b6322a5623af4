"""Costs fitted by benchmarks/costs.py: found again where they are known."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from costs import Costs, Point, explained, fit

TRUE = Costs(3e-4, 3e-5, 4e-10, step_s=5e-3, others_s=6e-9, shard_s=2e-8)
SIZES, RANKS = (2**18, 2**22), (1, 2, 4, 8, 16)
GATHER, SCATTER, STEP = (1, 0, 0, 1), (1, 0, 1, 1), (2, 1, 1, 1)


def by_hand(size, weights, exchanges, steps, sums, shards):
    shard = weights / size
    one = 3e-4 + (size - 1) * 3e-5 + (size - 1) * 4 * shard * 4e-10
    others = (size - 1) * shard * 6e-9
    return exchanges * one + steps * 5e-3 + sums * others + shards * shard * 2e-8


def points(*kinds, noise=None):
    found = []
    for size in RANKS:
        for weights in SIZES:
            for kind in kinds:
                factor = 1.0 if noise is None else noise.uniform(0.95, 1.05)
                found.append(Point(size, weights, *kind, by_hand(size, weights, *kind) * factor))
    return found


def test_costs_of_a_step_by_hand():
    assert TRUE.step(4, 2**18) == pytest.approx(by_hand(4, 2**18, *STEP))
    assert TRUE.exchange(4, 2**18) == pytest.approx(by_hand(4, 2**18, 1, 0, 0, 0))
    assert explained(TRUE, Point(8, 2**22, *STEP, 0.0)) == pytest.approx(TRUE.step(8, 2**22))


def test_known_costs_are_found_again():
    found = fit(points(GATHER, SCATTER, STEP))
    assert asdict(found) == pytest.approx(asdict(TRUE))


def test_noise_does_not_carry_them_away():
    found = fit(points(GATHER, SCATTER, STEP, noise=np.random.default_rng(0)))
    assert found.byte_s == pytest.approx(TRUE.byte_s, rel=0.2)
    for point in points(STEP):
        assert explained(found, point) == pytest.approx(point.cpu_s, rel=0.1)


def test_whole_steps_hold_the_costs_of_exchanges_and_bytes():
    found = fit(points(STEP), ["message_s", "step_s", "others_s", "shard_s"])
    assert found.exchange_s == found.byte_s == 0
    assert found.step_s == pytest.approx(5e-3 + 2 * 3e-4)
    assert found.others_s == pytest.approx(6e-9 + 2 * 4 * 4e-10)
    assert found.message_s == pytest.approx(3e-5) and found.shard_s == pytest.approx(2e-8)


def test_no_cost_is_negative():
    # Less for twice as many weights: plain least squares would make the cost of a weight negative.
    falling = [Point(1, 100, 0, 1, 1, 1, 2.0), Point(1, 200, 0, 1, 1, 1, 1.0)]
    # Of the squares of (a - 2) / 2 and (a - 1) / 1 the sum is least at a = 6 / 5.
    assert asdict(fit(falling)) == pytest.approx(asdict(Costs(step_s=1.2)))


def test_what_no_point_tells_is_nought():
    assert fit([Point(1, 100, 1, 0, 0, 0, 2.0)]) == Costs(exchange_s=2.0)
