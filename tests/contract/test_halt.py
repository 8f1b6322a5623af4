"""A loss that is not finite, wherever in a round it comes."""

import keras
import numpy as np
import pytest

from tfspark import MaxIteration, TFDataset, TFOptimizer
from tfspark.errors import NonFiniteError

ROWS, BATCH = 12, 4


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "two kinds of sums": lambda: keras.optimizers.Lamb(0.1, clipnorm=0.5),
}


def model(optimizer):
    keras.utils.set_random_seed(1)
    dense = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    dense.compile(OPTIMIZERS[optimizer](), "mse")
    return dense


def dataset(bad_row=None):
    x = np.random.default_rng(0).normal(size=(ROWS, 2)).astype("float32")
    y = x.sum(axis=1, keepdims=True)
    if bad_row is not None:
        y[bad_row] = np.nan
    return TFDataset.from_ndarrays((x, y), batch_size=BATCH, shuffle=False)


@pytest.mark.parametrize(
    ("bad_row", "step", "optimizer"),
    [(0, 1, "sgd"), (2, 2, "sgd"), (5, 3, "sgd"), (5, 3, "two kinds of sums")],
)
def test_the_weights_are_those_before_the_bad_step(sc, engine, bad_row, step, optimizer):
    """Rank 0 holds rows 0 to 5, two of which are in each step. The first round is one step long."""
    name, trained = optimizer, model(optimizer)
    optimizer = TFOptimizer.from_keras(
        trained, dataset(bad_row), engine=engine, num_ranks=2, progress=False
    )
    with pytest.raises(NonFiniteError) as caught:
        optimizer.optimize(MaxIteration(6))
    assert (caught.value.rank, caught.value.step) == (0, step)
    assert optimizer.step == step - 1

    expected = model(name)
    if step > 1:
        TFOptimizer.from_keras(
            expected, dataset(), engine="local", num_ranks=2, progress=False
        ).optimize(MaxIteration(step - 1))
    for ours, theirs in zip(trained.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
