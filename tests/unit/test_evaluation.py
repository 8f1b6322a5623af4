"""Evaluations against plain Keras' own `evaluate`, and merged over ranks."""

from __future__ import annotations

import itertools
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfspark.data.spec import Field, RowSpec
from tfspark.errors import ProgramError
from tfspark.graph.evaluation import (
    evaluation_from_function,
    evaluation_from_graph,
    evaluation_from_keras,
    keras_forward,
    prediction,
    results,
)
from tfspark.graph.from_function import program_from_function
from tfspark.graph.from_graph import program_from_loss
from tfspark.graph.from_keras import program_from_keras
from tfspark.graphdef.loader import load

ROWS = 11


def merged(evaluation: Any, bound: Any, batch: list[np.ndarray], parts: int) -> list[np.ndarray]:
    """The accumulators of `parts` ranks, added as an engine adds them."""
    run = load(evaluation.graph)
    total = [np.array(value) for value in evaluation.initial]
    bounds = np.linspace(0, ROWS, parts + 1).astype(int)
    for low, high in itertools.pairwise(bounds):
        columns = [batch[i][low:high] for i in evaluation.batch]
        values = run(bound.flat, *bound.state, *columns, *evaluation.initial)
        for i, value in enumerate(values):
            total[i] = total[i] + (value.numpy() - evaluation.initial[i])
    return total


@pytest.mark.parametrize("parts", [1, 3])
def test_metrics_of_keras_equal_evaluate(parts: int) -> None:
    keras.utils.set_random_seed(2)
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((4,)),
            layers.Dense(6),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2")],
        weighted_metrics=["accuracy"],
    )
    spec = RowSpec.of(
        (Field("x", "float32", (4,)), Field("y", "int32", ()), Field("w", "float32", ()))
    )
    rng = np.random.default_rng(1)
    batch = [
        rng.normal(size=(ROWS, 4)).astype("f"),
        rng.integers(0, 3, ROWS).astype("i"),
        rng.uniform(size=ROWS).astype("f"),
    ]
    bound = program_from_keras(model, spec)
    evaluation, metrics = evaluation_from_keras(model, bound, spec)
    scores = results(evaluation, metrics, merged(evaluation, bound, batch, parts))
    x, y, w = batch
    expected = model.evaluate(x, y, sample_weight=w, batch_size=ROWS, verbose=0, return_dict=True)
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, rel=1e-5), name


def test_auc_and_several_outputs() -> None:
    keras.utils.set_random_seed(2)
    inputs = keras.Input((4,))
    model = keras.Model(
        inputs,
        {
            "p": keras.layers.Dense(1, activation="sigmoid", name="p")(inputs),
            "q": keras.layers.Dense(2, name="q")(inputs),
        },
    )
    model.compile(loss={"p": "binary_crossentropy", "q": "mse"}, metrics={"p": "auc", "q": "mae"})
    spec = RowSpec.of(
        (
            Field("x", "float32", (4,)),
            {"p": Field("p", "float32", (1,)), "q": Field("q", "float32", (2,))},
        )
    )
    rng = np.random.default_rng(1)
    batch = [
        rng.normal(size=(ROWS, 4)).astype("f"),
        rng.integers(0, 2, (ROWS, 1)).astype("f"),
        rng.normal(size=(ROWS, 2)).astype("f"),
    ]
    bound = program_from_keras(model, spec)
    evaluation, metrics = evaluation_from_keras(model, bound, spec)
    scores = results(evaluation, metrics, merged(evaluation, bound, batch, 3))
    x, p, q = batch
    expected = model.evaluate(x, {"p": p, "q": q}, batch_size=ROWS, verbose=0, return_dict=True)
    for name in ("loss", "p_auc", "q_mae"):
        assert scores[name] == pytest.approx(expected[name], rel=1e-5), name


def test_predictions_follow_the_flat_vector() -> None:
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    model.compile(loss="mse")
    spec = RowSpec.of((Field("x", "float32", (3,)), Field("y", "float32", (2,))))
    bound = program_from_keras(model, spec)
    graph = prediction(bound, keras_forward(model, bound, spec))
    x = np.random.default_rng(0).normal(size=(5, 3)).astype("f")
    flat = np.arange(8, dtype="f")
    (output,) = load(graph)(flat, x, np.zeros((5, 2), "f"))
    np.testing.assert_allclose(output, x @ flat[:6].reshape(3, 2) + flat[6:], rtol=1e-5)


class Largest(keras.metrics.Metric):
    def __init__(self) -> None:
        super().__init__(name="largest")
        self.value = self.add_weight(shape=(), initializer="zeros", name="value")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.value.assign(keras.ops.maximum(self.value, keras.ops.max(y_true)))

    def result(self) -> Any:
        return self.value


def test_refuses_a_metric_that_does_not_add_up() -> None:
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
    model.compile(loss="mse", metrics=[Largest()])
    spec = RowSpec.of((Field("x", "float32", (3,)), Field("y", "float32", (1,))))
    bound = program_from_keras(model, spec)
    with pytest.raises(ProgramError, match="'largest', whose 'value'"):
        evaluation_from_keras(model, bound, spec)


