"""A gang that loses slots, on an embedded Spark that is told of fewer than it has."""

import os

import keras
import numpy as np
import pytest
from training import assert_same_bits, classified, differ

from tfspark import FailurePolicy, LeaveOut, MaxIteration, SeveralIteration, TFDataset, TFOptimizer
from tfspark.errors import (
    ClusterError,
    CommitLostError,
    InvalidInputError,
    UserFunctionError,
)
from tfspark.train.triggers import Trigger

AT_ONCE = {"wait_for_slots_s": 0.0, "longest_pause_s": 0.0}


@pytest.fixture
def slots(monkeypatch):
    """Tells engines how many slots there are."""

    def there(number):
        for module in ("tfspark.sync.jobs", "tfspark.train.training"):
            monkeypatch.setattr(f"{module}.registered_slots", lambda context: number)

    return there


def training(**settings):
    keras.utils.set_random_seed(5)
    dense = keras.layers.Dense
    layers = [keras.Input((6,)), dense(11, "relu", name="hidden"), dense(3, name="out")]
    model = keras.Sequential(layers, name="model")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    dataset = TFDataset.from_ndarrays(classified(60), batch_size=8, seed=3)
    settings = {"engine": "gang", "num_ranks": 3, "progress": False, **settings}
    return model, TFOptimizer.from_keras(model, dataset, **settings)


def ranks(optimizer):
    return optimizer._training.loop.run.num_ranks


def undisturbed(steps, **settings):
    model, optimizer = training(**settings)
    optimizer.optimize(MaxIteration(steps))
    optimizer.close()
    return model.get_weights()


@pytest.mark.parametrize("settings", [{}, {"clip_norm": 0.1}, {"gradient_buckets": 2}])
def test_ranks_take_turns_to_the_same_bits(sc, slots, caplog, settings):
    model, optimizer = training(failure_policy=FailurePolicy(**AT_ONCE), **settings)
    optimizer.optimize(MaxIteration(3))
    slots(2)
    optimizer.optimize(MaxIteration(45))  # more steps than a job in stages may have
    assert ranks(optimizer) == 3
    assert [r.getMessage()[:19] for r in caplog.records] == ["Rounds run in stage"]
    slots(3)
    optimizer.optimize(MaxIteration(50))
    assert "Rounds run as a gang again" in caplog.records[-1].getMessage()
    optimizer.close()
    assert_same_bits(model.get_weights(), undisturbed(50, **settings))


def test_what_needs_all_ranks_at_once_waits_and_says_so(sc, slots):
    for settings in ({"average_every": 4}, {"leave_out": LeaveOut()}):
        model, optimizer = training(failure_policy=FailurePolicy(**AT_ONCE), **settings)
        optimizer.optimize(MaxIteration(4))
        kept = model.get_weights()
        slots(2)
        with pytest.raises(ClusterError, match=r"all ranks run at the same time.*3 ranks"):
            optimizer.optimize(MaxIteration(12))
        assert_same_bits(model.get_weights(), kept)
        slots(4)
        optimizer.optimize(MaxIteration(12))
        optimizer.close()


def test_fewer_ranks_go_on_and_all_come_back(sc, slots, tmp_path, caplog):
    policy = FailurePolicy(lost_slots="fewer_ranks", **AT_ONCE)
    model, optimizer = training(failure_policy=policy, model_dir=str(tmp_path))
    every = SeveralIteration(5)
    optimizer.optimize(MaxIteration(6), every)
    slots(2)
    optimizer.optimize(MaxIteration(12), every)
    assert (ranks(optimizer), optimizer.step) == (2, 12)
    slots(3)
    optimizer.optimize(MaxIteration(22), every)
    assert (ranks(optimizer), optimizer.step) == (3, 22)
    optimizer.close()
    said = [record.getMessage() for record in caplog.records]
    assert [line[:24] for line in said] == ["Going on with 2 ranks, b", "Going on with 3 ranks, b"]
    # Other rows in a batch, but as many of them: it learns as it would have.
    theirs = undisturbed(22)
    assert differ(model.get_weights(), theirs)
    for one, other in zip(model.get_weights(), theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=0.1)


