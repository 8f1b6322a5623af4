from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfspark.errors import InvalidInputError
from tfspark.train.triggers import (
    EveryEpoch,
    MaxEpoch,
    MaxIteration,
    MaxScore,
    MinLoss,
    Progress,
    SeveralIteration,
    Trigger,
    TriggerAnd,
    TriggerOr,
    check_trigger,
)

counts = st.integers(1, 12)
numbers = st.floats(0, 1)
simple = st.one_of(
    st.builds(MaxEpoch, counts),
    st.builds(MaxIteration, counts),
    st.just(EveryEpoch()),
    st.builds(SeveralIteration, counts),
    st.builds(MaxScore, numbers),
    st.builds(MinLoss, numbers),
)
triggers = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda some: TriggerAnd(*some)),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: TriggerOr(*some)),
    ),
    max_leaves=5,
)


@st.composite
def runs(draw) -> list[Progress]:
    """The progress before the first step and after each, with any losses and scores."""
    steps_per_epoch = draw(counts)
    run = [Progress(steps_per_epoch=steps_per_epoch)]
    for step in range(1, draw(st.integers(1, 40)) + 1):
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        run.append(
            Progress(
                step=step,
                epoch=epoch,
                step_in_epoch=step_in_epoch,
                steps_per_epoch=steps_per_epoch,
                rows=8 * step,
                loss=draw(numbers),
                score=draw(st.none() | numbers),
            )
        )
    return run


def steps_at_which(trigger: Trigger, steps: int, steps_per_epoch: int) -> list[int]:
    return [
        step
        for step in range(steps + 1)
        if trigger(Progress(step, *divmod(step, steps_per_epoch), steps_per_epoch))
    ]


class TestFiring:
    def test_max_epoch(self):
        assert steps_at_which(MaxEpoch(2), 12, steps_per_epoch=5) == [10, 11, 12]

    def test_max_iteration(self):
        assert steps_at_which(MaxIteration(3), 5, steps_per_epoch=2) == [3, 4, 5]

    def test_every_epoch(self):
        assert steps_at_which(EveryEpoch(), 12, steps_per_epoch=5) == [5, 10]
        assert steps_at_which(EveryEpoch(), 3, steps_per_epoch=1) == [1, 2, 3]

    def test_several_iteration(self):
        assert steps_at_which(SeveralIteration(4), 12, steps_per_epoch=5) == [4, 8, 12]

    def test_scores_and_losses(self):
        assert MaxScore(0.9)(Progress(score=0.91))
        assert not MaxScore(0.9)(Progress(score=0.9))
        assert not MaxScore(-1)(Progress())
        assert MinLoss(0.1)(Progress(loss=0.09))
        assert not MinLoss(0.1)(Progress(loss=0.1))
        assert not MinLoss(0.1)(Progress(loss=float("nan")))
        assert not MinLoss(1)(Progress())

    def test_combinations(self):
        both, either = SeveralIteration(2) & SeveralIteration(3), EveryEpoch() | MaxIteration(7)
        assert steps_at_which(both, 12, steps_per_epoch=100) == [6, 12]
        assert steps_at_which(either, 8, steps_per_epoch=5) == [5, 7, 8]
        assert both == TriggerAnd(SeveralIteration(2), SeveralIteration(3))
        assert either == TriggerOr(EveryEpoch(), MaxIteration(7))


class TestHorizon:
    @given(triggers, runs())
    def test_it_never_passes_over_a_firing(self, trigger, run):
        for now, progress in enumerate(run):
            horizon = trigger.horizon(progress)
            assert horizon >= 1
            assert not any(trigger(later) for later in run[now + 1 : now + horizon])

    @given(triggers, runs())
    def test_rounds_of_it_fire_at_the_same_steps_as_single_steps(self, trigger, run):
        expected = [progress.step for progress in run[1:] if trigger(progress)]
        found, now = [], 0
        while (now := now + trigger.horizon(run[now])) < len(run):
            if trigger(run[now]):
                found.append(now)
        assert found == expected

    @given(st.one_of(st.builds(MaxEpoch, counts), st.builds(MaxIteration, counts)), runs())
    def test_it_is_exact_for_what_stops_by_count(self, trigger, run):
        first = next((progress.step for progress in run if trigger(progress)), None)
        for progress in run:
            if first is not None and progress.step < first:
                assert trigger.horizon(progress) == first - progress.step

    @given(st.one_of(st.just(EveryEpoch()), st.builds(SeveralIteration, counts)), runs())
    def test_it_is_exact_for_what_recurs(self, trigger, run):
        for now, progress in enumerate(run):
            after = now + trigger.horizon(progress)
            assert after >= len(run) or trigger(run[after])

    def test_unpredictable_triggers_want_to_be_asked_each_step(self):
        assert MinLoss(0.1).horizon(Progress()) == MaxScore(0.1).horizon(Progress()) == 1


class TestValue:
    @given(triggers)
    def test_it_pickles_compares_and_prints(self, trigger):
        copy = pickle.loads(pickle.dumps(trigger))
        assert copy == trigger
        assert hash(copy) == hash(trigger)
        assert eval(repr(trigger)) == trigger

    def test_different_triggers_differ(self):
        assert MaxEpoch(1) != MaxEpoch(2)
        assert MaxEpoch(1) != MaxIteration(1)
        assert TriggerAnd(EveryEpoch()) != TriggerOr(EveryEpoch())


class TestWrongArguments:
    @pytest.mark.parametrize("trigger", [MaxEpoch, MaxIteration, SeveralIteration])
    @pytest.mark.parametrize("count", [0, -1, 1.5, 2.0, True, "3", None])
    def test_counts(self, trigger, count):
        with pytest.raises(InvalidInputError, match=rf"{trigger.__name__}'s .* Received: "):
            trigger(count)

    @pytest.mark.parametrize("trigger", [MaxScore, MinLoss])
    @pytest.mark.parametrize("number", ["0.5", None, float("nan"), True])
    def test_numbers(self, trigger, number):
        with pytest.raises(InvalidInputError, match="is a number"):
            trigger(number)

    @pytest.mark.parametrize("number", [1, 0.5, np.float32(0.5), -2])
    def test_any_real_number_is_a_threshold(self, number):
        assert MaxScore(number)(Progress(score=2.0))

    @pytest.mark.parametrize("combination", [TriggerAnd, TriggerOr])
    def test_combinations(self, combination):
        with pytest.raises(InvalidInputError, match="at least one trigger"):
            combination()
        with pytest.raises(InvalidInputError, match=r"Received: 3\."):
            combination(EveryEpoch(), 3)
        with pytest.raises(InvalidInputError, match="trigger"):
            EveryEpoch() & 3

    def test_a_class_instead_of_an_instance(self):
        with pytest.raises(InvalidInputError, match=r"end_trigger is .* the class EveryEpoch"):
            check_trigger(EveryEpoch, "end_trigger")
        assert check_trigger(EveryEpoch(), "end_trigger") == EveryEpoch()

    def test_a_trigger_without_a_condition(self):
        with pytest.raises(NotImplementedError, match="Trigger does not define"):
            Trigger()(Progress())

    @pytest.mark.parametrize(
        "counts", [{"step": -1}, {"step_in_epoch": 5, "steps_per_epoch": 5}, {"rows": -1}]
    )
    def test_progress(self, counts):
        with pytest.raises(InvalidInputError, match="Progress counts from 0"):
            Progress(**counts)
