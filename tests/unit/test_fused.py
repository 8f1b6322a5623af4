"""The fused batch normalization against Keras's own."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfspark.graph.fused import fused_batch_norm

IMAGES = np.random.default_rng(1).normal(3, 2, (6, 5, 4, 3)).astype(np.float32)
OPTIONS = [
    {},
    {"scale": False},
    {"center": False},
    {"momentum": 0.7, "epsilon": 0.1},
    {"axis": 3},
]


def trained(images, fuse, **options):
    """Output, gradients and moving statistics of one step, and its operations."""
    keras.utils.set_random_seed(3)
    norm = keras.layers.BatchNormalization(
        beta_initializer="normal", gamma_initializer="uniform", **options
    )
    model = keras.Sequential([keras.Input(images.shape[1:]), norm])

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = model(x, training=True)
            total = tf.reduce_sum(y**3)
        weights = [x, *(variable.value for variable in model.trainable_variables)]
        return [y, *tape.gradient(total, weights)]

    if fuse:
        with fused_batch_norm(model):
            traced = step.get_concrete_function(tf.constant(images))
    else:
        traced = step.get_concrete_function(tf.constant(images))
    found = [value.numpy() for value in traced(tf.constant(images))]
    moving = [variable.numpy() for variable in model.non_trainable_variables]
    return found + moving, {operation.type for operation in traced.graph.get_operations()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_computes_what_keras_computes(options):
    expected, composed = trained(IMAGES, False, **options)
    found, operations = trained(IMAGES, True, **options)
    assert "FusedBatchNormV3" in operations - composed
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5 * np.abs(other).max())


def test_one_value_in_every_channel():
    """The variance of a sample of one is 0 / 0."""
    one = IMAGES[:1, :1, :1]
    for found, expected in zip(trained(one, True)[0], trained(one, False)[0], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "options"),
    [
        (IMAGES, {"axis": 1}),
        (IMAGES, {"trainable": False}),
        (IMAGES[:, 0], {}),
        (IMAGES[:, 0, 0], {}),
        (IMAGES, {"dtype": "mixed_bfloat16"}),
        (IMAGES, {"synchronized": True}),
    ],
    ids=["axis 1", "frozen", "three dimensions", "two", "mixed precision", "synchronized"],
)
def test_what_it_cannot_compute_is_left_to_keras(images, options):
    _, operations = trained(images, True, **options)
    assert "FusedBatchNormV3" not in operations


def test_a_subclass_of_the_layer_is_left_alone():
    class Doubled(keras.layers.BatchNormalization):
        def call(self, inputs, training=None, mask=None):
            return 2 * super().call(inputs, training=training, mask=mask)

    model = keras.Sequential([keras.Input((5, 4, 3)), Doubled()])
    expected = model(IMAGES, training=True).numpy()
    model.layers[0].moving_mean.assign(tf.zeros(3))
    with fused_batch_norm(model):
        np.testing.assert_allclose(model(IMAGES, training=True), expected, rtol=1e-6)


def test_layers_of_models_inside_models_and_after_the_block():
    inner = keras.Sequential([keras.Input((5, 4, 3)), keras.layers.BatchNormalization()])
    model = keras.Sequential([keras.Input((5, 4, 3)), inner])
    layer = inner.layers[0]

    def operations():
        traced = tf.function(model).get_concrete_function(tf.constant(IMAGES), training=True)
        return {operation.type for operation in traced.graph.get_operations()}

    with pytest.raises(ZeroDivisionError), fused_batch_norm(model):
        assert any("FusedBatchNormV3" in name for name in operations())
        raise ZeroDivisionError
    assert "call" not in vars(layer)
    assert not any("FusedBatchNormV3" in name for name in operations())