def test_ranks_are_taken_in_as_slots_come(sc, slots, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("tfspark.train.training.slots", lambda context: 2)
    policy = FailurePolicy(lost_slots="fewer_ranks", **AT_ONCE)
    model, optimizer = training(failure_policy=policy, model_dir=str(tmp_path))
    slots(2)
    every = SeveralIteration(5)
    optimizer.optimize(MaxIteration(6), every)
    assert (ranks(optimizer), optimizer.step) == (2, 6)
    assert caplog.records[0].getMessage().startswith("Starting with 2 of 3 ranks")
    slots(3)
    optimizer.optimize(MaxIteration(22), every)
    assert (ranks(optimizer), optimizer.step) == (3, 22)
    assert caplog.records[-1].getMessage().startswith("Going on with 3 ranks")
    optimizer.close()
    # Other rows in a batch, but as many of them: it learns as it would have.
    for one, other in zip(model.get_weights(), undisturbed(22), strict=True):
        np.testing.assert_allclose(one, other, atol=0.25)


def test_fewer_ranks_need_a_place_for_a_checkpoint(sc):
    with pytest.raises(InvalidInputError, match="without model_dir"):
        training(failure_policy=FailurePolicy(lost_slots="fewer_ranks"))


def sulky(path, removes):
    """A trigger that raises on an executor where the file is, and removes it if it is told to.

    Its class is nested, so that it travels by value. Its error is full of words of Spark, as the
    lines of an executor's log are: nobody may read an error's kind from them.
    """
    driver = os.getpid()
    words = "ExecutorLostFailure Checkpoint block not found " + " ".join(
        f"rdd_{number}_0" for number in range(5000)
    )

    class Sulky(Trigger):
        def __call__(self, progress):
            if progress.step >= 8 and os.getpid() != driver and os.path.exists(path):
                if removes:
                    os.unlink(path)
                raise KeyError(f"of the user {words}")
            return False

    return Sulky()


@pytest.mark.parametrize("retries", [0, 1])
def test_an_error_of_the_user_is_retried_as_often_as_allowed(sc, tmp_path, caplog, retries):
    path = tmp_path / "sulk"
    path.touch()
    policy = FailurePolicy(user_retries=retries, **AT_ONCE)
    model, optimizer = training(failure_policy=policy)
    end = MaxIteration(20) | sulky(str(path), retries > 0)
    if retries:
        optimizer.optimize(end)
        assert_same_bits(model.get_weights(), undisturbed(20))
        assert "RETRY (user; 1 of 5" in caplog.records[-1].getMessage()
    else:
        with pytest.raises(UserFunctionError, match=r"(?s)rank .*KeyError: 'of the user"):
            optimizer.optimize(end)
        assert "RAISE (user; 0 of 5" in caplog.records[-1].getMessage()
    optimizer.close()


def test_a_lost_commit_goes_on_from_the_newest_checkpoint(sc, tmp_path, caplog):
    model, optimizer = training(model_dir=str(tmp_path), failure_policy=FailurePolicy(**AT_ONCE))
    every = SeveralIteration(5)
    optimizer.optimize(MaxIteration(5), every)
    optimizer._training.loop.commit.computed.unpersist(blocking=True)
    optimizer.optimize(MaxIteration(20), every)
    assert "CommitLostError" in caplog.records[0].getMessage()
    optimizer.close()
    assert_same_bits(model.get_weights(), undisturbed(20))

    alone, optimizer = training(failure_policy=FailurePolicy(**AT_ONCE))
    optimizer.optimize(MaxIteration(5))
    optimizer._training.loop.commit.computed.unpersist(blocking=True)
    with pytest.raises(CommitLostError, match="model_dir"):
        optimizer.optimize(MaxIteration(20))
    optimizer.close()
    assert_same_bits(alone.get_weights(), undisturbed(5))
