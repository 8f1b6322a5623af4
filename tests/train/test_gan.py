"""`GANEstimator` against a loop of plain TensorFlow over the same batches."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfspark import GANEstimator, MaxIteration, TFDataset, TFOptimizer, TrainSummary
from tfspark.errors import InvalidInputError

ROWS, BATCH = 48, 12
DENSE = keras.layers.Dense


def dataset(**settings):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(ROWS, 2)).astype(np.float32)
    real = rng.normal(2.0, 0.5, size=(ROWS, 3)).astype(np.float32)
    given = {"batch_size": BATCH, "shuffle": False, **settings}
    return TFDataset.from_ndarrays((noise, real), **given)


def models():
    keras.utils.set_random_seed(5)
    generator = keras.Sequential(
        [
            keras.Input([2]),
            DENSE(8, "tanh", name="g1"),
            keras.layers.BatchNormalization(name="gn"),
            DENSE(3, name="g2"),
        ],
        name="g",
    )
    discriminator = keras.Sequential(
        [keras.Input([3]), DENSE(8, "relu", name="d1"), DENSE(1, name="d2")], name="d"
    )
    return generator, discriminator


def generator_loss(fake):
    return tf.reduce_mean(tf.nn.softplus(-fake))


def discriminator_loss(real, fake):
    return tf.reduce_mean(tf.nn.softplus(-real)) + tf.reduce_mean(tf.nn.softplus(fake))


def estimator(parts, g_steps=1, d_steps=1, **settings):
    given = {"engine": "local", "num_ranks": 1, **settings}
    return GANEstimator(
        *parts,
        generator_loss,
        discriminator_loss,
        keras.optimizers.Adam(0.01),
        keras.optimizers.Adam(0.02),
        g_steps,
        d_steps,
        **given,
    )


def by_hand(steps, g_steps, d_steps):
    generator, discriminator = models()
    adam_g, adam_d = keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.02)
    noise, real = dataset()._source.arrays
    for step in range(steps):
        part = slice(step * BATCH % ROWS, step * BATCH % ROWS + BATCH)
        with tf.GradientTape() as tape:
            if step % (g_steps + d_steps) < d_steps:
                fake = generator(noise[part], training=True)
                loss = discriminator_loss(discriminator(real[part]), discriminator(fake))
                optimizer, variables = adam_d, discriminator.trainable_variables
            else:
                loss = generator_loss(discriminator(generator(noise[part], training=True)))
                optimizer, variables = adam_g, generator.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    return generator, discriminator


def assert_same(ours, theirs, exact=False):
    for one, other in zip(ours, theirs, strict=True):
        for left, right in zip(one.get_weights(), other.get_weights(), strict=True):
            if exact:
                np.testing.assert_array_equal(left, right)
            else:
                np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("g_steps", "d_steps"), [(1, 1), (2, 3)])
def test_steps_by_turns(g_steps, d_steps):
    parts = models()
    made = estimator(parts, g_steps, d_steps).train(dataset, MaxIteration(9))
    assert made.step == 9
    assert_same(parts, by_hand(9, g_steps, d_steps))
    noise = np.ones([4, 2], np.float32)
    expected = parts[0].predict(noise, verbose=0)
    np.testing.assert_allclose(made.generate(noise), expected, rtol=1e-5)


@pytest.mark.parametrize("engine", ["shuffle", "gang"])
def test_in_spark(sc, engine):
    local, spread = models(), models()
    estimator(local, num_ranks=2).train(dataset(), MaxIteration(6))
    estimator(spread, num_ranks=2, engine=engine).train(dataset(), MaxIteration(6))
    assert_same(spread, local)


def test_goes_on_from_its_folder(tmp_path):
    whole, parts = models(), models()
    estimator(whole, 2, 1).train(dataset(), MaxIteration(8))
    estimator(parts, 2, 1, model_dir=str(tmp_path)).train(dataset(), MaxIteration(4))
    again = models()
    resumed = estimator(again, 2, 1, model_dir=str(tmp_path))
    assert resumed.train(dataset(), MaxIteration(8)).step == 8
    assert_same(again, whole, exact=True)


def test_who_rests_keeps_its_slots(tmp_path):
    """Two weights, of which one has two turns of three; momentum tells of rest."""
    a, b = tf.Variable([1.0], name="a"), tf.Variable([1.0], name="b")
    rates = {"a": 0.1, "b": 0.2}
    TFOptimizer.from_function(
        lambda batch: tf.reduce_mean(batch) * (a[0] + b[0]),
        [a, b],
        TFDataset.from_ndarrays(np.ones([3, 1], np.float32), batch_size=1),
        {name: keras.optimizers.SGD(rate, momentum=0.5) for name, rate in rates.items()},
        engine="local",
        num_ranks=1,
        turns=("a", "b", "a"),
        clip_norm=1.0,  # of the gradients of those that step
    ).set_train_summary(TrainSummary(tmp_path, "turns")).optimize(MaxIteration(6))
    expected = {}
    for name, steps in (("a", 4), ("b", 2)):
        velocity, expected[name] = 0.0, 1.0
        for _ in range(steps):
            velocity = 0.5 * velocity - rates[name]
            expected[name] += velocity
    assert a.numpy()[0] == pytest.approx(expected["a"])
    assert b.numpy()[0] == pytest.approx(expected["b"])
    curve = TrainSummary(tmp_path, "turns").read_scalar("LearningRate")[:, 1]
    np.testing.assert_allclose(curve, [0.1, 0.2, 0.1, 0.1, 0.2, 0.1], rtol=1e-6)


class TestBadInput:
    def test_turns_name_prefixes(self):
        a = tf.Variable([1.0], name="a")
        rows = TFDataset.from_ndarrays(np.ones([3, 1], np.float32), batch_size=1)
        with pytest.raises(InvalidInputError, match="turns name prefixes"):
            TFOptimizer.from_function(
                lambda batch: tf.reduce_mean(batch * a), [a], rows, {"": "sgd"}, turns=("b",)
            )

    def test_models_and_rows(self):
        generator, discriminator = models()
        with pytest.raises(InvalidInputError, match="Both parts of a GAN are models of Keras 3"):
            estimator((generator, lambda x: x))
        with pytest.raises(InvalidInputError, match="at least one step"):
            estimator((generator, discriminator), g_steps=0)
        with pytest.raises(InvalidInputError, match=r"rows \(noise, real\)"):
            estimator((generator, discriminator)).train(
                TFDataset.from_ndarrays(np.ones([4, 2], np.float32), batch_size=2)
            )
        twins = []
        for size in (2, 3):
            inputs = keras.Input([size])
            twins.append(keras.Model(inputs, DENSE(3, name="same")(inputs)))
        with pytest.raises(InvalidInputError, match="Name their layers"):
            estimator(twins).train(dataset())
        with pytest.raises(InvalidInputError, match="accumulation_steps"):
            estimator((generator, discriminator), accumulation_steps=2)
