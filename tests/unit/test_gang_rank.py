"""How long a rank of a gang waits; its steps are tested by the contract suite."""

from tfspark.sync.gang_rank import Patience


def test_before_the_first_step_programs_are_compiled():
    assert Patience(first_s=600.0).limit_s == 600.0


def test_a_slow_step_is_not_a_dead_peer():
    patience = Patience(least_s=30.0, multiple=20.0)
    patience.saw(0.01)
    assert patience.limit_s == 30.0
    patience.saw(100.0)
    patience.saw(0.01)
    assert patience.limit_s == 2000.0
