"""Small Keras models of every kind, with data that fits them."""

import keras
import numpy as np


def rows_of(shape, dtype, rows, seed, high=3):
    """Random rows of a field."""
    rng = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.integer):
        return rng.integers(0, high, (rows, *shape)).astype(dtype)
    return rng.normal(size=(rows, *shape)).astype(dtype)


@keras.saving.register_keras_serializable("tests")
class Scaled(keras.layers.Layer):
    """A layer of the user's own, with a weight."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x):
        return x * self.scale


def dense():
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(3)]
    )
    return model, keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def convolution():
    """With BatchNorm: on several ranks its statistics are each rank's own."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            # No bias: BatchNorm takes it out, its gradient is noise, which Adam would amplify.
            keras.layers.Conv2D(4, 3, use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3),
        ]
    )
    return model, keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def lstm():
    model = keras.Sequential([keras.Input((5, 4)), keras.layers.LSTM(6), keras.layers.Dense(1)])
    return model, "mse"


def embedding():
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(11, 5),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    return model, keras.losses.BinaryCrossentropy(from_logits=True)


def two_inputs_two_outputs():
    left, right = keras.Input((4,), name="left"), keras.Input((3,), name="right")
    both = keras.layers.Concatenate()([left, right])
    hidden = keras.layers.Dense(6, "tanh")(both)
    outputs = [keras.layers.Dense(1, name="a")(hidden), keras.layers.Dense(2, name="b")(hidden)]
    return keras.Model([left, right], outputs), ["mse", "mae"]


def custom_layer():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            Scaled(),
            keras.layers.Lambda(lambda x: x * 2),
            keras.layers.Dense(3, kernel_regularizer="l2"),
        ]
    )
    return model, keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _labels(rows, seed):
    return rows_of((), "int32", rows, seed)


MODELS = {
    "dense": (dense, lambda n, s: (rows_of((6,), "float32", n, s), _labels(n, s + 1))),
    "convolution": (
        convolution,
        lambda n, s: (rows_of((8, 8, 1), "float32", n, s), _labels(n, s + 1)),
    ),
    "lstm": (
        lstm,
        lambda n, s: (rows_of((5, 4), "float32", n, s), rows_of((1,), "float32", n, s + 1)),
    ),
    "embedding": (
        embedding,
        lambda n, s: (rows_of((4,), "int32", n, s, 11), rows_of((1,), "int32", n, s + 1, 2)),
    ),
    "two_inputs_two_outputs": (
        two_inputs_two_outputs,
        lambda n, s: (
            (rows_of((4,), "float32", n, s), rows_of((3,), "float32", n, s + 1)),
            (rows_of((1,), "float32", n, s + 2), rows_of((2,), "float32", n, s + 3)),
        ),
    ),
    "custom_layer": (custom_layer, lambda n, s: (rows_of((6,), "float32", n, s), _labels(n, s))),
}
