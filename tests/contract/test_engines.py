"""What every engine must do: train like plain Keras, on any partitions, the same every time."""

import functools

import keras
import numpy as np
import optree
import pytest
import tensorflow as tf
from keras_models import MODELS
from keras_reference import global_batches, rank_batches

from tfspark import LARS, LinearScaling, MaxIteration, TFDataset, TFOptimizer
from tfspark.data.order import BatchOrder

BATCH, SEED, STEPS = 8, 11, 5
OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "nesterov": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "amsgrad": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "adagrad": lambda: keras.optimizers.Adagrad(0.05),
    "adadelta": lambda: keras.optimizers.Adadelta(0.5),
    "adamax": lambda: keras.optimizers.Adamax(0.01),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, centered=True, momentum=0.5),
    "ftrl": lambda: keras.optimizers.Ftrl(0.05),
    "lion": lambda: keras.optimizers.Lion(0.005),
    "lamb": lambda: keras.optimizers.Lamb(0.02, weight_decay=0.1),
    "lamb_clipnorm": lambda: keras.optimizers.Lamb(0.02, clipnorm=0.05),
    "lars": lambda: LARS(0.1, weight_decay=0.1, trust_coefficient=0.2),
    "clipvalue": lambda: keras.optimizers.SGD(0.5, clipvalue=0.02),
    "clipnorm": lambda: keras.optimizers.SGD(0.5, clipnorm=0.05),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.5, global_clipnorm=0.05),
    "schedule": lambda: keras.optimizers.SGD(
        keras.optimizers.schedules.ExponentialDecay(0.1, decay_steps=2, decay_rate=0.5)
    ),
}


def compiled(name, optimizer):
    """A model with the same initial weights every time."""
    keras.utils.set_random_seed(5)
    model, loss = MODELS[name][0]()
    model.compile(optimizer, loss)
    return model


def partitions(name, sizes):
    """For every rank its rows as `(x, y)` structures of arrays."""
    return [MODELS[name][1](rows, 100 * rank) for rank, rows in enumerate(sizes)]


def dataset(sc, parts):
    """A data set whose partition `r` holds exactly `parts[r]`."""
    leaves = [optree.tree_leaves(part) for part in parts]
    treedef = optree.tree_structure(parts[0])

    def rows(rank):
        for values in zip(*leaves[rank], strict=True):
            yield optree.tree_unflatten(treedef, values)

    features, labels = optree.tree_map(lambda a: (a.dtype.name, a.shape[1:]), parts[0])
    return TFDataset.from_rdd(
        sc.parallelize(range(len(parts)), len(parts)).flatMap(rows),
        features=features,
        labels=labels,
        batch_size=BATCH,
        seed=SEED,
    )


def trained(sc, engine, name, optimizer, sizes, steps=STEPS, **settings):
    """Weights after training by an engine."""
    parts = partitions(name, sizes)
    model = compiled(name, optimizer)
    training = TFOptimizer.from_keras(
        model, dataset(sc, parts), engine=engine, num_ranks=len(sizes), progress=False, **settings
    )
    training.optimize(MaxIteration(steps))
    training.close()
    return model.get_weights()


def reference(name, optimizer, sizes, steps=STEPS):
    """Weights after plain Keras on the same global batches."""
    parts = partitions(name, sizes)
    treedef = optree.tree_structure(parts[0])
    order = BatchOrder(tuple(sizes), BATCH, SEED, shuffle=True)
    model = compiled(name, optimizer)
    for batch in global_batches(order, [optree.tree_leaves(part) for part in parts], steps):
        x, y = optree.tree_unflatten(treedef, batch)
        train_on_batch(model, _listed(x), _listed(y))
    return model.get_weights()


def train_on_batch(model, x, y):
    """`model.train_on_batch`, with the gradient of an embedding as the array that it is.

    On TensorFlow, Keras 3 gives optimizers the rows of such a gradient as they come, one per
    occurrence of an index, and Adam's square of them is then a sum of squares instead of the square
    of the sum. On its other backends, and here, it is the gradient's.
    """
    if not any(isinstance(layer, keras.layers.Embedding) for layer in model.layers):
        model.train_on_batch(x, y)
        return
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x, training=True))
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    dense = [tf.convert_to_tensor(gradient) for gradient in gradients]
    model.optimizer.apply(dense, model.trainable_variables)


def _listed(value):
    return list(value) if isinstance(value, tuple) else value


