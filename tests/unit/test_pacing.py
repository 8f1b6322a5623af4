import pytest

from tfspark.train.pacing import Pacing


@pytest.mark.parametrize(
    ("horizons", "seconds_per_step", "steps"),
    [
        ([100, 50], None, 1),  # nothing measured yet: one step
        ([100, 50], 0.25, 8),  # two seconds
        ([100, 3], 0.25, 3),  # a trigger may fire after three
        ([100], 1e-6, 32),  # never more than one lineage should hold
        ([100], 60.0, 1),  # never less than one
        ([], 0.5, 4),
        ([100], 0.0, 32),
    ],
)
def test_steps(horizons, seconds_per_step, steps):
    assert Pacing(target_s=2.0, most_steps=32).steps(horizons, seconds_per_step) == steps


@pytest.mark.parametrize(
    ("step", "horizons", "seconds_per_step", "steps"),
    [
        (0, [], None, 10),  # also the first round
        (3, [], None, 7),
        (0, [], 0.08, 20),  # affordable are 25
        (8, [], 0.08, 22),
        (8, [100], 5.0, 2),  # none is, but a round ends no earlier
        (8, [15], 0.08, 15),  # a trigger may fire there
        (8, [1], None, 1),
    ],
)
def test_rounds_of_local_steps_end_at_averages(step, horizons, seconds_per_step, steps):
    pacing = Pacing(average_every=10)
    assert pacing.steps(horizons, seconds_per_step, step=step) == steps


@pytest.mark.parametrize(
    ("fixed_s", "steps"),
    [
        (0.01, 4),  # two seconds hide it
        (0.15, 30),  # fifteen seconds, of which it is one percent
        (5.0, 60),  # but never more than half a minute is at stake
    ],
)
def test_a_fixed_cost_lengthens_rounds(fixed_s, steps):
    assert Pacing().steps([10**6], 0.5, fixed_s) == steps
