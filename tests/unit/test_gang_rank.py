"""How long a rank of a gang waits, and its steps with and without memory that all ranks share."""

import pytest
from gang_problem import STEPS, Problem, assert_same, needs_sharing

from tfspark.sync.engine import Halt, RankState
from tfspark.sync.gang_rank import Patience


def test_before_any_step_programs_are_compiled():
    assert Patience(first_s=600.0).limit_s(first=True) == 600.0
    assert Patience(first_s=600.0).limit_s(first=False) == 600.0


def test_a_slow_step_is_not_a_dead_peer():
    patience = Patience(least_s=30.0, multiple=20.0)
    patience.saw(0.01)
    assert patience.limit_s(first=False) == 30.0
    patience.saw(100.0)
    patience.saw(0.01)
    assert patience.limit_s(first=False) == 2000.0


def test_only_a_rank_that_is_new_compiles_in_a_later_round():
    patience = Patience(longest_s=2.0, first_s=600.0, least_s=30.0, multiple=20.0)
    assert patience.limit_s(first=True) == 600.0
    assert patience.limit_s(first=False) == 40.0
    assert Patience(longest_s=100.0).limit_s(first=True) == 2000.0


@needs_sharing
@pytest.mark.parametrize("wire_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_same_bits_with_and_without_common_memory(tmp_path, groups, wire_dtype):
    problem = Problem(tmp_path, groups, wire_dtype=wire_dtype)
    apart, together = problem.train(share=False), problem.train(share=True)
    assert_same(apart, together)
    assert [record.loss for record in together[0].records] == [
        record.loss for record in apart[0].records
    ]
    first = RankState.initial(problem.run, problem.flat, 0)
    assert (together[0].shard != first.shard).mean() > 0.9


@needs_sharing
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("bad_step", [1, 3, STEPS])
def test_what_one_owner_alone_sees_ends_the_round_of_all_before_it(tmp_path, bad_step, share):
    """Also in the last step of a round, after which no weights tell the others."""
    states = Problem(tmp_path, bad_step=bad_step).train(share)
    assert {state.halt for state in states} == {Halt("non_finite", bad_step, 0, "gradient")}
    assert {len(state.records) for state in states} == {bad_step - 1}
    if bad_step > 1:
        assert_same(states, Problem(tmp_path).train(share, steps=bad_step - 1))
    else:
        assert {state.step for state in states} == {0}


def test_what_one_owner_alone_sees_in_the_step_that_all_others_stop_at(tmp_path):
    states = Problem(tmp_path, bad_step=3).train(False, stop=lambda step, loss: step == 3)
    assert {state.halt for state in states} == {Halt("non_finite", 3, 0, "gradient")}
    assert {state.step for state in states} == {2}
    states = Problem(tmp_path).train(False, stop=lambda step, loss: step == 3)
    assert {(state.step, state.halt) for state in states} == {(3, Halt("stop", 3))}
