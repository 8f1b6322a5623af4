"""Costs fitted by benchmarks/costs.py: found again where they are known."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from costs import Costs, Point, explained, fit

TRUE = Costs(
    exchange_s=2e-4, message_s=3e-5, byte_s=4e-10, step_s=5e-3, weight_s=6e-9, shard_s=2e-8
)
SIZES, RANKS = (2**18, 2**22), (1, 2, 4, 8, 16)


def by_hand(size, weights, exchanges, steps, sums):
    slice_bytes = 4 * weights / size
    one = 2e-4 + (size - 1) * 3e-5 + (size - 1) * slice_bytes * 4e-10
    return exchanges * one + steps * (5e-3 + weights / size * 2e-8) + sums * weights * 6e-9


def points(*kinds, noise=None):
    found = []
    for size in RANKS:
        for weights in SIZES:
            for kind in kinds:
                factor = 1.0 if noise is None else noise.uniform(0.95, 1.05)
                found.append(Point(size, weights, *kind, by_hand(size, weights, *kind) * factor))
    return found


def test_costs_of_a_step_by_hand():
    assert TRUE.step(4, 2**18) == pytest.approx(by_hand(4, 2**18, 2, 1, 1))
    assert TRUE.exchange(4, 2**18) == pytest.approx(by_hand(4, 2**18, 1, 0, 0))
    assert explained(TRUE, Point(8, 2**22, 2, 1, 1, 0.0)) == pytest.approx(TRUE.step(8, 2**22))


def test_known_costs_are_found_again():
    found = fit(points((1, 0, 0), (1, 0, 1), (2, 1, 1)))
    assert asdict(found) == pytest.approx(asdict(TRUE))


def test_noise_does_not_carry_them_away():
    found = fit(points((1, 0, 0), (1, 0, 1), (2, 1, 1), noise=np.random.default_rng(0)))
    assert found.byte_s == pytest.approx(TRUE.byte_s, rel=0.2)
    for point in points((2, 1, 1)):
        assert explained(found, point) == pytest.approx(point.cpu_s, rel=0.1)


def test_no_cost_is_negative():
    # Less for twice as many weights: plain least squares would make the weight cost negative.
    falling = [Point(1, 100, 0, 1, 1, 2.0), Point(1, 200, 0, 1, 1, 1.0)]
    found = fit(falling)
    assert found.weight_s == found.shard_s == 0
    # Of the squares of (a - 2) / 2 and (a - 1) / 1 the sum is least at a = 6 / 5.
    assert found.step_s == pytest.approx(1.2)


def test_what_no_point_tells_is_nought():
    assert fit([Point(1, 100, 1, 0, 0, 2.0)]) == Costs(exchange_s=2.0)