def assert_close(left, right, rtol=1e-4, atol=1e-6):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", MODELS)
def test_trains_like_plain_keras(sc, engine, name):
    # BatchNorm sees a rank's rows only: on one rank it is plain Keras, on more see below.
    sizes = (20,) if name == "convolution" else (13, 7)
    adam = keras.optimizers.Adam
    weights = trained(sc, engine, name, adam(0.01), sizes)
    assert_close(weights, reference(name, adam(0.01), sizes))
    initial = compiled(name, adam(0.01)).get_weights()
    assert any((a != b).any() for a, b in zip(weights, initial, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_is_keras(sc, engine, optimizer):
    make = OPTIMIZERS[optimizer]
    assert_close(trained(sc, engine, "dense", make(), (13, 7)), reference("dense", make(), (13, 7)))


@pytest.mark.parametrize(
    "sizes",
    [(20,), (19, 1), (0, 20), (2, 0, 1), (9, 9, 2)],
    ids=["one rank", "unequal", "an empty rank", "fewer rows than ranks", "three ranks"],
)
def test_any_partitions(sc, engine, sizes):
    sgd = keras.optimizers.SGD
    assert_close(trained(sc, engine, "dense", sgd(0.1), sizes), reference("dense", sgd(0.1), sizes))


def test_an_embedding_with_a_linear_rule_is_plain_keras(sc, engine):
    sizes, parts = (13, 7), partitions("embedding", (13, 7))
    make = functools.partial(keras.optimizers.SGD, 0.1, momentum=0.9)
    model = compiled("embedding", make())
    order = BatchOrder(sizes, BATCH, SEED, shuffle=True)
    for x, y in global_batches(order, parts, STEPS):
        model.train_on_batch(x, y)
    assert_close(trained(sc, engine, "embedding", make(), sizes), model.get_weights())


def test_model_state_is_merged_by_rows(sc, engine):
    """BatchNorm on two ranks: each rank's statistics, averaged by rows, written out by hand."""
    sizes = (13, 7)
    parts = partitions("convolution", sizes)
    weights = trained(sc, engine, "convolution", keras.optimizers.SGD(0.1), sizes)

    model = compiled("convolution", keras.optimizers.SGD(0.1))
    order = BatchOrder(sizes, BATCH, SEED, shuffle=True)
    for batch in rank_batches(order, parts, STEPS):
        rows = [len(y) for _, y in batch]
        state = [v.numpy() for v in model.non_trainable_variables]
        gradients, states = [], []
        for x, y in batch:
            for variable, value in zip(model.non_trainable_variables, state, strict=True):
                variable.assign(value)
            with tf.GradientTape() as tape:
                loss = model.compute_loss(x, y, model(x, training=True))
            gradients.append(tape.gradient(loss, [v.value for v in model.trainable_variables]))
            states.append([v.numpy() for v in model.non_trainable_variables])
        mean = [
            sum(n * np.asarray(g) for n, g in zip(rows, every, strict=True)) / sum(rows)
            for every in zip(*gradients, strict=True)
        ]
        model.optimizer.apply(mean, model.trainable_variables)
        for variable, every in zip(
            model.non_trainable_variables, zip(*states, strict=True), strict=True
        ):
            variable.assign(sum(n * s for n, s in zip(rows, every, strict=True)) / sum(rows))
    assert_close(weights, model.get_weights())


def test_the_same_run_twice_gives_the_same_bits(sc, engine):
    first, second = (
        trained(sc, engine, "lstm", keras.optimizers.Adam(0.01), (13, 7)) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_norms_of_tensors_that_straddle_three_ranks(sc, engine):
    make, sizes = OPTIMIZERS["lamb"], (9, 0, 4)
    assert_close(
        trained(sc, engine, "lstm", make(), sizes), reference("lstm", make(), sizes), atol=1e-5
    )


def test_schedules_learn_of_batches_and_epochs(sc):
    sgd, scaling = keras.optimizers.SGD, functools.partial(LinearScaling, 0.02, 4, 1)
    known = scaling(batch_size=BATCH, steps_per_epoch=3)  # 20 rows
    assert_close(
        trained(sc, "local", "dense", sgd(scaling()), (13, 7)),
        reference("dense", sgd(known), (13, 7)),
    )


@pytest.mark.parametrize("wire_dtype", ["bfloat16", "float16"])
def test_a_rounded_wire_rounds_weights_and_gradients_and_nothing_else(sc, engine, wire_dtype):
    """Written out by hand: the weights that are stepped, and the sum, are of full precision."""
    sizes, sgd = (13, 7), keras.optimizers.SGD
    model = compiled("dense", sgd(0.1))
    weights = model.get_weights()

    def rounded(values):
        return np.asarray(values).astype(wire_dtype).astype(np.float32)

    order = BatchOrder(sizes, BATCH, SEED, shuffle=True)
    for batch in rank_batches(order, partitions("dense", sizes), STEPS):
        model.set_weights([rounded(w) for w in weights])
        total = [np.zeros_like(w) for w in weights]
        for x, y in batch:
            with tf.GradientTape() as tape:
                loss = len(y) * model.compute_loss(x, y, model(x, training=True))
            gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
            for t, gradient in zip(total, gradients, strict=True):
                t += BATCH * rounded(gradient.numpy() / BATCH)
        rows = sum(len(y) for _, y in batch)
        weights = [w - np.float32(0.1) * t / rows for w, t in zip(weights, total, strict=True)]
    found = trained(sc, engine, "dense", sgd(0.1), sizes, wire_dtype=wire_dtype)
    exact = trained(sc, engine, "dense", sgd(0.1), sizes)

    def distance(others):
        return sum(np.abs(a - b).sum() for a, b in zip(found, others, strict=True))

    # Where an element lies between two values, the last bits decide to which it is rounded.
    assert distance(weights) < 0.1 * distance(exact)
    assert_close(found, exact, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize(
    "optimizer, wire_dtype",
    [("adam", None), ("lamb_clipnorm", None), ("lars", None), ("adam", "bfloat16")],
)
def test_all_engines_give_the_same_bits(sc, optimizer, wire_dtype):
    results = [
        trained(sc, engine, "dense", OPTIMIZERS[optimizer](), (13, 7), wire_dtype=wire_dtype)
        for engine in ("local", "shuffle", "gang")
    ]
    for reference, *others in zip(*results, strict=True):
        for other in others:
            np.testing.assert_array_equal(other, reference)


def test_parts_of_a_batch_change_nothing(sc, engine):
    adam = keras.optimizers.Adam
    assert_close(
        trained(sc, engine, "dense", adam(0.01), (13, 7), accumulation_steps=3),
        reference("dense", adam(0.01), (13, 7)),
    )
