"""Keras models through TFOptimizer: what `fit` would have done, on the same batches."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from training import assert_close, assert_same_bits, batches, classified, differ

from tfspark import MaxEpoch, MaxIteration, TFDataset, TFOptimizer
from tfspark.errors import ProgramError, UnsupportedRuleError

LOCAL = {"engine": "local", "progress": False}
STEPS, ROWS = 9, 26
LOSS = "sparse_categorical_crossentropy"


def model_of(*inner):
    """A classifier with the same initial weights every time."""
    model = keras.Sequential([keras.Input((6,)), *inner, layers.Dense(3, "softmax")])
    rng = np.random.default_rng(5)
    for variable in model.trainable_variables:
        if len(variable.shape) == 2:
            variable.assign(rng.normal(size=variable.shape) * 0.4)
    return model


def dense():
    return model_of(layers.Dense(8, "relu", name="hidden"))


def trained(model, tensors, ranks=2, steps=STEPS, **options):
    """Weights after our training, and the global batches it used."""
    dataset = TFDataset.from_ndarrays(tensors, batch_size=8, seed=4)
    optimizer = TFOptimizer.from_keras(model, dataset, num_ranks=ranks, **LOCAL, **options)
    optimizer.optimize(MaxIteration(steps))
    return model.get_weights(), list(batches(dataset, tensors, ranks, steps))


def test_sample_weights():
    x, y = classified(ROWS)
    weights = np.random.default_rng(1).uniform(0, 2, ROWS).astype("f")
    model, plain = dense(), dense()
    model.compile("adam", LOSS)
    plain.compile("adam", LOSS)
    ours, steps = trained(model, (x, y, weights))
    for features, labels, sample_weight in steps:
        plain.train_on_batch(features, labels, sample_weight=sample_weight)
    assert_close(ours, plain.get_weights())


def test_loss_and_optimizer_may_be_given_instead_of_compiled():
    tensors = classified(ROWS)
    model, plain = dense(), dense()
    plain.compile(keras.optimizers.SGD(0.1), LOSS)
    ours, steps = trained(model, tensors, loss=LOSS, optimizer=keras.optimizers.SGD(0.1))
    for batch in steps:
        plain.train_on_batch(*batch)
    assert_close(ours, plain.get_weights())
    assert not model.compiled


def test_loss_weights_of_two_outputs():
    def two():
        keras.utils.set_random_seed(5)
        x = keras.Input((6,))
        hidden = layers.Dense(5, "relu")(x)
        outputs = {"a": layers.Dense(3, "softmax")(hidden), "b": layers.Dense(1)(hidden)}
        model = keras.Model(x, outputs)
        model.compile("sgd", {"a": LOSS, "b": "mse"}, loss_weights={"a": 0.3, "b": 2.0})
        return model

    x, y = classified(ROWS)
    labels = {"a": y, "b": x[:, :1] * 3}
    model, plain = two(), two()
    ours, steps = trained(model, (x, labels))
    for features, a, b in steps:
        plain.train_on_batch(features, {"a": a, "b": b})
    assert_close(ours, plain.get_weights())


def test_frozen_layers_stay_as_they_are():
    """Also a frozen BatchNorm, which Keras then runs as in inference."""

    def frozen():
        model = model_of(layers.Dense(8), layers.BatchNormalization(), layers.Dense(4))
        for layer in model.layers[:2]:
            layer.trainable = False
        model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.1), LOSS)
        return model

    model, plain = frozen(), frozen()
    before = [v.numpy() for v in model.non_trainable_variables]
    assert len(before) == 6
    ours, steps = trained(model, classified(ROWS))
    for batch in steps:
        plain.train_on_batch(*batch)
    assert_same_bits([v.numpy() for v in model.non_trainable_variables], before)
    assert_close(ours, plain.get_weights())


class Subclassed(keras.Model):
    """Not built before training; its call has an argument `training` and a branch."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(8, "relu")
        self.dropout = layers.Dropout(0.0)
        self.out = layers.Dense(3, "softmax")

    def call(self, x, training=False):
        hidden = self.dropout(self.hidden(x), training=training)
        self.add_loss(0.01 * tf.reduce_mean(hidden**2))
        return self.out(hidden)