def test_metrics_of_a_graph() -> None:
    v1 = tf.compat.v1
    with tf.Graph().as_default() as graph:
        x, y = v1.placeholder(tf.float32, [None, 3]), v1.placeholder(tf.int32, [None])
        scale = v1.placeholder(tf.float32, [])
        kernel = v1.get_variable("kernel", [3, 4])
        unused_in_training = v1.get_variable("offset", [4], trainable=False)
        trained = tf.matmul(x, kernel) * scale
        logits = trained + unused_in_training
        loss = tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=trained)
        )
        squares = tf.reduce_sum(trained**2, 1)
    session = v1.Session(graph=graph)
    with graph.as_default():
        keyed = {scale.name: (1.0, 3.0)}
    common = {"session": session, "inputs": [(x, 0), (y, 1)], "tensor_with_value": keyed}
    bound = program_from_loss(loss, **common)
    evaluation, metrics = evaluation_from_graph(
        bound=bound,
        loss=loss,
        outputs=[logits],
        labels=[y],
        metrics={"right": keras.metrics.SparseCategoricalAccuracy(), "squares": squares},
        **common,
    )
    rng = np.random.default_rng(0)
    batch = [rng.normal(size=(ROWS, 3)).astype("f"), rng.integers(0, 4, ROWS).astype("i")]
    scores = results(evaluation, metrics, merged(evaluation, bound, batch, 3))
    expected_loss, expected_logits, expected_squares = session.run(
        [loss, logits, squares], {x: batch[0], y: batch[1], scale: 3.0}
    )
    assert scores["loss"] == pytest.approx(expected_loss, rel=1e-5)
    assert scores["right"] == pytest.approx(np.mean(expected_logits.argmax(1) == batch[1]))
    assert scores["squares"] == pytest.approx(expected_squares.mean(), rel=1e-5)


def test_metrics_of_a_function() -> None:
    kernel = tf.Variable(np.ones((3, 1), "f"))
    spec = RowSpec.of({"x": Field("x", "float32", (3,)), "y": Field("y", "float32", (1,))})

    def loss_fn(rows: Any) -> Any:
        return tf.reduce_mean((rows["x"] @ kernel - rows["y"]) ** 2)

    bound = program_from_function(loss_fn, [kernel], spec)
    evaluation, metrics = evaluation_from_function(
        loss_fn,
        bound,
        spec,
        predict_fn=lambda rows: (rows["y"], rows["x"] @ kernel),
        metrics={"error": keras.metrics.MeanAbsoluteError()},
    )
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(ROWS, 3)).astype("f"), rng.normal(size=(ROWS, 1)).astype("f")
    scores = results(evaluation, metrics, merged(evaluation, bound, [x, y], 3))
    errors = x.sum(1, keepdims=True) - y
    assert scores["loss"] == pytest.approx(np.mean(errors**2), rel=1e-5)
    assert scores["error"] == pytest.approx(np.mean(np.abs(errors)), rel=1e-5)


def test_metrics_of_rows_that_cannot_be_made_up() -> None:
    weight = tf.Variable(1.0)
    spec = RowSpec.of({"x": Field("x", "string", ())})

    def loss_fn(rows: Any) -> Any:
        return tf.reduce_mean(tf.reshape(tf.io.decode_raw(rows["x"], tf.float32), [-1]) * weight)

    bound = program_from_function(loss_fn, [weight], spec)
    evaluation, metrics = evaluation_from_function(loss_fn, bound, spec)
    x = np.array([np.float32(i).tobytes() for i in range(ROWS)], object)
    scores = results(evaluation, metrics, merged(evaluation, bound, [x], 3))
    assert scores["loss"] == pytest.approx(5.0)


V1_SCRIPT = """
    import keras
    import numpy as np
    import tensorflow.compat.v1 as tf
    tf.disable_v2_behavior()
    from tfspark.graph.evaluation import evaluation_from_graph, results
    from tfspark.graph.from_graph import program_from_loss
    from tfspark.graphdef.loader import load

    x = tf.placeholder(tf.float32, [None, 3])
    y = tf.placeholder(tf.int32, [None])
    logits = tf.matmul(x, tf.get_variable("kernel", [3, 4]))
    loss = tf.losses.sparse_softmax_cross_entropy(y, logits)
    session = tf.Session()
    common = dict(session=session, inputs=[(x, 0), (y, 1)])
    bound = program_from_loss(loss, **common)
    metric = keras.metrics.SparseCategoricalAccuracy()
    evaluation, metrics = evaluation_from_graph(
        bound=bound, loss=loss, outputs=[logits], labels=[y], metrics={"right": metric}, **common
    )
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(9, 3)).astype("f"), rng.integers(0, 4, 9).astype("i")]
    values = load(evaluation.graph)(bound.flat, *rows, *evaluation.initial)
    scores = results(evaluation, metrics, [value.numpy() for value in values])
    expected, best = session.run([loss, tf.argmax(logits, 1)], dict(zip([x, y], rows)))
    np.testing.assert_allclose(scores["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(scores["right"], np.mean(best == rows[1]))
    print("same")
"""


def test_a_script_without_v2_behavior(run_python: Any) -> None:
    assert run_python(V1_SCRIPT).stdout.strip().endswith("same")
