"""LARS in plain Keras, against NumPy written out by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfspark import LARS
from tfspark.errors import InvalidInputError

RATE, TRUST, DECAY, MOMENTUM = 0.7, 0.05, 0.03, 0.8


def lars(tensors, gradients, *, adapted, decayed, momentum=MOMENTUM, nesterov=False, epsilon=0.0):
    """The tensors after all steps, in float64."""
    tensors = [tensor.astype(float) for tensor in tensors]
    velocities = [0.0 for _ in tensors]
    for step in gradients:
        for i, gradient in enumerate(step):
            w, g, decay = tensors[i], gradient.astype(float), DECAY if decayed[i] else 0.0
            w_norm, g_norm = np.sqrt((w * w).sum()), np.sqrt((g * g).sum())
            ratio = 1.0
            if adapted[i] and w_norm > 0 and g_norm > 0:
                ratio = TRUST * w_norm / (g_norm + decay * w_norm + epsilon)
            change = RATE * ratio * (g + decay * w)
            velocities[i] = momentum * velocities[i] + change
            move = momentum * velocities[i] + change if nesterov else velocities[i]
            tensors[i] = w - move
    return tensors


def data(steps=4):
    rng = np.random.default_rng(0)
    shapes = [(4, 3), (3,), (2, 2, 2), (2, 5)]
    tensors = [rng.normal(size=shape).astype("float32") for shape in shapes]
    tensors[3][:] = 0  # its norm is 0 before the first step
    gradients = [[rng.normal(size=shape).astype("float32") for shape in shapes] for _ in range(4)]
    gradients[1][2][:] = 0
    return tensors, gradients[:steps]


def plain_keras(optimizer, tensors, gradients):
    variables = [keras.Variable(tensor, name=f"w{i}") for i, tensor in enumerate(tensors)]
    for step in gradients:
        optimizer.apply([tf.constant(gradient) for gradient in step], variables)
    return [variable.numpy() for variable in variables]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {}),
        ({"nesterov": True}, {"nesterov": True}),
        ({"momentum": 0.0}, {"momentum": 0.0}),
        ({"epsilon": 0.5}, {"epsilon": 0.5}),
        ({"adapt_vectors": True}, {"adapted": [True] * 4}),
        ({"trust_coefficient": None}, {"adapted": [False] * 4}),
        ({"weight_decay": None}, {"decayed": [False] * 4}),
    ],
)
def test_the_formula(arguments, expected):
    arguments = {
        "momentum": MOMENTUM,
        "weight_decay": DECAY,
        "trust_coefficient": TRUST,
        **arguments,
    }
    expected = {"adapted": [True, False, True, True], "decayed": [True] * 4, **expected}
    tensors, gradients = data()
    got = plain_keras(LARS(RATE, **arguments), tensors, gradients)
    for left, right in zip(got, lars(tensors, gradients, **expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)


def test_exclusions_from_weight_decay():
    tensors, gradients = data()
    optimizer = LARS(RATE, MOMENTUM, weight_decay=DECAY, trust_coefficient=TRUST)
    optimizer.exclude_from_weight_decay(var_names=["w2"])
    expected = lars(
        tensors, gradients, adapted=[True, False, True, True], decayed=[True, True, False, True]
    )
    for left, right in zip(plain_keras(optimizer, tensors, gradients), expected, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_before_their_norms_are_taken():
    tensors, gradients = data(steps=1)
    clipped = [[tf.clip_by_norm(g, 0.5).numpy() for g in step] for step in gradients]
    got = plain_keras(LARS(RATE, trust_coefficient=TRUST, clipnorm=0.5), tensors, gradients)
    expected = plain_keras(LARS(RATE, trust_coefficient=TRUST), tensors, clipped)
    for left, right in zip(got, expected, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-7)


def test_the_gradient_of_an_embedding_is_a_whole_tensor():
    table = np.arange(6, dtype="float32").reshape(3, 2)
    sparse, dense = keras.Variable(table), keras.Variable(table)
    rows, values = [1, 1], np.float32([[1, 2], [3, 4]])
    slices = tf.IndexedSlices(tf.constant(values), tf.constant(rows), tf.constant([3, 2]))
    whole = np.zeros((3, 2), "float32")
    whole[1] = values.sum(axis=0)
    for variable, gradient in ((sparse, slices), (dense, tf.constant(whole))):
        optimizer = LARS(RATE, weight_decay=DECAY, trust_coefficient=TRUST)
        for _ in range(2):
            optimizer.apply([gradient], [variable])
    np.testing.assert_allclose(sparse.numpy(), dense.numpy(), rtol=1e-6)
    assert (sparse.numpy() != table)[1:].all()


def test_it_fits_a_model_of_keras():
    keras.utils.set_random_seed(1)
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    y = x @ np.float32([[1], [-2], [3], [0.5]])
    model = keras.Sequential([keras.layers.Dense(16, activation="relu"), keras.layers.Dense(1)])
    model.compile(LARS(0.02, weight_decay=1e-4, trust_coefficient=1.0), "mse")
    losses = model.fit(x, y, batch_size=16, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < losses[0] / 10


def test_the_config_makes_an_equal_one():
    made = LARS(
        0.25,
        momentum=0.5,
        nesterov=True,
        weight_decay=0.1,
        trust_coefficient=0.2,
        epsilon=0.3,
        adapt_vectors=True,
        clipnorm=2.0,
        name="mine",
    )
    config = keras.optimizers.serialize(made)
    again = keras.optimizers.deserialize(config)
    assert isinstance(again, LARS)
    assert again.get_config() == made.get_config()
    assert {made.get_config()[key] for key in ("momentum", "epsilon", "clipnorm")} == {0.5, 0.3, 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.0}, "below 1. Received: momentum=1.0"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov needs a momentum"),
        ({"weight_decay": -0.1}, "Received: weight_decay=-0.1"),
        ({"trust_coefficient": 0.0}, "Received: trust_coefficient=0.0"),
        ({"epsilon": -1.0}, "Received: epsilon=-1.0"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        LARS(0.1, **arguments)