def test_a_subclassed_model():
    """Not built before: its weights are made when the optimizer is."""
    tensors = classified(ROWS)
    dataset = TFDataset.from_ndarrays(tensors, batch_size=8, seed=4)
    model, plain = Subclassed(), Subclassed()
    model.compile("adam", LOSS)
    plain.compile("adam", LOSS)
    optimizer = TFOptimizer.from_keras(model, dataset, num_ranks=2, **LOCAL)
    plain(tensors[0])
    plain.set_weights(model.get_weights())
    optimizer.optimize(MaxIteration(STEPS))
    for batch in batches(dataset, tensors, 2, STEPS):
        plain.train_on_batch(*batch)
    assert_close(model.get_weights(), plain.get_weights())


def test_a_model_that_calls_itself_built_before_its_layers_are():
    model = Subclassed()
    with pytest.warns(UserWarning, match="build"):
        model.build((None, 6))
    assert model.built and not model.weights
    ours, _ = trained(model, classified(ROWS), loss=LOSS, optimizer="adam")
    assert [w.shape for w in ours] == [(6, 8), (8,), (8, 3), (3,)]


def test_weights_loaded_after_construction_are_what_training_starts_from():
    tensors = classified(ROWS)
    dataset = TFDataset.from_ndarrays(tensors, batch_size=8)
    model, plain = dense(), dense()
    model.compile("sgd", LOSS)
    plain.compile("sgd", LOSS)
    optimizer = TFOptimizer.from_keras(model, dataset, num_ranks=1, **LOCAL)
    loaded = [weight + 0.25 for weight in model.get_weights()]
    model.set_weights(loaded)
    plain.set_weights(loaded)
    optimizer.optimize(MaxIteration(3))
    for batch in batches(dataset, tensors, 1, 3):
        plain.train_on_batch(*batch)
    assert_close(model.get_weights(), plain.get_weights())


def test_optimizers_by_prefix_and_a_rate_of_zero_freezes():
    tensors = classified(ROWS)
    model = model_of(layers.Dense(8, name="first"), layers.Dense(5, name="second"))
    before = [w.copy() for w in model.get_weights()]
    first, second, last = ({v.path for v in layer.weights} for layer in model.layers)
    prefix = {name: next(iter(paths)).rpartition("/")[0] for name, paths in
              (("first", first), ("second", second), ("last", last))}  # fmt: skip
    adam, sgd = keras.optimizers.Adam(0.02), keras.optimizers.SGD(0.1, momentum=0.9)
    still = keras.optimizers.AdamW(0.0, weight_decay=0.5)
    rules = {prefix["first"]: adam, prefix["second"]: still, prefix["last"]: sgd}
    ours, steps = trained(model, tensors, loss=LOSS, optimizer=rules)
    assert_same_bits(ours[2:4], before[2:4])

    plain = model_of(layers.Dense(8, name="first"), layers.Dense(5, name="second"))
    plain.compile(loss=LOSS)
    rules = [(keras.optimizers.Adam(0.02), plain.layers[0]),
             (keras.optimizers.SGD(0.1, momentum=0.9), plain.layers[2])]  # fmt: skip
    for x, y in steps:
        with tf.GradientTape() as tape:
            loss = plain.compute_loss(x, y, plain(x, training=True))
        gradients = tape.gradient(loss, [v.value for v in plain.trainable_variables])
        by_path = dict(zip([v.path for v in plain.trainable_variables], gradients, strict=True))
        for rule, layer in rules:
            rule.apply([by_path[v.path] for v in layer.weights], layer.weights)
    assert_close(ours, plain.get_weights())


