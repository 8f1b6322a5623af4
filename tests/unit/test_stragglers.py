"""Who is left out of a step, decided on paper."""

import math

import pytest

from tfspark import LeaveOut
from tfspark.errors import InvalidInputError
from tfspark.sync.stragglers import LEAST_GAIN_S, Watch

ROWS = (2, 2, 2, 2)
LATE = None


def watch(*steps, rows=ROWS, **rule):
    """After steps of which all ranks said this."""
    watched = Watch(LeaveOut(**rule), len(rows))
    for said in steps:
        watched.add(said, rows)
    return watched


def test_nobody_is_late_before_anything_is_known():
    assert watch().limit_s == math.inf


def test_the_limit_is_a_multiple_of_what_is_typical():
    # The lower medians over ranks are 2, 9 and 3, and that of those is 3.
    steps = [(1, 2, 2, 50), (9, 9, 9, 9), (3, 3, 3, 3)]
    assert watch(*steps, factor=1.5).limit_s == 4.5
    assert watch(*steps, factor=2.0).limit_s == 6.0


def test_of_two_ranks_the_fast_one_is_typical():
    assert watch((1.0, 9.0), rows=(2, 2), factor=2.0).limit_s == 2.0
    assert watch((9.0, 1.0), rows=(2, 2), factor=2.0).limit_s == 2.0


def test_ranks_without_rows_or_in_no_sum_have_no_time():
    assert watch((0.0, 4.0, 0.0, LATE), rows=(0, 2, 0, 2), factor=2.0).limit_s == 8.0


def test_old_steps_are_forgotten():
    slow, fast = (8.0,) * 4, (1.0,) * 4
    assert watch(*[slow] * 30, *[fast] * 9, factor=2.0).limit_s == 16.0
    assert watch(*[slow] * 30, *[fast] * 20, factor=2.0).limit_s == 2.0


def test_milliseconds_are_not_worth_a_rank():
    assert watch((0.001,) * 4, factor=1.5).limit_s == pytest.approx(0.001 + LEAST_GAIN_S)


def test_who_is_late_is_left_out():
    assert watch().left_out((1.0, LATE, 1.0, 1.0), ROWS) == {1}
    assert watch().left_out((1.0, 1.0, 1.0, 1.0), ROWS) == frozenset()


def test_no_more_than_most_ranks():
    two_late = (1.0, LATE, 1.0, LATE)
    assert watch(most_ranks=1).left_out(two_late, ROWS) is None
    assert watch(most_ranks=2).left_out(two_late, ROWS) == {1, 3}


def test_no_rank_more_often_in_a_row_than_allowed():
    without = (1.0, LATE, 1.0, 1.0)
    assert watch(without, in_a_row=2).left_out(without, ROWS) == {1}
    assert watch(without, without, in_a_row=2).left_out(without, ROWS) is None
    # Another one may be late then, and all wait for the one that must not.
    late = watch(without, without, in_a_row=2, most_ranks=2)
    assert late.left_out((LATE, LATE, 1.0, 1.0), ROWS) is None
    assert late.left_out((LATE, 1.0, 1.0, 1.0), ROWS) == {0}
    back = watch(without, without, (1.0,) * 4, in_a_row=2)
    assert back.left_out(without, ROWS) == {1}


def test_a_step_without_rows_of_a_rank_does_not_count_for_it():
    watched = watch((1.0, LATE), rows=(2, 2), in_a_row=1)
    watched.add((1.0, 0.0), (2, 0))
    assert watched.left_out((1.0, LATE), (2, 2)) is None


def test_some_rows_remain():
    assert watch().left_out((LATE, 0.0, 0.0, 0.0), (2, 0, 0, 0)) is None
    assert watch().left_out((LATE, 0.0, 0.0, 1.0), (2, 0, 0, 1)) == {0}


@pytest.mark.parametrize(
    "argument, value",
    [("most_ranks", 0), ("most_ranks", 1.0), ("in_a_row", 0), ("in_a_row", True)]
    + [("factor", value) for value in (0.9, math.inf, math.nan, "2")],
)
def test_a_rule_that_cannot_be(argument, value):
    with pytest.raises(InvalidInputError, match=rf"{argument} is a .*Received: {value!r}"):
        LeaveOut(**{argument: value})
