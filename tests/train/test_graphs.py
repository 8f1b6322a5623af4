"""Graph scripts through TFOptimizer, against a plain TF1 session on the same batches."""

import numpy as np
import pytest
import tensorflow as tf
import tf_slim as slim
from keras.optimizers import SGD
from training import assert_close, batches, classified, differ

from tfspark import Adam, MaxEpoch, MaxIteration, TFDataset, TFOptimizer, Top1Accuracy
from tfspark.errors import InvalidInputError

v1 = tf.compat.v1
RATE, STEPS, ROWS = 0.1, 7, 22
LOCAL = {"engine": "local", "progress": False}


def cross_entropy(labels, logits):
    return tf.reduce_mean(
        tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels=tf.reshape(labels, [-1]), logits=logits
        )
    )


def vector_labels():
    x, y = classified(ROWS)
    one_hot = np.eye(3, dtype=np.float32)[y]

    def loss(tensors):
        features, labels = tensors
        logits = slim.fully_connected(features, 3, activation_fn=None)
        return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(labels=labels, logits=logits))

    return (x, one_hot), loss


def scalar_labels():
    x, y = classified(ROWS)

    def loss(tensors):
        features, labels = tensors
        assert labels.shape.as_list() == [None]
        return cross_entropy(labels, slim.fully_connected(features, 3, activation_fn=None))

    return (x, y), loss


def labels_of_one_column():
    x, y = classified(ROWS)

    def loss(tensors):
        features, labels = tensors
        assert labels.shape.as_list() == [None, 1]
        return cross_entropy(labels, slim.fully_connected(features, 3, activation_fn=None))

    return (x, y[:, None]), loss


def several_inputs():
    x, y = classified(ROWS)
    rng = np.random.default_rng(2)
    tensors = ({"left": x, "right": [rng.normal(size=(ROWS, 2, 2)).astype("f"), y]}, y)

    def loss(tensors):
        features, labels = tensors
        matrix, again = features["right"]
        flat = tf.concat([features["left"], tf.reshape(matrix, [-1, 4])], 1)
        flat += tf.cast(again, tf.float32)[:, None]
        return cross_entropy(labels, slim.fully_connected(flat, 3, activation_fn=None))

    return tensors, loss


def embedded():
    _, y = classified(ROWS)
    ids = np.random.default_rng(4).integers(0, 9, (ROWS, 3)).astype("i")

    def loss(tensors):
        ids, labels = tensors
        table = v1.get_variable("table", [9, 4])
        words = tf.nn.embedding_lookup(table, ids)
        return cross_entropy(labels, slim.fully_connected(slim.flatten(words), 3))

    return (ids, y), loss


def branched():
    x, y = classified(ROWS)

    def loss(tensors):
        features, labels = tensors
        left, right = (v1.get_variable(name, [6, 3]) for name in ("left", "right"))
        # On one row at a time, so that the branch is the same however rows fall on ranks.
        logits = tf.where(
            tf.reduce_sum(features, 1, keepdims=True) > 0, features @ left, features @ right
        )
        scale = tf.cond(tf.reduce_sum(left) > 1e9, lambda: 2.0, lambda: tf.reduce_sum(right[0]))
        return cross_entropy(labels, logits * scale)

    return (x, y), loss


def looped():
    x, y = classified(ROWS)

    def loss(tensors):
        features, labels = tensors
        kernel = v1.get_variable("kernel", [6, 6])
        _, hidden = tf.while_loop(
            lambda i, _: i < 3,
            lambda i, h: (i + 1, tf.tanh(h @ kernel)),
            [tf.constant(0), features],
        )
        return cross_entropy(labels, hidden[:, :3])

    return (x, y), loss


def batch_norm(x):
    """As TF1's layers do it: moving averages through UPDATE_OPS."""
    ones, zeros = v1.ones_initializer(), v1.zeros_initializer()
    scale = v1.get_variable("scale", [5], initializer=ones)
    offset = v1.get_variable("offset", [5], initializer=zeros)
    mean, variance = tf.nn.moments(x, 0)
    for name, value in (("moving_mean", mean), ("moving_variance", variance)):
        moving = v1.get_variable(name, [5], initializer=zeros, trainable=False)
        update = v1.assign_sub(moving, (moving - value) * 0.2)
        v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, update)
    return tf.nn.batch_normalization(x, mean, variance, offset, scale, 1e-3)