def test_weights_excluded_from_decay():
    def excluded(model):
        rule = keras.optimizers.AdamW(0.01, weight_decay=0.5)
        rule.exclude_from_weight_decay(var_names=["bias"])
        model.compile(rule, LOSS)
        return model

    model, plain, decayed = excluded(dense()), excluded(dense()), dense()
    for weights in (model, plain, decayed):
        weights.layers[0].bias.assign(np.ones(8))
    decayed.compile(keras.optimizers.AdamW(0.01, weight_decay=0.5), LOSS)
    ours, steps = trained(model, classified(ROWS))
    for batch in steps:
        plain.train_on_batch(*batch)
        decayed.train_on_batch(*batch)
    assert_close(ours, plain.get_weights())
    assert np.abs(ours[1] - decayed.get_weights()[1]).max() > 1e-2


@pytest.mark.parametrize("every", [None, 4])
def test_moving_averages_of_weights_come_home(every):
    def averaged(model):
        rule = keras.optimizers.SGD(
            0.1, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=every
        )
        model.compile(rule, LOSS)
        return model

    model, plain = averaged(dense()), averaged(dense())
    ours, steps = trained(model, classified(ROWS))
    for batch in steps:
        plain.train_on_batch(*batch)
    trained_weights = plain.get_weights()
    plain.optimizer.finalize_variable_values(plain.trainable_variables)  # as fit does at its end
    assert differ(trained_weights, plain.get_weights())
    assert_close(ours, plain.get_weights())


def test_accumulation_of_gradients_by_keras():
    def accumulating(model):
        model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=3), LOSS)
        return model

    model, plain = accumulating(dense()), accumulating(dense())
    ours, steps = trained(model, classified(ROWS))
    for batch in steps:
        plain.train_on_batch(*batch)
    assert_close(ours, plain.get_weights())


def test_clipping_of_the_whole_gradient():
    tensors = classified(ROWS)
    model, plain = dense(), dense()
    model.compile(keras.optimizers.SGD(1.0), LOSS)
    plain.compile(keras.optimizers.SGD(1.0, global_clipnorm=0.1), LOSS)
    ours, steps = trained(model, tensors, clip_norm=0.1)
    for batch in steps:
        plain.train_on_batch(*batch)
    assert_close(ours, plain.get_weights())

    by_setter, by_value = dense(), dense()
    for each in (by_setter, by_value):
        each.compile(keras.optimizers.SGD(1.0), LOSS)
    dataset = TFDataset.from_ndarrays(tensors, batch_size=8, seed=4)
    optimizer = TFOptimizer.from_keras(by_setter, dataset, num_ranks=2, **LOCAL)
    optimizer.set_gradient_clipping_by_l2_norm(0.1).optimize(MaxIteration(STEPS))
    assert_same_bits(by_setter.get_weights(), ours)
    optimizer = TFOptimizer.from_keras(by_value, dataset, num_ranks=2, **LOCAL)
    optimizer.set_constant_gradient_clipping(-0.01, 0.02).optimize(MaxIteration(1))
    start = dense().get_weights()
    moves = np.concatenate(
        [(a - b).ravel() for a, b in zip(start, by_value.get_weights(), strict=True)]
    )
    assert moves.min() == pytest.approx(-0.01, abs=1e-6)
    assert moves.max() == pytest.approx(0.02, abs=1e-6)


def test_a_model_in_double_precision():
    def double():
        keras.utils.set_random_seed(5)
        options = {"dtype": "float64"}
        model = keras.Sequential(
            [
                keras.Input((6,), dtype="float64"),
                layers.Dense(8, "tanh", **options),
                layers.BatchNormalization(**options),
                layers.Dense(3, "softmax", **options),
            ]
        )
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(dtype="float64"))
        return model

    x, y = classified(ROWS)
    model, plain = double(), double()
    ours, steps = trained(model, (x.astype("d"), y), ranks=1)
    for batch in steps:
        plain.train_on_batch(*batch)
    assert all(w.dtype == np.float64 for w in ours)
    assert_close(ours, plain.get_weights(), rtol=1e-9, atol=1e-11)


