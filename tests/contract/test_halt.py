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


@pytest.mark.parametrize("bad_step", [1, 3, 4])
def test_a_gradient_that_is_not_finite_though_the_loss_is(sc, engine, bad_step):
    """The gradient of `sqrt(0)`, in rows of rank 1 only."""
    x = np.ones((8, 2), np.float32)
    x[4 + bad_step - 1] = [0, 0]
    linear = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    linear.set_weights([np.ones((2, 1), np.float32)])
    linear.compile(keras.optimizers.SGD(0.1), lambda _, output: keras.ops.sqrt(output[:, 0]))
    data = TFDataset.from_ndarrays((x, np.zeros(8, np.float32)), batch_size=2, shuffle=False)
    optimizer = TFOptimizer.from_keras(linear, data, engine=engine, num_ranks=2, progress=False)
    with pytest.raises(NonFiniteError, match="The gradient must be finite") as caught:
        optimizer.optimize(MaxIteration(4))
    assert (caught.value.rank, caught.value.step) == (1, bad_step)
    assert optimizer.step == bad_step - 1
    weights = np.ones(2, np.float32)
    for _ in range(bad_step - 1):
        # Of every row the gradient of sqrt(w · x) is x / (2 * sqrt(w · x)), the mean of two alike.
        weights = weights - 0.1 / (2 * np.sqrt(weights.sum()))
    np.testing.assert_allclose(linear.get_weights()[0][:, 0], weights, rtol=1e-6)


@pytest.mark.parametrize("owner", [0, 1])
@pytest.mark.parametrize("bad_step", [1, 3])
def test_a_sum_of_finite_gradients_that_overflows(sc, engine, owner, bad_step):
    """Only the rank that owns the slice can see it, when the others have gone on."""
    x = np.zeros((8, 2), np.float32)
    # Two rows of each rank; every step takes one of each. The loss stays 0.
    x[[bad_step - 1, 4 + bad_step - 1], owner] = 2e38
    linear = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    linear.set_weights([np.zeros((2, 1), np.float32)])
    linear.compile(keras.optimizers.SGD(0.1), lambda _, output: output[:, 0])
    data = TFDataset.from_ndarrays((x, np.zeros(8, np.float32)), batch_size=2, shuffle=False)
    optimizer = TFOptimizer.from_keras(linear, data, engine=engine, num_ranks=2, progress=False)
    with pytest.raises(NonFiniteError, match="sum of gradients") as caught:
        optimizer.optimize(MaxIteration(4))
    assert (caught.value.rank, caught.value.step) == (owner, bad_step)
    assert optimizer.step == bad_step - 1 if engine == "gang" else optimizer.step < bad_step
    assert (linear.get_weights()[0] == 0).all()
