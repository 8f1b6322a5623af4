"""The engine `shuffle` where only its inside shows it; what all engines do is in `contract`."""

import keras
import numpy as np
import pytest
from keras_models import MODELS

from tfspark import MaxIteration, TFDataset, TFOptimizer
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