def test_half_precision_weights_are_refused_by_name():
    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((6,)), layers.Dense(3, dtype="float16", name="half")])
    dataset = TFDataset.from_ndarrays(classified(ROWS), batch_size=8)
    with pytest.raises(ProgramError, match=r"half/kernel \(float16\).*mixed_bfloat16"):
        TFOptimizer.from_keras(model, dataset, loss="mse", optimizer="sgd", **LOCAL)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_keeps_weights_whole(policy):
    model = model_of(layers.Dense(8, "relu", dtype=policy))
    assert model.layers[0].compute_dtype == policy.removeprefix("mixed_")
    plain = dense()
    plain.compile("adam", LOSS)
    ours, steps = trained(model, classified(ROWS), loss=LOSS, optimizer="adam")
    for batch in steps:
        plain.train_on_batch(*batch)
    assert all(w.dtype == np.float32 for w in ours)
    assert_close(ours, plain.get_weights(), rtol=0.1, atol=0.02)


def test_loss_scaling_is_refused_by_name():
    """`compile` wraps the optimizer of a model with the policy mixed_float16."""
    model = dense()
    rule = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())
    model.compile(rule, LOSS)
    dataset = TFDataset.from_ndarrays(classified(ROWS), batch_size=8)
    with pytest.raises(UnsupportedRuleError, match=r"LossScaleOptimizer.*use the optimizer in it"):
        TFOptimizer.from_keras(model, dataset, **LOCAL)


def test_the_model_holds_the_weights_that_were_validated():
    val = classified(17, seed=8)
    dataset = TFDataset.from_ndarrays(classified(ROWS), batch_size=8, val_tensors=val)
    model = model_of(layers.Dense(8), layers.BatchNormalization(), layers.Dropout(0.3))
    model.compile("adam", LOSS, metrics=["accuracy"])
    optimizer = TFOptimizer.from_keras(model, dataset, num_ranks=3, **LOCAL)
    optimizer.optimize(MaxEpoch(2))
    expected = model.evaluate(*val, verbose=0, return_dict=True)
    assert optimizer.scores == pytest.approx(expected, rel=1e-5)
    assert optimizer.step == 2 * 4


def test_a_second_optimize_goes_on():
    tensors = classified(ROWS)
    dataset = TFDataset.from_ndarrays(tensors, batch_size=8)

    def run(*ends):
        dropout = layers.Dropout(0.5, seed=1)
        model = model_of(layers.Dense(8), dropout, layers.BatchNormalization())
        model.compile("adam", LOSS)
        optimizer = TFOptimizer.from_keras(model, dataset, num_ranks=2, **LOCAL)
        for end in ends:
            optimizer.optimize(MaxIteration(end))
        assert optimizer.step == ends[-1]
        return model.get_weights()

    assert_same_bits(run(3, 3, 7), run(7))


def test_after_close_training_starts_anew_from_the_weights_as_they_are():
    tensors = classified(ROWS)
    dataset = TFDataset.from_ndarrays(tensors, batch_size=8)
    model, plain = dense(), dense()
    optimizer = TFOptimizer.from_keras(
        model, dataset, loss=LOSS, optimizer="adam", num_ranks=1, **LOCAL
    )
    for _ in range(2):
        optimizer.optimize(MaxIteration(3))
        optimizer.close()
        assert optimizer.step == 0
        plain.compile("adam", LOSS)  # a fresh optimizer
        for batch in batches(dataset, tensors, 1, 3):
            plain.train_on_batch(*batch)
    assert_close(model.get_weights(), plain.get_weights())
