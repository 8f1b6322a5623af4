"""The models and rows that every side of a benchmark trains: tfspark, plain TensorFlow, the peers.

Peers live in environments of their own, with other versions of Keras, so a model is built by the
`keras` module it is given, of Keras 2 or 3, and this file runs on Python 3.7. Rows are made from a
seed: speed depends on their shape only.

    >>> workload = WORKLOADS["lenet"]
    >>> model, (features, labels) = workload.model(tf.keras), workload.rows(1024)
"""

import collections

import numpy as np

CLASSES = 10
LEARNING_RATE = 1e-3  # of Adam, on every side


class Workload(collections.namedtuple("Workload", "name model rows batches note")):
    """A model and its rows.

    Attributes:
        name: key of `WORKLOADS`.
        model: `model(keras)` builds it: logits `[rows, CLASSES]`, for sparse cross entropy.
        rows: `rows(count, seed=0)` makes `([feature, …], labels)`; labels are int32 `[count]`.
        batches: global batch sizes that are worth measuring.
        note: what bounds its speed.
    """

    __slots__ = ()


def _images(side, channels):
    def rows(count, seed=0):
        rng = np.random.RandomState(seed)
        images = rng.uniform(-1, 1, (count, side, side, channels)).astype("float32")
        return [images], rng.randint(0, CLASSES, count).astype("int32")

    return rows


def _vectors(size):
    def rows(count, seed=0):
        rng = np.random.RandomState(seed)
        vectors = rng.normal(size=(count, size)).astype("float32")
        return [vectors], rng.randint(0, CLASSES, count).astype("int32")

    return rows


def _lenet(keras):
    layers = keras.layers
    image = keras.Input((28, 28, 1))
    x = layers.Conv2D(32, 5, padding="same", activation="relu")(image)
    x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(64, 5, padding="same", activation="relu")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Dense(1024, activation="relu")(layers.Flatten()(x))
    return keras.Model(image, layers.Dense(CLASSES)(x))


USERS, ITEMS = 60000, 20000


def _ncf(keras):
    layers = keras.layers
    user, item = keras.Input((1,), dtype="int32"), keras.Input((1,), dtype="int32")

    def embed(ids, count):
        return layers.Flatten()(layers.Embedding(count, 32)(ids))

    factors = layers.Multiply()([embed(user, USERS), embed(item, ITEMS)])
    x = layers.Concatenate()([embed(user, USERS), embed(item, ITEMS)])
    for width in (256, 128, 64):
        x = layers.Dense(width, activation="relu")(x)
    return keras.Model([user, item], layers.Dense(CLASSES)(layers.Concatenate()([factors, x])))


def _ratings(count, seed=0):
    rng = np.random.RandomState(seed)
    pairs = [rng.randint(0, most, (count, 1)).astype("int32") for most in (USERS, ITEMS)]
    return pairs, rng.randint(0, CLASSES, count).astype("int32")


def _lstm(keras):
    series = keras.Input((50, 32))
    # Without `unroll` and cuDNN every side runs the same while loop.
    x = keras.layers.LSTM(128)(series)
    return keras.Model(series, keras.layers.Dense(CLASSES)(x))


def _series(count, seed=0):
    rng = np.random.RandomState(seed)
    series = rng.normal(size=(count, 50, 32)).astype("float32")
    return [series], rng.randint(0, CLASSES, count).astype("int32")


def _mobilenet(keras):
    base = keras.applications.MobileNetV2(
        input_shape=(96, 96, 3), include_top=False, weights=None, pooling="avg"
    )
    return keras.Model(base.input, keras.layers.Dense(CLASSES)(base.output))


def _dense(keras):
    vector = keras.Input((256,))
    x = vector
    for _ in range(4):
        x = keras.layers.Dense(2850, activation="relu")(x)
    return keras.Model(vector, keras.layers.Dense(CLASSES)(x))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("lenet", _lenet, _images(28, 1), (128, 512, 4096), "convolutions, 3.3 M weights"),
        Workload("ncf", _ncf, _ratings, (1024, 4096), "5.2 M weights, nearly all embeddings"),
        Workload("lstm", _lstm, _series, (128, 512), "many small operations, 0.1 M weights"),
        Workload("mobilenet", _mobilenet, _images(96, 3), (128,), "compute, 2.3 M weights"),
        Workload("dense", _dense, _vectors(256), (128, 1024), "communication, 25 M weights"),
    )
}
