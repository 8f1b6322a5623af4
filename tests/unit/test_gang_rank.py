"""How long a rank of a gang waits; its steps are tested by the contract suite."""

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
