"""Programs from TF1-style graphs against a session on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_slim as slim
from programs import joined

from tfspark.errors import ProgramError, UnsupportedRuleError
from tfspark.graph.from_graph import initialize, program_from_loss
from tfspark.graph.from_train_op import program_from_train_op
from tfspark.graphdef.loader import load

v1 = tf.compat.v1
ROWS = 6
RATE = 0.1


def images() -> Any:
    return v1.placeholder(tf.float32, [None, 12, 12, 1], "x")


def batch_norm(x: Any) -> Any:
    """As TF1's layers do it: moving averages through UPDATE_OPS."""
    size = [x.shape[-1]]
    scale = v1.get_variable("gamma", size, initializer=v1.ones_initializer())
    offset = v1.get_variable("beta", size, initializer=v1.zeros_initializer())
    moving = v1.get_variable("mean", size, initializer=v1.zeros_initializer(), trainable=False)
    count = v1.get_variable(
        "count", [], tf.int32, initializer=v1.zeros_initializer(), trainable=False
    )
    y, mean, _ = v1.nn.fused_batch_norm(x, scale, offset)
    v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, v1.assign_sub(moving, (moving - mean) * 0.1))
    v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, v1.assign_add(count, 1))
    return y


def lenet(x: Any, y: Any) -> Any:
    net = slim.max_pool2d(slim.conv2d(x, 4, [5, 5]), [2, 2], 2)
    net = slim.fully_connected(slim.flatten(net), 8)
    return slim.fully_connected(net, 10, activation_fn=None)


def normalized(x: Any, y: Any) -> Any:
    return slim.fully_connected(slim.flatten(batch_norm(x)), 10, activation_fn=None)


def embedded(x: Any, y: Any) -> Any:
    table = v1.get_variable("table", [10, 10])
    return tf.nn.embedding_lookup(table, (y * 7) % 10)


def looped(x: Any, y: Any) -> Any:
    kernel = v1.get_variable("kernel", [10, 10])
    first = slim.fully_connected(slim.flatten(x), 10)
    _, last = tf.while_loop(
        lambda i, _: i < 3, lambda i, h: (i + 1, tf.tanh(h @ kernel)), [tf.constant(0), first]
    )
    return last


def conditional(x: Any, y: Any) -> Any:
    flat = slim.flatten(x)
    left = v1.get_variable("left", [144, 10])
    right = v1.get_variable("right", [144, 10])
    return tf.cond(tf.reduce_sum(flat) > 0, lambda: flat @ left, lambda: flat @ right + 1)


GRAPHS = [lenet, normalized, embedded, looped, conditional]


def built(model: Callable[[Any, Any], Any], seed: int = 3) -> tuple[Any, Any, Any, Any]:
    """Loss, session and placeholders of a model, in a graph of its own."""
    graph = tf.Graph()
    with graph.as_default():
        v1.set_random_seed(seed)
        x, y = images(), v1.placeholder(tf.int32, [None], "y")
        logits = model(x, y)
        loss = tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits)
        )
        session = v1.Session(graph=graph)
    return loss, session, x, y


def batches(count: int) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        [rng.normal(size=(ROWS, 12, 12, 1)).astype("f"), rng.integers(0, 10, ROWS).astype("i")]
        for _ in range(count)
    ]


def call(bound: Any, flat: Any, state: Any, batch: Any, seed: int = 0) -> list[np.ndarray]:
    columns = [batch[index] for index in bound.program.batch]
    rows = np.int64(len(batch[0]))
    outputs = load(bound.program.graph)(flat, *state, *columns, rows, rows, np.array([seed, 0]))
    return joined(bound.program, outputs)


@pytest.mark.parametrize("model", GRAPHS, ids=lambda model: model.__name__)
@pytest.mark.parametrize("finalized", [False, True], ids=["open", "finalized"])
def test_same_weights_as_a_session(model: Any, finalized: bool) -> None:
    loss, session, x, y = built(model)
    graph = session.graph
    with graph.as_default():
        updates = v1.get_collection(v1.GraphKeys.UPDATE_OPS)
        initialize(session)
        before = {v.name: session.run(v) for v in v1.global_variables()}
        size = len(graph.get_operations())
        if finalized:
            graph.finalize()
    bound = program_from_loss(loss, session=session, inputs=[(x, 0), (y, 1)])
    assert len(graph.get_operations()) == size
    flat, state = bound.flat, list(bound.state)
    losses = []
    for batch in batches(3):
        total, gradient, *state = call(bound, flat, state, batch)
        flat = flat - RATE * gradient / ROWS
        losses.append(total / ROWS)

    # An independent copy of the same model and values, trained by TensorFlow itself.
    other_loss, other, other_x, other_y = built(model)
    with other.graph.as_default():
        step = v1.train.GradientDescentOptimizer(RATE).minimize(other_loss)
        updates = v1.get_collection(v1.GraphKeys.UPDATE_OPS)
        with tf.control_dependencies(updates):
            step = tf.group(step, *updates)
        variables = v1.global_variables()
        for variable in variables:
            other.run(variable.initializer, {variable.initializer.inputs[1]: before[variable.name]})
        expected = [
            other.run([other_loss, step], {other_x: b[0], other_y: b[1]})[0] for b in batches(3)
        ]
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
        trained = {v.name: other.run(v) for v in variables}
    assert any(not np.array_equal(trained[name], before[name]) for name in before)
    bound.assign(flat, state)
    for variable in [*bound.weight_variables, *bound.state_variables]:
        np.testing.assert_allclose(
            session.run(variable), trained[variable.name], rtol=1e-4, atol=1e-6
        )


