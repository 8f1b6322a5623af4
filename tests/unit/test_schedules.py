"""Schedules against formulas written out in plain Python, and in plain Keras."""

import math
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfspark.errors import InvalidInputError
from tfspark.train.plateau import Plateau, PlateauState
from tfspark.train.rates import bind, observe, rate_at
from tfspark.train.scaling import LinearScaling
from tfspark.train.schedules import EpochStep, MultiStep, Poly, Step, Warmup
from tfspark.train.sequence import SequentialSchedule

SCHEDULES = [
    (
        SequentialSchedule(learning_rate=0.5).add(Warmup(0.5), 1).add(Step(1, 0.1), 9),
        lambda n: 0.5 if n == 0 else 0.1 ** (n - 1),
    ),
    (Warmup(0.01, learning_rate=0.1), lambda n: 0.1 + 0.01 * n),
    (Warmup(0.01, 5, learning_rate=0.1), lambda n: 0.1 + 0.01 * min(n, 5)),
    (Warmup.to(1.0, 10), lambda n: min(n / 10, 1.0)),
    (Poly(2.0, 20, learning_rate=0.5), lambda n: 0.5 * (1 - n / 20) ** 2 if n <= 20 else 0),
    (Poly(0.5, 7, learning_rate=0.5), lambda n: 0.5 * math.sqrt(1 - n / 7) if n <= 7 else 0),
    (Poly(0, 7, learning_rate=0.5), lambda n: 0.5 if n <= 7 else 0),
    (Step(4, 0.5, learning_rate=0.3), lambda n: 0.3 * 0.5 ** (n // 4)),
    (MultiStep([3, 10], 0.1, learning_rate=0.3), lambda n: 0.3 * 0.1 ** ((n >= 3) + (n >= 10))),
    (
        EpochStep(2, 0.1, steps_per_epoch=4, learning_rate=0.3),
        lambda n: 0.3 * 0.1 ** (n // 4 // 2),
    ),
    (
        LinearScaling(0.1, 256, 2, batch_size=1024, steps_per_epoch=5),
        lambda n: 0.1 + 0.03 * min(n, 10),
    ),
    (
        LinearScaling(0.1, 64, 0.5, power=0.5, batch_size=256, steps_per_epoch=8),
        lambda n: [0.1, 0.125, 0.15, 0.175][n] if n < 4 else 0.2,
    ),
    (
        LinearScaling(
            0.1, 32, 1, batch_size=64, steps_per_epoch=4, then=EpochStep(2, 0.1, steps_per_epoch=4)
        ),
        lambda n: 0.1 + 0.025 * n if n < 4 else 0.2 * 0.1 ** (n // 8),
    ),
    (
        LinearScaling(0.1, 32, 1, batch_size=320, steps_per_epoch=4, then=Poly(2.0, 20)),
        lambda n: 0.1 + 0.225 * n if n < 4 else (1 - n / 20) ** 2 if n <= 20 else 0,
    ),
    (LinearScaling(0.1, 32, 3, batch_size=8, steps_per_epoch=4), lambda n: 0.025),
    (LinearScaling(0.1, 32, 0, batch_size=96, steps_per_epoch=4), lambda n: 0.3),
]


@pytest.mark.parametrize(("schedule", "formula"), SCHEDULES)
def test_formula(schedule, formula):
    for step in range(30):
        assert rate_at(schedule, step) == pytest.approx(formula(step), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(("schedule", "formula"), SCHEDULES)
def test_in_plain_keras(schedule, formula):
    """Three SGD steps in a graph, with a gradient of 1, subtract the sum of three rates."""
    variable = keras.Variable(0.0)
    optimizer = keras.optimizers.SGD(schedule)
    optimizer.build([variable])
    step = tf.function(lambda: optimizer.apply([tf.constant(1.0)], [variable]))
    for _ in range(3):
        step()
    assert float(variable) == pytest.approx(-sum(map(formula, range(3))), rel=1e-5)


@pytest.mark.parametrize(
    "schedule",
    [schedule for schedule, _ in SCHEDULES]
    + [
        EpochStep(2, 0.1, learning_rate=0.3),
        LinearScaling(0.1, 16, then=EpochStep(3, 0.5)),
        Plateau("loss", 0.5, 3, "max", 0.01, 2, 1e-5, learning_rate=1.0),
        SequentialSchedule(10, learning_rate=0.1)
        .add(Warmup(0.01), 5)
        .add(keras.optimizers.schedules.CosineDecay(0.1, 50), 50)
        .add(EpochStep(1, 0.5), 9),
    ],
)
def test_config_round_trip(schedule):
    serialize, deserialize = (
        keras.optimizers.schedules.serialize,
        keras.optimizers.schedules.deserialize,
    )
    again = deserialize(serialize(schedule))
    assert type(again) is type(schedule)
    assert again.get_config() == schedule.get_config()


def test_a_sequence_counts_each_part_from_its_start_and_carries_the_rate():
    schedule = (
        SequentialSchedule(learning_rate=0.1)
        .add(Warmup(0.1), 9)
        .add(Step(10, 0.5), 20)
        .add(MultiStep([5], 0.1, learning_rate=3.0), 100)
    )

    def by_hand(step):
        if step < 9:
            return 0.1 + 0.1 * step
        if step < 29:
            return 1.0 * 0.5 ** ((step - 9) // 10)
        return 3.0 * (0.1 if step - 29 >= 5 else 1.0)

    for step in (*range(40), 1000):
        assert rate_at(schedule, step) == pytest.approx(by_hand(step), rel=1e-5)


def test_poly_in_a_sequence_counts_from_the_start_of_the_training():
    schedule = SequentialSchedule(learning_rate=0.0).add(Warmup(0.1), 10).add(Poly(1, 100), 100)
    assert rate_at(schedule, 10) == pytest.approx(1.0 * 0.9, rel=1e-5)
    assert rate_at(schedule, 100) == 0


def test_a_sequence_of_keras_schedules():
    cosine = keras.optimizers.schedules.CosineDecay(0.5, 20)
    schedule = SequentialSchedule().add(Warmup.to(0.5, 5), 5).add(cosine, 20)
    for step in range(5, 25):
        assert rate_at(schedule, step) == pytest.approx(float(cosine(step - 5)), rel=1e-6)


def test_a_sequence_in_a_sequence():
    inner = SequentialSchedule().add(Step(2, 0.5, learning_rate=1.0), 4).add(Warmup(1.0), 4)
    schedule = SequentialSchedule().add(Warmup.to(1.0, 3), 3).add(inner, 8)
    rates = [rate_at(schedule, step) for step in range(10)]
    expected = [0, 1 / 3, 2 / 3, 1, 1, 0.5, 0.5, 0.25, 1.25, 2.25]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_epochs_are_bound_when_their_length_is_known():
    schedule = EpochStep(1, 0.5, learning_rate=1.0)
    with pytest.raises(InvalidInputError, match="steps_per_epoch"):
        rate_at(schedule, 0)
    bound = bind(schedule, 3, 8)
    assert [rate_at(bound, step) for step in range(7)] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25]
    assert schedule.steps_per_epoch is None
    assert bind(EpochStep(1, 0.5, steps_per_epoch=2), 3, 8).steps_per_epoch == 2
    sequence = SequentialSchedule(learning_rate=1.0).add(Warmup(1.0), 2).add(schedule, 9)
    assert [rate_at(bind(sequence, 3, 8), step) for step in (1, 2, 4, 5)] == [2, 1, 1, 0.5]
    assert bind(0.1, 3, 8) == 0.1


def test_scaling_is_bound_when_batches_are_known():
    schedule = LinearScaling(0.1, 16, warmup_epochs=2, then=EpochStep(3, 0.5))
    with pytest.raises(InvalidInputError, match=r"batch_size=None, .*bind\(steps_per_epoch"):
        rate_at(schedule, 0)
    bound = bind(schedule, 2, 64)
    expected = [0.1, 0.175, 0.25, 0.325, 0.4, 0.4, 0.2]
    np.testing.assert_allclose([rate_at(bound, n) for n in range(7)], expected, rtol=1e-6)
    assert schedule.batch_size is schedule.then.steps_per_epoch is None
    told = bind(LinearScaling(0.1, 16, batch_size=32, steps_per_epoch=9), 2, 64)
    assert (told.batch_size, told.steps_per_epoch) == (32, 9)


def test_scaling_in_a_sequence():
    scaling = LinearScaling(0.1, 16, warmup_epochs=2)
    for parts in (
        SequentialSchedule().add(scaling, 4).add(Step(2, 0.5), 9),
        SequentialSchedule(2).add(scaling, 4).add(Step(2, 0.5), 9),
    ):
        bound = bind(parts, 2, 64)
        expected = [0.1, 0.175, 0.25, 0.325, 0.4, 0.4, 0.2]
        np.testing.assert_allclose([rate_at(bound, n) for n in range(7)], expected, rtol=1e-6)
    plateau = SequentialSchedule().add(scaling, 4).add(Plateau("loss", 0.5), 9)
    assert rate_at(bind(plateau, 2, 64), 4, PlateauState(scale=0.5)) == pytest.approx(0.2)


def bigdl_plateau(scores, factor, patience, mode, epsilon, cooldown, min_lr, rate):
    """The rates after each score, in the words of an imperative counter machine."""
    best = math.inf if mode == "min" else -math.inf
    cooling = waiting = 0
    for score in scores:
        better = score < best - epsilon if mode == "min" else score > best + epsilon
        if cooling > 0:
            cooling, waiting = cooling - 1, 0
        if better:
            best, waiting = score, 0
        elif cooling <= 0:
            if waiting >= patience:
                rate, cooling, waiting = max(rate * factor, min_lr), cooldown, 0
            waiting += 1
        yield rate


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("patience", [0, 1, 3])
@pytest.mark.parametrize("cooldown", [0, 2])
def test_plateau_against_a_counter_machine(mode, patience, cooldown):
    scores = np.random.default_rng(patience).integers(0, 5, 60) / 10
    args = (0.5, patience, mode, 0.05, cooldown, 0.01)
    plateau = Plateau("score", *args, learning_rate=1.0)
    state = plateau.initial_state()
    rates = []
    for score in scores:
        state = plateau.observe(state, float(score))
        state = PlateauState(**state.to_dict())
        rates.append(rate_at(plateau, 0, state))
    assert rates[-1] < 1
    np.testing.assert_allclose(rates, list(bigdl_plateau(scores, *args, 1.0)), rtol=1e-6)


def test_plateau_reduces_on_the_score_after_its_patience():
    plateau = Plateau("loss", 0.1, patience=2, learning_rate=1.0)
    state, rates = plateau.initial_state(), []
    for score in (3.0, 3.0, 3.0, math.nan, 2.0):
        state = plateau.observe(state, score)
        rates.append(rate_at(plateau, 0, state))
    np.testing.assert_allclose(rates, [1, 1, 1, 0.1, 0.1], rtol=1e-6)


def test_plateau_after_a_warmup():
    plateau = Plateau("loss", 0.1, patience=0)
    schedule = SequentialSchedule(learning_rate=0.0).add(Warmup(0.1), 10).add(plateau, 1)
    state = PlateauState()
    for step in (3, 6):
        state = observe(schedule, state, {"loss": 1.0}, step)
    assert state == PlateauState()
    assert rate_at(schedule, 12, state) == pytest.approx(1.0)
    for step in (10, 12):
        state = observe(schedule, state, {"loss": 1.0}, step)
    assert rate_at(schedule, 5, state) == pytest.approx(0.5)
    assert rate_at(schedule, 12, state) == pytest.approx(0.1)
    with pytest.raises(InvalidInputError, match=r"monitors 'loss'.*\['auc'\]"):
        observe(schedule, state, {"auc": 1.0}, 14)
    with pytest.raises(InvalidInputError, match="last part"):
        schedule.add(Step(1, 0.1), 3)


def test_plateau_says_what_plain_keras_lacks():
    with pytest.raises(InvalidInputError, match="ReduceLROnPlateau"):
        Plateau("loss", learning_rate=0.1)(3)
    # But it can be compiled into a model, which is then trained by tfspark.
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(Plateau("loss", learning_rate=0.1)), "mse")


def test_numbers_and_functions_are_rates():
    assert rate_at(0.25, 7) == 0.25
    assert rate_at(lambda: 0.5, 7) == 0.5
    with pytest.raises(InvalidInputError, match=r"Received: nan .* at step 7"):
        rate_at(lambda: math.nan, 7)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Step(0, 0.1),
        lambda: MultiStep([], 0.1),
        lambda: MultiStep([5, 3], 0.1),
        lambda: Poly(1, 0),
        lambda: Warmup(0.1, 0),
        lambda: EpochStep(0, 0.1),
        lambda: Plateau("loss", factor=1.0),
        lambda: Plateau("loss", mode="auto"),
        lambda: Step(1, 0.1, learning_rate=-1.0),
        lambda: LinearScaling(0.1, 0),
        lambda: LinearScaling(0.1, warmup_epochs=-1),
        lambda: LinearScaling(0.1, power=2.0),
        lambda: LinearScaling(0.1, batch_size=0),
        lambda: LinearScaling(0.1, then=Step(1, 0.1, learning_rate=1.0)),
        lambda: LinearScaling(0.1, then=keras.optimizers.schedules.CosineDecay(0.1, 50)),
        lambda: LinearScaling(0.1, then=Plateau("loss")),
        lambda: LinearScaling(0.1, then=SequentialSchedule().add(Step(1, 0.1), 1)),
        lambda: SequentialSchedule().add(0.1, 3),
        lambda: SequentialSchedule().add(Step(1, 0.1), 0),
        lambda: rate_at(SequentialSchedule(), 0),
        lambda: rate_at(SequentialSchedule().add(Step(1, 0.1), 1), 0),
        lambda: rate_at(Step(1, 0.1), 0),
        lambda: rate_at(Plateau("loss"), 0),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(InvalidInputError, match="Received: "):
        make()


def test_rates_where_eager_mode_is_off():
    script = (
        "import tensorflow as tf, keras\n"
        "tf.compat.v1.disable_v2_behavior()\n"
        "from tfspark.train.rates import rate_at\n"
        "from tfspark.train.schedules import Step\n"
        "print(rate_at(Step(2, 0.5, learning_rate=1.0), 3),"
        " rate_at(keras.optimizers.schedules.ExponentialDecay(1.0, 1, 0.5), 3))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["0.5", "0.125"]
