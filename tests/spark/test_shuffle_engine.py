"""The engine `shuffle` where only its inside shows it; what all engines do is in `contract`."""

import os
from contextlib import contextmanager
from functools import partial

import keras
import numpy as np
import pytest
from keras_models import MODELS

from tfspark import MaxIteration, TFDataset, TFOptimizer
from tfspark.sync.carriers import FileCarrier, through_files, through_spark
from tfspark.sync.engine import RoundPlan


@pytest.fixture
def loop(sc):
    """A training after two steps on two ranks."""
    model, loss = MODELS["dense"][0]()
    dataset = TFDataset.from_ndarrays(MODELS["dense"][1](20, 0), batch_size=4)
    training = TFOptimizer.from_keras(
        model, dataset, loss=loss, optimizer=keras.optimizers.SGD(0.1), engine="shuffle",
        num_ranks=2, progress=False,
    )  # fmt: skip
    training.optimize(MaxIteration(2))
    yield training._training.loop
    training.close()


def test_a_commit_holds_what_its_tasks_said(loop):
    """A task that finds its block on another executor has nothing to compute, and says nothing."""
    engine = loop.engine
    result = engine.round(loop.commit, RoundPlan(2, ((0.1,),) * 3))
    told = engine._told(result.commit)
    assert [step for step, _, _ in told] == [5, 5]
    assert told[0][2] == result.records
    engine._news.value = {1: told[1]}
    assert engine._told(result.commit) == told


def test_what_a_round_costs_however_long_it_is(loop):
    """Where a step computes next to nothing, a round of one is mostly fixed cost."""
    one, five = (
        loop.engine.round(loop.commit, RoundPlan(2, ((0.1,),) * steps)) for steps in (1, 5)
    )
    assert 0.3 * one.seconds < one.fixed_s < one.seconds
    assert 0 < five.fixed_s < 0.5 * five.seconds


def test_a_round_that_fails_leaves_the_former_commit(sc, loop):
    def stop(step, loss):
        raise KeyError("of the user")

    persisted = sc._jsc.getPersistentRDDs().size()
    with pytest.raises(RuntimeError, match="of the user"):
        loop.engine.round(loop.commit, RoundPlan(2, ((0.1,),), stop))
    assert sc._jsc.getPersistentRDDs().size() <= persisted
    result = loop.engine.round(loop.commit, RoundPlan(2, ((0.1,),)))
    assert [record.step for record in result.records] == [3]
    assert np.isfinite(result.records[0].loss)


@pytest.mark.parametrize("clip", [{}, {"clipnorm": 0.05}], ids=["plain", "norms"])
def test_files_carry_the_same_bits_as_spark(sc, tmp_path, clip):
    model, loss = MODELS["dense"][0]()
    training = TFOptimizer.from_keras(
        model, TFDataset.from_ndarrays(MODELS["dense"][1](20, 0), batch_size=4), loss=loss,
        optimizer=keras.optimizers.Adam(0.01, **clip), engine="shuffle", num_ranks=2,
        progress=False,
    )  # fmt: skip
    training.optimize(MaxIteration(2))
    engine, commit = training._training.loop.engine, training._training.loop.commit
    left = []

    def bits_of(run, state):
        slots = [slot for group in state.slots for slot in group]
        return [array.tobytes() for array in (state.shard, state.mean, *slots)]

    @contextmanager
    def files():
        with through_files(str(tmp_path)) as carrier:
            yield FileCarrier(carrier.folder, least_bytes=0)
            left.append(sorted(os.listdir(carrier.folder)))

    bits = []
    for carriers in (through_spark, files):
        engine._carriers = carriers
        # The commit stays good until the next round says which one the caller has.
        result = engine.round(commit, RoundPlan(2, ((0.01,),) * 5))
        states = engine.map_states(result.commit, bits_of)
        bits.append((states, [record.loss for record in result.records]))
    assert bits[0] == bits[1]
    # Files of steps that all ranks have finished are gone, and at the end of a round all but the
    # commit's, which lives until another one is good.
    assert left == [["5-0", "5-1", "6-0", "6-1"]]
    (folder,) = tmp_path.iterdir()
    assert sorted(os.listdir(folder)) == ["7-0", "7-1"]
    training.close()
    assert list(tmp_path.iterdir()) == []


def test_on_one_host_large_messages_are_files(sc, loop):
    carriers = loop.engine._carriers
    assert isinstance(carriers, partial) and carriers.func is through_files
    with carriers() as carrier:
        assert os.path.isdir(carrier.folder)
    assert not os.path.exists(carrier.folder)