V1_SCRIPT = """
    import sys
    import numpy as np
    import tensorflow.compat.v1 as tf
    tf.disable_v2_behavior()
    from tfspark.graph.from_graph import program_from_loss
    from tfspark.graphdef.loader import load

    x = tf.placeholder(tf.float32, [None, 4])
    kernel = tf.get_variable("kernel", [4, 4])
    moving = tf.get_variable("moving", [4], trainable=False, initializer=tf.zeros_initializer())
    assert kernel.op.type == "VariableV2"
    _, hidden = tf.while_loop(
        lambda i, _: i < 3, lambda i, h: (i + 1, tf.tanh(tf.matmul(h, kernel))), [0, x]
    )
    hidden = tf.cond(tf.reduce_sum(x) > 0, lambda: hidden * 2, lambda: tf.matmul(hidden, kernel))
    tf.add_to_collection(
        tf.GraphKeys.UPDATE_OPS, tf.assign(moving, moving * 0.5 + tf.reduce_mean(x, 0))
    )
    loss = tf.reduce_mean(hidden ** 2)
    types = {op.type for op in tf.get_default_graph().get_operations()}
    assert {"Enter", "Switch", "Merge"} <= types
    session = tf.Session()
    bound = program_from_loss(loss, session=session, inputs=[(x, 0)])
    gradient = tf.gradients(loss, kernel)[0]
    run = load(bound.program.graph)
    for sign in (1, -1):
        rows = sign * np.abs(np.random.default_rng(0).normal(size=(5, 4))).astype("f")
        outputs = run(
            bound.flat, *bound.state, rows, np.int64(5), np.int64(5), np.zeros(2, np.int64)
        )
        total, slope, state = [output.numpy() for output in outputs]
        expected_loss, expected = session.run([loss, gradient], {x: rows})
        np.testing.assert_allclose(total / 5, expected_loss, rtol=1e-5)
        np.testing.assert_allclose(slope / 5, expected.ravel(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state, rows.mean(0), rtol=1e-5)
    bound.assign(np.arange(16, dtype="f"), [np.ones(4, "f")])
    np.testing.assert_array_equal(session.run(kernel), np.arange(16).reshape(4, 4))
    np.testing.assert_array_equal(session.run(moving), np.ones(4))
    print("same")
"""


def test_a_script_without_v2_behavior(run_python: Any) -> None:
    assert run_python(V1_SCRIPT).stdout.strip().endswith("same")


