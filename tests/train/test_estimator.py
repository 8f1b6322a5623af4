"""`TFEstimator`: model functions of TensorFlow 1, against NumPy."""

import keras
import numpy as np
import pytest
import tensorflow.compat.v1 as tf1

from tfspark import MaxIteration, ModeKeys, TFDataset, TFEstimator, TFEstimatorSpec
from tfspark.errors import InvalidInputError

ROWS, BATCH, RATE = 40, 8, 0.1
X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
Y = (X @ [[1.0], [-2.0], [0.5]] + 0.3).astype(np.float32)


def rows(mode=None, **batching):
    """An input function; prediction sees features only."""
    given = {"batch_size": BATCH, "shuffle": False, **batching}
    return TFDataset.from_ndarrays(X if mode == ModeKeys.PREDICT else (X, Y), **given)


def linear(features, labels, mode, params):
    """A linear model whose kernel starts at what `params` say."""
    start = tf1.constant_initializer(params["start"])
    outputs = tf1.matmul(features, tf1.get_variable("kernel", [3, 1], initializer=start))
    predictions = {"value": outputs, "twice": 2 * outputs}
    if mode == ModeKeys.PREDICT:
        return TFEstimatorSpec(mode, predictions)
    error = outputs - labels
    loss = tf1.reduce_mean(error**2)
    metrics = {"bias": tf1.reduce_mean(error), "mae": keras.metrics.MeanAbsoluteError()}
    train_op = None
    if mode == ModeKeys.TRAIN and params.get("train_op"):
        train_op = tf1.train.GradientDescentOptimizer(RATE).minimize(loss)
    return TFEstimatorSpec(mode, outputs, loss, train_op, keras.optimizers.SGD(RATE), metrics)


def by_numpy(steps, start=0.5):
    kernel = np.full((3, 1), start, np.float32)
    for step in range(steps):
        part = slice(step * BATCH % ROWS, step * BATCH % ROWS + BATCH)
        kernel -= RATE * 2 * X[part].T @ (X[part] @ kernel - Y[part]) / BATCH
    return kernel


def estimator(**settings):
    params = {"start": 0.5, **settings.pop("params", {})}
    given = {"engine": "local", "num_ranks": 1, "params": params, **settings}
    return TFEstimator.from_model_fn(linear, **given)


def predicted(made):
    return np.stack([row["value"] for row in made.predict(rows).collect()])


@pytest.mark.parametrize("train_op", [False, True])
def test_trains_as_numpy_does(sc, train_op):
    made = estimator(params={"train_op": train_op}).train(rows, steps=7)
    assert made.step == 7
    np.testing.assert_allclose(predicted(made), X @ by_numpy(7), rtol=1e-4, atol=1e-5)
    # Every call takes its rows from the first one on.
    made.train(rows)
    assert made.step == 12


@pytest.mark.parametrize("engine", ["shuffle", "gang"])
def test_trains_in_spark(sc, engine):
    made = estimator(engine=engine, num_ranks=2).train(rows, steps=5)
    same = estimator(num_ranks=2).train(rows, steps=5)
    np.testing.assert_allclose(predicted(made), predicted(same), rtol=1e-5, atol=1e-6)


def test_evaluates(sc):
    for engine in ("local", "shuffle"):
        made = estimator(engine=engine, num_ranks=2).train(rows, end_trigger=MaxIteration(3))
        error = predicted(made) - Y
        found = made.evaluate(lambda: rows(batch_size=-1, batch_per_thread=7), ["mse"])
        assert found == {
            "loss": pytest.approx(np.mean(error**2), rel=1e-4),
            "bias": pytest.approx(np.mean(error), rel=1e-4),
            "mae": pytest.approx(np.mean(abs(error)), rel=1e-4),
            "mse": pytest.approx(np.mean(error**2), rel=1e-4),
            "global_step": 3,
        }


def test_goes_on_from_its_folder_in_another_process(sc, tmp_path):
    folder = str(tmp_path)
    estimator(model_dir=folder).train(rows, steps=3)
    other = estimator(model_dir=folder)
    assert other.evaluate(rows)["global_step"] == 3
    other.train(rows, steps=4)
    assert other.step == 7
    np.testing.assert_allclose(predicted(other), X @ by_numpy(7), rtol=1e-4, atol=1e-5)
    elsewhere = estimator()
    read = elsewhere.predict(rows, ["twice"], checkpoint_path=folder).collect()
    assert set(read[0]) == {"twice"}
    np.testing.assert_allclose(
        np.stack([row["twice"] for row in read]), 2 * X @ by_numpy(7), rtol=1e-4, atol=1e-5
    )


def test_functions_may_take_what_they_name(sc):
    seen = []

    def input_fn(mode, params, config):
        seen.append((mode, params["start"], config))
        return rows(mode)

    made = estimator(config="here").train(input_fn, steps=1)
    made.evaluate(input_fn)
    made.predict(input_fn)
    assert seen == [(mode, 0.5, "here") for mode in ("train", "eval", "infer")]


class TestBadInput:
    def test_use_before_training(self, sc, tmp_path):
        with pytest.raises(InvalidInputError, match=r"no call of train.*no model_dir"):
            estimator().predict(rows)
        with pytest.raises(InvalidInputError, match="no checkpoint in"):
            estimator(model_dir=str(tmp_path)).evaluate(rows)

    def test_specs_that_lack_something(self, sc):
        def nothing(features, labels, mode):
            return TFEstimatorSpec(mode, predictions=features)

        with pytest.raises(InvalidInputError, match="In mode 'train' a spec has loss"):
            TFEstimator.from_model_fn(nothing).train(rows)

        def untrained(features, labels, mode):
            return TFEstimatorSpec(mode, loss=tf1.reduce_mean(features))

        with pytest.raises(InvalidInputError, match="a train_op or an optimizer"):
            TFEstimator.from_model_fn(untrained).train(rows)
        with pytest.raises(InvalidInputError, match="returns a TFEstimatorSpec"):
            TFEstimator.from_model_fn(lambda features, labels: None).train(rows)

    def test_unknown_names(self, sc):
        made = estimator().train(rows, steps=1)
        with pytest.raises(InvalidInputError, match="'other'; there are value, twice"):
            made.predict(rows, ["other"])
        with pytest.raises(InvalidInputError, match="Use one of them"):
            made.train(rows, steps=1, end_trigger=MaxIteration(1))