def normalized():
    """BatchNorm with UPDATE_OPS: plain TensorFlow on one rank only."""
    x, y = classified(ROWS)

    def loss(tensors):
        features, labels = tensors
        net = batch_norm(slim.fully_connected(features, 5))
        return cross_entropy(labels, slim.fully_connected(net, 3, activation_fn=None))

    return (x, y), loss


ANY_RANKS = [
    vector_labels,
    scalar_labels,
    labels_of_one_column,
    several_inputs,
    embedded,
    branched,
    looped,
]
GRAPHS = [*((make, ranks) for make in ANY_RANKS for ranks in (1, 2)), (normalized, 1)]


def variables_of(session):
    """Values by name; without those that a Keras optimizer made where it was constructed."""
    with session.graph.as_default():
        made = ("iteration", "learning_rate")
        own = [v for v in v1.global_variables() if v.op.name.split("/")[-1] not in made]
        return {v.name: session.run(v) for v in own}


def by_session(loss_of, dataset, tensors, ranks, before, feeds=None, steps=STEPS, rule=None):
    """Values after the same batches in a plain session, from the same initial values."""
    rule = rule or (lambda loss: v1.train.GradientDescentOptimizer(RATE).minimize(loss))
    with tf.Graph().as_default() as graph:
        inputs = dataset.tensors
        loss = loss_of(inputs)
        updates = v1.get_collection(v1.GraphKeys.UPDATE_OPS)
        own = v1.global_variables()
        with tf.control_dependencies(updates):
            step = rule(loss)
        session = v1.Session(graph=graph)
        session.run(v1.global_variables_initializer())
        for variable in own:
            session.run(
                variable.initializer, {variable.initializer.inputs[1]: before[variable.name]}
            )
        placeholders = dataset.row_spec.flatten(inputs)
        for batch in batches(dataset, tensors, ranks, steps):
            given = {graph.get_tensor_by_name(k): v for k, v in (feeds or {}).items()}
            session.run(step, {**dict(zip(placeholders, batch, strict=True)), **given})
        return {v.name: session.run(v) for v in own}


def assert_same_variables(left, right):
    assert left.keys() == right.keys()
    assert_close(left.values(), right.values())


@pytest.mark.parametrize(
    ("make", "ranks"), GRAPHS, ids=[f"{make.__name__}-{ranks}" for make, ranks in GRAPHS]
)
def test_trains_like_a_session(make, ranks):
    tensors, loss_of = make()
    dataset = TFDataset.from_ndarrays(tensors, batch_size=8, seed=3)
    with tf.Graph().as_default():
        loss = loss_of(dataset.tensors)
        optimizer = TFOptimizer.from_loss(loss, SGD(RATE), num_ranks=ranks, **LOCAL)
        before = variables_of(optimizer.sess)
        optimizer.optimize(MaxIteration(STEPS))
        after = variables_of(optimizer.sess)
    assert differ(before.values(), after.values())
    assert_same_variables(after, by_session(loss_of, dataset, tensors, ranks, before))


def test_placeholders_of_ones_own_and_values_of_the_others():
    """`inputs=`, and `tensor_with_value` with one value in training and one in evaluation."""
    tensors = classified(ROWS)
    dataset = TFDataset.from_ndarrays(tensors, batch_size=8, val_tensors=tensors)

    def loss_of(inputs):
        features, labels = inputs
        scale = v1.placeholder(tf.float32, [], "scale")
        return cross_entropy(
            labels, scale * slim.fully_connected(features, 3, activation_fn=None, scope="out")
        )

    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, [None, 6], "x")
        y = v1.placeholder(tf.int32, [None], "y")
        loss = loss_of((x, y))
        scale = graph.get_tensor_by_name("scale:0")
        optimizer = TFOptimizer.from_loss(
            loss,
            SGD(RATE),
            inputs=(x, y),
            dataset=dataset,
            tensor_with_value={scale: (2.0, 0.5)},
            num_ranks=2,
            **LOCAL,
        )
        before = variables_of(optimizer.sess)
        optimizer.optimize(MaxIteration(STEPS), validation_trigger=MaxIteration(STEPS))
        after = variables_of(optimizer.sess)
        evaluated = optimizer.sess.run(loss, {x: tensors[0], y: tensors[1], scale: 0.5})
    expected = by_session(loss_of, dataset, tensors, 2, before, {"scale:0": 2.0})
    assert_same_variables(after, expected)
    assert optimizer.scores["loss"] == pytest.approx(float(evaluated), rel=1e-5)