def test_dropout_draws_from_the_seed_alone() -> None:
    def dropped(x: Any, y: Any) -> Any:
        return slim.fully_connected(
            v1.nn.dropout(slim.flatten(x), rate=0.5), 10, activation_fn=None
        )

    loss, session, x, y = built(dropped)
    bound = program_from_loss(loss, session=session, inputs=[(x, 0), (y, 1)])
    (batch,) = batches(1)
    first, again, other = (call(bound, bound.flat, bound.state, batch, s)[1] for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_keeps_values_and_initializes_the_rest() -> None:
    loss, session, x, y = built(embedded)
    with session.graph.as_default():
        (table,) = v1.global_variables()
        step = v1.train.create_global_step()
        session.run(table.initializer)
        before = session.run(table)
    bound = program_from_loss(loss, session=session, inputs=[(x, 0), (y, 1)])
    np.testing.assert_array_equal(bound.flat, before.ravel())
    assert session.run(step) == 0
    assert bound.program.batch == (1,)  # the images are not used


def test_a_value_for_training_and_one_for_evaluation() -> None:
    with tf.Graph().as_default() as graph:
        x, keep = v1.placeholder(tf.float32, [None, 2]), v1.placeholder(tf.float32, [], "keep")
        weight = v1.get_variable("w", [2], initializer=v1.ones_initializer())
        loss = tf.reduce_mean(x * weight) * keep
        session = v1.Session(graph=graph)
    with pytest.raises(ProgramError, match="Received: keep, which is neither"):
        program_from_loss(loss, session=session, inputs=[(x, 0)])
    bound = program_from_loss(
        loss, session=session, inputs=[(x, 0)], tensor_with_value={"keep": (0.25, 1.0)}
    )
    total, _ = call(bound, bound.flat, (), [np.ones((4, 2), "f")])
    assert total / 4 == pytest.approx(0.25)


def test_groups_are_contiguous() -> None:
    loss, session, x, y = built(lenet)
    bound = program_from_loss(
        loss,
        session=session,
        inputs=[(x, 0), (y, 1)],
        group_of=lambda name: 0 if name.startswith("fully") else 1,
    )
    assert [weight.group for weight in bound.program.weights] == [0, 0, 0, 0, 1, 1]
    assert bound.program.weights[-1].name == "Conv/biases"


def bad_loss(make: Callable[[Any, Any], Any]) -> Any:
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, [None, 2], "x")
        weight = v1.get_variable("w", [2])
        loss = make(x, weight)
        session = v1.Session(graph=graph)
    return program_from_loss(loss, session=session, inputs=[(x, 0)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x, w: x * w, r"must be a scalar. Received: 'mul:0' of shape \(None, 2\)"),
        (lambda x, w: tf.reduce_mean(x), "depend on a trainable variable"),
        (lambda x, w: tf.reduce_mean(w), "uses none of its tensors x:0"),
        (lambda x, w: tf.reduce_mean(tf.cast(x * w, tf.int32)), "must be a float"),
        (
            lambda x, w: tf.reduce_mean(v1.py_func(lambda a: a, [x], tf.float32) * w),
            "PyFunc.*do it in the RDD",
        ),
    ],
)
def test_refuses_a_bad_loss(make: Any, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        bad_loss(make)


def test_refuses_a_loss_of_another_graph() -> None:
    loss, _, x, _ = built(lenet)
    _, other, other_x, _ = built(lenet)
    with pytest.raises(ProgramError, match="session's graph"):
        program_from_loss(loss, session=other, inputs=[(x, 0)])
    loss, session, _, _ = built(lenet)
    with pytest.raises(ProgramError, match="graph of the data set's tensors"):
        program_from_loss(loss, session=session, inputs=[(other_x, 0)])


@pytest.mark.parametrize(
    "make",
    [
        lambda: v1.train.GradientDescentOptimizer(0.1),
        lambda: v1.train.MomentumOptimizer(0.1, 0.9),
        lambda: v1.train.MomentumOptimizer(0.1, 0.9, use_nesterov=True),
        lambda: v1.train.AdamOptimizer(0.01, 0.8, 0.99, 1e-4),
        lambda: v1.train.AdagradOptimizer(0.1, 0.2),
        lambda: v1.train.AdadeltaOptimizer(0.5, 0.9, 1e-5),
        lambda: v1.train.FtrlOptimizer(0.1, -0.5, 0.2, 0.01, 0.02),
    ],
    ids=["sgd", "momentum", "nesterov", "adam", "adagrad", "adadelta", "ftrl"],
)
def test_a_training_operation_as_a_keras_optimizer(make: Callable[[], Any]) -> None:
    loss, session, x, y = built(lenet)
    with session.graph.as_default():
        step = make().minimize(loss, global_step=v1.train.create_global_step())
    bound, optimizer = program_from_train_op(step, loss, session=session, inputs=[(x, 0), (y, 1)])
    flat = tf.Variable(bound.flat)
    optimizer.build([flat])
    for batch in batches(3):
        _, gradient = call(bound, flat.numpy(), (), batch)
        optimizer.apply([tf.constant(gradient / ROWS)])
        session.run(step, {x: batch[0], y: batch[1]})
    expected = [session.run(v).ravel() for v in bound.weight_variables]
    np.testing.assert_allclose(flat, np.concatenate(expected), rtol=1e-4, atol=1e-6)


def test_refuses_rules_without_a_keras_counterpart() -> None:
    loss, session, x, y = built(lenet)
    with session.graph.as_default():
        step = v1.train.RMSPropOptimizer(0.1).minimize(loss)
    with pytest.raises(UnsupportedRuleError, match="RMSProp"):
        program_from_train_op(step, loss, session=session, inputs=[(x, 0), (y, 1)])
    loss, session, x, y = built(lenet)
    with session.graph.as_default():
        rate = v1.train.exponential_decay(0.1, v1.train.create_global_step(), 10, 0.9)
        step = v1.train.GradientDescentOptimizer(rate).minimize(loss)
    with pytest.raises(UnsupportedRuleError, match="depends on global_step"):
        program_from_train_op(step, loss, session=session, inputs=[(x, 0), (y, 1)])
