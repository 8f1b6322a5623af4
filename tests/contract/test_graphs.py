"""TF1-style graphs on every engine, against a plain session that runs TF1's own optimizers."""

import numpy as np
import pytest
import tensorflow as tf
from keras_models import rows_of
from keras_reference import global_batches

from tfspark import SGD, Adam, MaxIteration, TFDataset, TFOptimizer
from tfspark.data.order import BatchOrder

v1 = tf.compat.v1
BATCH, SEED, STEPS, RATE = 8, 11, 5, 0.1


def weight(name, *shape):
    """A trainable variable with fixed random values."""
    values = np.random.default_rng(len(name)).normal(size=shape, scale=0.5)
    return v1.get_variable(name, initializer=values.astype("float32"))


def cross_entropy(labels, logits):
    return tf.reduce_mean(
        tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    )


def dense(x, y):
    hidden = tf.nn.relu(x @ weight("hidden", 6, 8) + weight("bias", 8))
    return cross_entropy(y, hidden @ weight("output", 8, 3))


def convolution(x, y):
    """With BatchNorm written as TF1 scripts do: batch statistics, and UPDATE_OPS."""
    net = tf.nn.conv2d(x, weight("filter", 3, 3, 1, 4), 1, "VALID")
    mean = v1.get_variable("mean", [4], initializer=v1.zeros_initializer(), trainable=False)
    variance = v1.get_variable("variance", [4], initializer=v1.ones_initializer(), trainable=False)
    net, batch_mean, batch_variance = v1.nn.fused_batch_norm(
        net, weight("scale", 4), weight("offset", 4), is_training=True
    )
    for moving, value in ((mean, batch_mean), (variance, batch_variance)):
        update = v1.assign_sub(moving, 0.1 * (moving - value))
        v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, update)
    return cross_entropy(y, tf.reduce_mean(tf.nn.relu(net), [1, 2]) @ weight("output", 4, 3))


def lstm(x, y):
    """A cell written out, in a while loop."""
    kernel, recurrent = weight("kernel", 4, 24), weight("recurrent", 6, 24)

    def step(t, h, c):
        i, f, g, o = tf.split(x[:, t] @ kernel + h @ recurrent, 4, axis=1)
        c = tf.sigmoid(f) * c + tf.sigmoid(i) * tf.tanh(g)
        return t + 1, tf.sigmoid(o) * tf.tanh(c), c

    zeros = tf.zeros([tf.shape(x)[0], 6])
    _, h, _ = tf.while_loop(lambda t, h, c: t < 5, step, (0, zeros, zeros))
    return tf.reduce_mean((h @ weight("output", 6, 1) - y) ** 2)


def embedding(x, y):
    table = weight("table", 11, 5)
    looked_up = tf.reshape(tf.nn.embedding_lookup(table, x), [-1, 20])
    logits = looked_up @ weight("output", 20, 1)
    labels = tf.cast(y, tf.float32)
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits))


def two_inputs_two_outputs(x, y):
    hidden = tf.tanh(x[0] @ weight("left", 4, 6) + x[1] @ weight("right", 3, 6))
    first = tf.reduce_mean((hidden @ weight("a", 6, 1) - y[0]) ** 2)
    second = tf.reduce_mean(tf.abs(hidden @ weight("b", 6, 2) - y[1]))
    return first + 0.5 * second


def custom_layer(x, y):
    """A function of the user's own with a gradient of its own."""

    @tf.custom_gradient
    def reversed_gradient(value):
        return tf.identity(value), lambda upstream: -0.5 * upstream

    scale = weight("scale", 6)
    return cross_entropy(y, reversed_gradient(x * scale) @ weight("output", 6, 3))


MODELS = {
    function.__name__: (function, *fields)
    for function, *fields in [
        (dense, [((6,), "float32")], [((), "int32")]),
        (convolution, [((8, 8, 1), "float32")], [((), "int32")]),
        (lstm, [((5, 4), "float32")], [((1,), "float32")]),
        (embedding, [((4,), "int32")], [((1,), "int32")]),
        (
            two_inputs_two_outputs,
            [((4,), "float32"), ((3,), "float32")],
            [((1,), "float32"), ((2,), "float32")],
        ),
        (custom_layer, [((6,), "float32")], [((), "int32")]),
    ]
}
RULES = {
    "sgd": (lambda: SGD(RATE), lambda: v1.train.GradientDescentOptimizer(RATE)),
    "momentum": (
        lambda: SGD(RATE, momentum=0.9),
        lambda: v1.train.MomentumOptimizer(RATE, 0.9),
    ),
    "adam": (
        lambda: Adam(0.01, epsilon=1e-6),
        lambda: v1.train.AdamOptimizer(0.01, epsilon=1e-6),
    ),
}


def columns(name, rows, seed):
    """Features and labels, one array per field."""
    _, features, labels = MODELS[name]
    fields = [*features, *labels]
    arrays = [
        rows_of(shape, dtype, rows, seed + i, 2 if name == "embedding" else 3)
        for i, (shape, dtype) in enumerate(fields)
    ]
    return arrays


def grouped(name, values):
    """A flat list of fields as `(x, y)`, where a single one stands for itself."""
    _, features, _ = MODELS[name]
    x, y = values[: len(features)], values[len(features) :]
    return [part[0] if len(part) == 1 else list(part) for part in (x, y)]


@pytest.mark.parametrize(
    ("name", "rule"),
    [*((name, "sgd") for name in MODELS), ("dense", "momentum"), ("dense", "adam")],
)
def test_trains_like_a_session(sc, engine, name, rule):
    sizes = (20,) if name == "convolution" else (13, 7)
    parts = [columns(name, rows, 100 * rank) for rank, rows in enumerate(sizes)]
    ours, theirs = RULES[rule]
    build = MODELS[name][0]

    fields = parts[0]
    dataset = TFDataset.from_rdd(
        sc.parallelize(range(len(sizes)), len(sizes)).flatMap(
            lambda rank: list(zip(*parts[rank], strict=True))
        ),
        names=[f"field{i}" for i in range(len(fields))],
        shapes=[array.shape[1:] for array in fields],
        types=[array.dtype for array in fields],
        batch_size=BATCH,
        seed=SEED,
    )
    with tf.Graph().as_default():
        loss = build(*grouped(name, list(dataset.tensors)))
        variables = v1.global_variables()
        optimizer = TFOptimizer.from_loss(
            loss, ours(), engine=engine, num_ranks=len(sizes), progress=False
        )
        optimizer.optimize(MaxIteration(STEPS))
        trained = optimizer.sess.run(variables)
        optimizer.close()

    with tf.Graph().as_default(), v1.Session() as session:
        inputs = [v1.placeholder(a.dtype, [None, *a.shape[1:]]) for a in fields]
        loss = build(*grouped(name, inputs))
        variables = v1.global_variables()
        with tf.control_dependencies([loss]):
            updates = v1.get_collection(v1.GraphKeys.UPDATE_OPS)
        train_op = tf.group(theirs().minimize(loss), *updates)
        session.run(v1.global_variables_initializer())
        initial = session.run(variables)
        order = BatchOrder(sizes, BATCH, SEED, shuffle=True)
        for batch in global_batches(order, [tuple(part) for part in parts], STEPS):
            session.run(train_op, dict(zip(inputs, batch, strict=True)))
        expected = session.run(variables)

    assert any((a != b).any() for a, b in zip(trained, initial, strict=True))
    for ours, theirs in zip(trained, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