def test_dropout_is_on_in_training_and_off_in_evaluation():
    tensors = classified(ROWS)
    dataset = TFDataset.from_ndarrays(tensors, batch_size=8, val_tensors=tensors)

    def run(training_rate):
        with tf.Graph().as_default():
            v1.set_random_seed(1)
            features, labels = dataset.tensors
            rate = v1.placeholder_with_default(0.0, [], "rate")
            hidden = v1.nn.dropout(slim.fully_connected(features, 16), rate=rate)
            logits = slim.fully_connected(hidden, 3, activation_fn=None)
            loss = cross_entropy(labels, logits)
            optimizer = TFOptimizer.from_loss(
                loss,
                SGD(RATE),
                tensor_with_value={rate: (training_rate, 0.0)},
                val_outputs=logits,
                val_labels=labels,
                val_method=Top1Accuracy(),
                num_ranks=2,
                **LOCAL,
            )
            optimizer.optimize(MaxIteration(STEPS), validation_trigger=MaxIteration(STEPS))
            feeds = dict(zip(dataset.tensors, tensors, strict=True))
            predicted = np.argmax(optimizer.sess.run(logits, feeds), 1)
            assert optimizer.scores["top1_accuracy"] == pytest.approx(
                np.mean(predicted == tensors[1])
            )
            return list(variables_of(optimizer.sess).values())

    dropped, again, plain = run(0.5), run(0.5), run(0.0)
    for a, b in zip(dropped, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert differ(dropped, plain)


def test_the_session_saves_and_restores_trained_weights(tmp_path):
    tensors, loss_of = normalized()
    dataset = TFDataset.from_ndarrays(tensors, batch_size=8)
    path, rule = str(tmp_path / "model"), Adam(0.01)
    with tf.Graph().as_default():
        optimizer = TFOptimizer.from_loss(loss_of(dataset.tensors), rule, num_ranks=1, **LOCAL)
        before = variables_of(optimizer.sess)
        optimizer.optimize(MaxEpoch(2))
        trained = variables_of(optimizer.sess)
        v1.train.Saver().save(optimizer.sess, path)
    assert all(differ([before[name]], [trained[name]]) for name in before if "moving" in name)
    with tf.Graph().as_default():
        loss_of(dataset.tensors)
        session = v1.Session()
        v1.train.Saver().restore(session, path)
        restored = variables_of(session)
    assert restored.keys() == trained.keys()
    for name, value in trained.items():
        np.testing.assert_array_equal(restored[name], value)


def test_values_restored_into_the_session_are_what_training_starts_from(tmp_path):
    tensors, loss_of = scalar_labels()
    dataset = TFDataset.from_ndarrays(tensors, batch_size=8)
    path, rule = str(tmp_path / "model"), SGD(RATE)
    with tf.Graph().as_default():
        optimizer = TFOptimizer.from_loss(loss_of(dataset.tensors), rule, num_ranks=1, **LOCAL)
        optimizer.optimize(MaxIteration(3))
        v1.train.Saver().save(optimizer.sess, path)
        start = variables_of(optimizer.sess)
    with tf.Graph().as_default():
        optimizer = TFOptimizer.from_loss(loss_of(dataset.tensors), rule, num_ranks=1, **LOCAL)
        v1.train.Saver().restore(optimizer.sess, path)
        optimizer.optimize(MaxIteration(STEPS))
        after = variables_of(optimizer.sess)
    assert_same_variables(after, by_session(loss_of, dataset, tensors, 1, start))


def test_two_optimizers_take_turns_on_one_graph():
    """The second starts from what the first has trained, in the same session."""
    tensors = classified(ROWS)
    dataset = TFDataset.from_ndarrays(tensors, batch_size=8)
    with tf.Graph().as_default():
        features, labels = dataset.tensors
        hidden = slim.fully_connected(features, 5, scope="hidden")
        first = cross_entropy(
            labels, slim.fully_connected(hidden, 3, activation_fn=None, scope="a")
        )
        second = tf.reduce_mean(slim.fully_connected(hidden, 1, activation_fn=None, scope="b") ** 2)
        session = v1.Session()
        one = TFOptimizer.from_loss(first, SGD(RATE), session, num_ranks=1, **LOCAL)
        two = TFOptimizer.from_loss(second, SGD(RATE), session, num_ranks=1, **LOCAL)
        start = variables_of(session)
        one.optimize(MaxIteration(3))
        between = variables_of(session)
        two.optimize(MaxIteration(3))
        after = variables_of(session)

    def second_of(inputs):
        hidden = slim.fully_connected(inputs[0], 5, scope="hidden")
        slim.fully_connected(hidden, 3, activation_fn=None, scope="a")
        return tf.reduce_mean(slim.fully_connected(hidden, 1, activation_fn=None, scope="b") ** 2)

    def name_group(values, scope):
        return [value for name, value in values.items() if name.startswith(scope)]

    assert differ(name_group(start, "a/"), name_group(between, "a/"))
    assert not differ(name_group(start, "b/"), name_group(between, "b/"))
    assert_same_variables(after, by_session(second_of, dataset, tensors, 1, between, steps=3))


def test_a_finalized_graph():
    tensors, loss_of = normalized()
    dataset = TFDataset.from_ndarrays(tensors, batch_size=8, val_tensors=tensors)
    rule = SGD(RATE)
    with tf.Graph().as_default() as graph:
        loss = loss_of(dataset.tensors)
        graph.finalize()
        size = len(graph.get_operations())
        optimizer = TFOptimizer.from_loss(loss, rule, num_ranks=1, **LOCAL)
        before = variables_of(optimizer.sess)
        optimizer.optimize(MaxIteration(STEPS))
        after = variables_of(optimizer.sess)
        assert len(graph.get_operations()) == size
    assert_same_variables(after, by_session(loss_of, dataset, tensors, 1, before))


@pytest.mark.parametrize(
    "rule",
    [
        lambda loss: v1.train.AdamOptimizer(0.02).minimize(loss),
        lambda loss: v1.train.MomentumOptimizer(0.05, 0.9, use_nesterov=True).minimize(loss),
    ],
    ids=["adam", "nesterov"],
)
def test_a_training_operation(rule):
    tensors, loss_of = scalar_labels()
    dataset = TFDataset.from_ndarrays(tensors, batch_size=8)
    with tf.Graph().as_default():
        loss = loss_of(dataset.tensors)
        own = [v.name for v in v1.global_variables()]
        train_op = rule(loss)
        session = v1.Session()
        session.run(v1.global_variables_initializer())
        before = variables_of(session)
        optimizer = TFOptimizer.from_train_op(
            train_op, loss, sess=session, dataset=dataset, num_ranks=2, **LOCAL
        )
        optimizer.optimize(MaxIteration(STEPS))
        after = variables_of(session)
    before, after = ({name: values[name] for name in own} for values in (before, after))
    assert differ(before.values(), after.values())
    assert_same_variables(after, by_session(loss_of, dataset, tensors, 2, before, rule=rule))


def test_groups_of_variables_by_prefix():
    """A rate of 0 freezes; a prefix may be that of a variable that this loss leaves alone."""
    tensors = classified(ROWS)
    dataset = TFDataset.from_ndarrays(tensors, batch_size=8)
    with tf.Graph().as_default():
        features, labels = dataset.tensors
        hidden = slim.fully_connected(features, 5, scope="hidden")
        loss = cross_entropy(labels, slim.fully_connected(hidden, 3, scope="out"))
        slim.fully_connected(hidden, 2, scope="elsewhere")
        optimizer = TFOptimizer.from_loss(
            loss,
            {"elsewhere": SGD(1.0), "hidden/": SGD(0.0), "out/": Adam(0.01)},
            num_ranks=2,
            **LOCAL,
        )
        before = variables_of(optimizer.sess)
        optimizer.optimize(MaxIteration(STEPS))
        after = variables_of(optimizer.sess)
    changed = {name.split("/")[0] for name in before if differ([before[name]], [after[name]])}
    assert changed == {"out"}


V1_SCRIPT = """
    import numpy as np
    import tensorflow.compat.v1 as tf
    tf.disable_v2_behavior()
    import tf_slim as slim
    from tfspark import Adam, MaxEpoch, TFDataset, TFOptimizer, Top1Accuracy

    rng = np.random.default_rng(0)
    images = rng.normal(size=(96, 8, 8, 1)).astype("f")
    labels = (images.mean((1, 2, 3)) > 0).astype("i")[:, None]
    images[:, :4] += 2 * labels[:, :, None, None]
    dataset = TFDataset.from_ndarrays(
        (images, labels), batch_size=16, val_tensors=(images, labels)
    )
    x, y = dataset.tensors
    net = slim.flatten(slim.max_pool2d(slim.conv2d(x, 4, [3, 3]), [2, 2]))
    logits = slim.fully_connected(tf.nn.dropout(net, rate=0.1), 2, activation_fn=None)
    assert tf.trainable_variables()[0].op.type == "VariableV2"
    loss = tf.reduce_mean(
        tf.nn.sparse_softmax_cross_entropy_with_logits(labels=tf.reshape(y, [-1]), logits=logits)
    )
    optimizer = TFOptimizer.from_loss(
        loss, Adam(0.01), engine="local", num_ranks=2, progress=False,
        val_outputs=logits, val_labels=y, val_method=Top1Accuracy(),
    )
    optimizer.optimize(end_trigger=MaxEpoch(4))
    path = tf.train.Saver().save(optimizer.sess, r"{folder}/model")
    trained = optimizer.sess.run(tf.global_variables())
    with tf.Session() as session:
        tf.train.Saver().restore(session, path)
        for a, b in zip(trained, session.run(tf.global_variables())):
            np.testing.assert_array_equal(a, b)
    print(optimizer.scores["top1_accuracy"])
"""


def test_a_script_without_v2_behavior(run_python, tmp_path):
    output = run_python(V1_SCRIPT.replace("{folder}", str(tmp_path))).stdout
    assert float(output.split()[-1]) > 0.8


def test_metrics_are_tensors_or_compare_outputs_with_labels():
    tensors = classified(ROWS)
    val = classified(13, seed=9)
    dataset = TFDataset.from_ndarrays(tensors, batch_size=8, val_tensors=val)
    with tf.Graph().as_default():
        features, labels = dataset.tensors
        logits = slim.fully_connected(features, 3, activation_fn=None)
        loss = cross_entropy(labels, logits)
        largest = tf.reduce_max(logits, axis=1)
        optimizer = TFOptimizer.from_loss(
            loss,
            SGD(RATE),
            val_outputs=logits,
            val_labels=labels,
            val_method="accuracy",
            metrics={"largest": largest},
            num_ranks=3,
            **LOCAL,
        )
        optimizer.optimize(MaxEpoch(1))
        feeds = dict(zip(dataset.tensors, val, strict=True))
        values = optimizer.sess.run([loss, logits, largest], feeds)
    assert optimizer.scores == pytest.approx(
        {
            "loss": values[0],
            "largest": values[2].mean(),
            "accuracy": np.mean(np.argmax(values[1], 1) == val[1]),
        },
        rel=1e-5,
    )


def test_two_metrics_of_one_name_are_refused():
    dataset = TFDataset.from_ndarrays(classified(ROWS), batch_size=8)
    with tf.Graph().as_default():
        features, labels = dataset.tensors
        logits = slim.fully_connected(features, 3)
        with pytest.raises(InvalidInputError, match="different names"):
            TFOptimizer.from_loss(
                cross_entropy(labels, logits),
                SGD(RATE),
                val_outputs=logits,
                val_labels=labels,
                val_method="accuracy",
                metrics={"accuracy": tf.reduce_max(logits)},
                **LOCAL,
            )
