"""Parameter groups: prefixes, exclusions, rates."""

import json

import keras
import pytest
from keras.optimizers import SGD, Adam, AdamW

from tfspark.errors import InvalidInputError
from tfspark.train.groups import parameter_groups
from tfspark.train.plateau import Plateau
from tfspark.train.schedules import EpochStep, Step

NAMES = ["dense/kernel", "dense/bias", "dense_1/kernel", "dense_1/bias", "scale"]


def numbers(groups, names=NAMES):
    return [groups.group_of(name) for name in names]


def test_one_optimizer_is_one_group():
    optimizer = Adam(1e-3)
    groups = parameter_groups(optimizer, NAMES)
    (group,) = groups.groups
    assert group.optimizer is optimizer and group.weight_decay
    assert numbers(groups) == [0] * 5
    assert groups.learning_rates(7) == (0.001,)
    assert isinstance(parameter_groups("sgd", NAMES).groups[0].optimizer, SGD)


def test_the_longest_prefix_wins():
    groups = parameter_groups({"": SGD(0.1), "dense": SGD(0.2), "dense_1/": SGD(0.0)}, NAMES)
    assert numbers(groups) == [1, 1, 2, 2, 0]
    assert groups.learning_rates(0) == (0.1, 0.2, 0.0)


def test_a_prefix_whose_weights_all_have_a_longer_one_makes_no_group():
    groups = parameter_groups({"a": SGD(0.1), "a/": SGD(0.2), "b": SGD(0.3)}, ["a/x", "b"])
    assert numbers(groups, ["a/x", "b"]) == [0, 1]
    assert groups.learning_rates(0) == (0.2, 0.3)


def test_exclusions_from_weight_decay_are_groups():
    optimizer = AdamW(0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    groups = parameter_groups({"dense": optimizer, "scale": SGD(0.2)}, NAMES)
    assert numbers(groups) == [0, 1, 0, 1, 2]
    assert [group.weight_decay for group in groups.groups] == [True, False, True]
    assert groups.groups[0].optimizer is groups.groups[1].optimizer is optimizer


def test_excluded_variables():
    variables = [keras.Variable(0.0, name="a"), keras.Variable(0.0, name="b")]
    optimizer = AdamW(0.1)
    optimizer.exclude_from_weight_decay(var_list=[variables[0]])
    groups = parameter_groups(optimizer, ["a", "b"], variables)
    assert numbers(groups, ["a", "b"]) == [1, 0]
    with pytest.raises(InvalidInputError, match="by name only"):
        parameter_groups(optimizer, ["a", "b"])


@pytest.mark.parametrize(
    ("optim_method", "message"),
    [
        ({"dense/": SGD(), "dense_1": SGD(), "scale": SGD(), "conv": SGD()}, r"\['conv'\]"),
        ({"dense/": SGD()}, r"none for \['dense_1/kernel', 'dense_1/bias', 'scale'\]"),
        ({}, "at least one"),
        ({3: SGD()}, r"keys \[3\]"),
        ({"": "no_rule"}, "'no_rule'"),
        (SGD, "Make an instance"),
    ],
)
def test_bad_divisions(optim_method, message):
    with pytest.raises(InvalidInputError, match=message):
        parameter_groups(optim_method, NAMES)


def test_schedules_step_epoch_and_score():
    groups = parameter_groups(
        {
            "dense/": SGD(Step(2, 0.5, learning_rate=1.0)),
            "dense_1/": SGD(EpochStep(1, 0.5, learning_rate=1.0)),
            "scale": SGD(Plateau("auc", 0.5, patience=0, mode="max", learning_rate=1.0)),
        },
        NAMES,
    )
    groups.bind(steps_per_epoch=3, batch_size=8)
    assert [groups.learning_rates(step) for step in (1, 2, 3)] == [
        (1.0, 1.0, 1.0),
        (0.5, 1.0, 1.0),
        (0.5, 0.5, 1.0),
    ]
    groups.observe({"auc": 0.9}, step=3)
    groups.observe({"auc": 0.8}, step=6)
    assert groups.learning_rates(0)[2] == 0.5
    saved = json.loads(json.dumps(groups.state()))
    again = parameter_groups({"": SGD(1.0), "scale": groups.groups[2].optimizer}, NAMES)
    with pytest.raises(InvalidInputError, match="3 states for 2 groups"):
        again.restore(saved)
    fresh = parameter_groups(groups.groups[2].optimizer, NAMES)
    fresh.restore({"plateaus": saved["plateaus"][2:]})
    assert fresh.learning_rates(0) == (0.5,)
    with pytest.raises(InvalidInputError, match="monitors 'auc'"):
        groups.observe({"loss": 0.8}, step=6)
