"""Models of tf-keras, which is Keras 2, against plain tf-keras on the same batches."""

import csv

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_fits import BATCH, CLOSE, ROWS, by_rank, on_board, on_ranks, plainly, rows, same
from pyspark.sql import SparkSession

from tfspark import (
    MaxIteration,
    NNEstimator,
    TFDataset,
    TFOptimizer,
    TFPredictor,
    register_model_udf,
)
from tfspark.errors import InvalidInputError, ProgramError, UnsupportedRuleError
from tfspark.graph.legacy_optimizers import from_legacy_optimizer
from tfspark.graph.optimizers import learning_rate_of
from tfspark.train.keras_model import KerasModel
from tfspark.train.rates import rate_at

tf_keras = pytest.importorskip("tf_keras", reason="tf-keras is not installed")
layers, optimizers, losses = tf_keras.layers, tf_keras.optimizers, tf_keras.losses


def classifier(*inner, **compiled):
    tf_keras.utils.set_random_seed(1)
    model = tf_keras.Sequential(
        [layers.Input([6]), *inner, layers.Dense(8, "relu"), layers.Dense(3)]
    )
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    settings = {"optimizer": optimizers.Adam(0.01), "loss": loss, "metrics": ["accuracy"]}
    model.compile(**{**settings, **compiled})
    return model


@pytest.mark.parametrize("engine", ["local", "gang", "shuffle"])
def test_a_history_is_that_of_tf_keras_on_the_same_batches(sc, engine):
    x, y = rows()
    model, plain = classifier(), classifier()
    history = on_ranks(model, x, y, engine=engine, epochs=3, validation_data=rows(1))
    order = by_rank()
    expected = plainly(plain, x[order], y[order], epochs=3, validation_data=rows(1))
    assert isinstance(history, tf_keras.callbacks.History)
    same(model, history, plain, expected)
    assert int(model.optimizer.iterations) == int(plain.optimizer.iterations)


def test_batch_norm_and_regularizers_on_one_rank(sc):
    x, y = rows()
    made = [
        classifier(
            layers.Dense(5, kernel_regularizer="l2", use_bias=False),
            layers.BatchNormalization(momentum=0.5),
            layers.ActivityRegularization(0.01),
        )
        for _ in range(2)
    ]
    history = on_ranks(made[0], x, y, num_ranks=1, epochs=2)
    same(made[0], history, made[1], plainly(made[1], x, y, epochs=2))


def test_images_are_normalized_as_by_tf_keras(sc):
    def network():
        tf_keras.utils.set_random_seed(2)
        model = tf_keras.Sequential(
            [
                layers.Input([6]),
                layers.Reshape([3, 2, 1]),
                layers.Conv2D(4, 2),
                layers.BatchNormalization(momentum=0.7),
                layers.Flatten(),
                layers.Dense(3),
            ]
        )
        model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    x, y = rows()
    model, plain = network(), network()
    history = on_ranks(model, x, y, num_ranks=1, engine="local", epochs=2)
    same(model, history, plain, plainly(plain, x, y, epochs=2))


def test_dropout_learns_and_repeats(sc):
    x, y = rows()
    found = []
    for _ in range(2):
        tf_keras.backend.clear_session()  # its names begin anew
        model = classifier(layers.Dropout(0.2))
        found.append(on_ranks(model, x, y, epochs=6).history["loss"])
    assert found[0] == found[1] and found[0][-1] < found[0][0]


def test_weights_of_rows_and_classes(sc):
    x, y = rows()
    order = by_rank()
    weight = np.random.default_rng(5).uniform(0.1, 3, ROWS).astype(np.float32)
    weighted = {"weighted_metrics": ["accuracy"]}
    model, plain = classifier(**weighted), classifier(**weighted)
    history = on_ranks(model, x, y, sample_weight=weight, epochs=2)
    expected = plainly(plain, x[order], y[order], sample_weight=weight[order], epochs=2)
    same(model, history, plain, expected)
    classes = {"class_weight": {0: 0.2, 1: 1.0, 2: 4.0}, "epochs": 2}
    model, plain = classifier(), classifier()
    same(
        model,
        on_ranks(model, x, y, **classes),
        plain,
        plainly(plain, x[order], y[order], **classes),
    )


def two_outputs(reduction="sum_over_batch_size"):
    tf_keras.utils.set_random_seed(2)
    inputs = layers.Input([6])
    hidden = layers.Dense(5, "tanh")(inputs)
    outputs = {
        "kind": layers.Dense(3, name="kind")(hidden),
        "size": layers.Dense(1, name="size")(hidden),
    }
    model = tf_keras.Model(inputs, outputs)
    kind = losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    model.compile(
        optimizers.SGD(0.002),
        {"kind": kind, "size": "mse"},
        metrics={"kind": "accuracy", "size": "mae"},
        loss_weights={"kind": 1.0, "size": 0.5},
    )
    return model


def test_a_loss_that_is_a_sum_over_rows(sc):
    x, kind = rows()
    y = {"kind": kind, "size": x.sum(axis=1, keepdims=True)}
    model, plain = two_outputs("sum"), two_outputs("sum")
    dataset = TFDataset.from_ndarrays((x, y), batch_size=BATCH, shuffle=False)
    settings = {"engine": "local", "num_ranks": 3, "progress": False}
    TFOptimizer.from_keras(model, dataset, **settings).optimize(MaxIteration(5))
    order = by_rank()
    plainly(plain, x[order], {name: values[order] for name, values in y.items()})
    for one, two in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, **CLOSE)
    with pytest.raises(ProgramError, match=r"'loss/total'.*a loss that is a mean"):
        on_ranks(two_outputs("sum"), x, y, engine="local")


def test_several_outputs_have_losses_of_their_own(sc):
    x, kind = rows()
    y = {"kind": kind, "size": x.sum(axis=1, keepdims=True)}
    model, plain = two_outputs(), two_outputs()
    history = on_ranks(model, x, y, epochs=2, validation_data=(x, y))
    order = by_rank()
    drawn = {name: values[order] for name, values in y.items()}
    expected = plainly(plain, x[order], drawn, epochs=2, validation_data=(x, y))
    same(model, history, plain, expected)
    assert "kind_loss" in history.history and "val_size_mae" in history.history


def test_a_loss_that_the_model_adds_needs_no_labels(sc):
    def autoencoder(with_metric=False):
        tf_keras.utils.set_random_seed(3)
        inputs = layers.Input([6])
        outputs = layers.Dense(6)(layers.Dense(2, "tanh")(inputs))
        model = tf_keras.Model(inputs, outputs)
        model.add_loss(tf.reduce_mean(tf.square(outputs - inputs)))
        if with_metric:
            model.add_metric(tf.reduce_mean(tf.abs(outputs)), name="size")
        model.compile("adam")
        return model

    x, _ = rows(number=64)
    model, plain = autoencoder(), autoencoder()
    history = on_ranks(model, x, epochs=2, num_ranks=2)
    same(model, history, plain, plainly(plain, x[by_rank(64, 2)], epochs=2))
    with pytest.raises(
        ProgramError, match="'size/add_metric/total'"
    ):  # of batches, whatever their rows
        on_ranks(autoencoder(with_metric=True), x, engine="local")


def test_a_subclassed_model_without_input_is_built_by_its_rows(sc):
    class Network(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden, self.out = layers.Dense(4, "relu"), layers.Dense(3)

        def call(self, x, training=None):
            return self.out(self.hidden(x))

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            total = super().compute_loss(x, y, y_pred, sample_weight)
            return total + 0.01 * tf.reduce_mean(tf.square(y_pred))

    def network():
        tf_keras.utils.set_random_seed(4)
        model = Network()
        model.compile("adam", losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    x, y = rows()
    model = network()
    history = on_ranks(model, x, y, engine="local", num_ranks=1, epochs=2)
    plain = network()  # after the other one, which is built of the same random numbers
    same(model, history, plain, plainly(plain, x, y, epochs=2))


def test_callbacks_between_epochs(sc, tmp_path):
    x, y = rows()
    order = by_rank()

    def callbacks(folder):
        folder.mkdir()
        return [
            tf_keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5),
            tf_keras.callbacks.ReduceLROnPlateau("val_loss", 0.1, patience=1, min_delta=10.0),
            tf_keras.callbacks.CSVLogger(str(folder / "log.csv")),
            tf_keras.callbacks.ModelCheckpoint(str(folder / "{epoch}.h5"), save_weights_only=True),
            tf_keras.callbacks.TensorBoard(str(folder / "board")),
            tf_keras.callbacks.EarlyStopping("loss", patience=2, min_delta=10.0),
        ]

    settings = {"epochs": 9, "validation_data": rows(1)}
    model, plain = classifier(), classifier()
    history = on_ranks(model, x, y, callbacks=callbacks(tmp_path / "ranks"), **settings)
    theirs = callbacks(tmp_path / "plain")
    expected = plainly(plain, x[order], y[order], callbacks=theirs, **settings)
    same(model, history, plain, expected)
    assert len(history.history["loss"]) == 3 and history.history["lr"][-1] < 0.002
    logs = [list(csv.DictReader((tmp_path / who / "log.csv").open())) for who in ("ranks", "plain")]
    assert [row.keys() for row in logs[0]] == [row.keys() for row in logs[1]]
    for part, prefix in (("train", ""), ("validation", "val_")):
        shown = on_board(tmp_path / "ranks" / "board" / part, "epoch_loss")
        np.testing.assert_allclose(shown, history.history[f"{prefix}loss"], **CLOSE)
    model.load_weights(tmp_path / "ranks" / "1.h5")
    plain.load_weights(tmp_path / "plain" / "1.h5")
    for one, two in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, **CLOSE)


def test_callbacks_that_do_not_fit_are_refused_by_name(sc):
    class Impatient(tf_keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise AssertionError

    for callback, said in (
        (Impatient(), "Impatient, which has on_train_batch_end"),
        (tf_keras.callbacks.LambdaCallback(on_batch_begin=print), "LambdaCallback"),
        (tf_keras.callbacks.TensorBoard(update_freq="batch"), "update_freq='epoch'"),
        (keras.callbacks.EarlyStopping(), "are tf_keras.callbacks.Callback"),
    ):
        with pytest.raises(InvalidInputError, match=said):
            on_ranks(classifier(), *rows(), callbacks=[callback])
    with pytest.raises(InvalidInputError, match=r"are keras\.callbacks\.Callback"):
        model = keras.Sequential([keras.Input([6]), keras.layers.Dense(3)])
        model.compile("sgd", "mse")
        on_ranks(model, *rows(), callbacks=[tf_keras.callbacks.EarlyStopping()])


def schedule():
    return optimizers.schedules.ExponentialDecay(0.05, 3, 0.5, staircase=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: optimizers.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda: optimizers.Adam(schedule(), amsgrad=True, clipvalue=0.05),
        lambda: optimizers.AdamW(0.05, weight_decay=0.2, clipnorm=0.1),
        lambda: optimizers.RMSprop(0.02, momentum=0.5, centered=True),
        lambda: optimizers.Adagrad(0.1, global_clipnorm=0.1),
        lambda: optimizers.Adadelta(0.5),
        lambda: optimizers.Adamax(0.05),
        lambda: optimizers.Ftrl(0.1, l1_regularization_strength=0.01, beta=0.1),
        lambda: optimizers.Lion(0.01),
        lambda: optimizers.legacy.SGD(0.1, momentum=0.9, decay=0.1),
        lambda: optimizers.legacy.Adam(schedule(), epsilon=1e-3),
        lambda: optimizers.legacy.RMSprop(0.02, momentum=0.5, clipnorm=0.1),
        lambda: optimizers.legacy.Adagrad(0.1),
        lambda: optimizers.legacy.Adadelta(0.5),
        lambda: optimizers.legacy.Adamax(0.05, decay=0.05),
        lambda: optimizers.legacy.Ftrl(0.1, l2_regularization_strength=0.01),
    ],
)
def test_optimizers_step_as_those_of_tf_keras(make):
    x, y = rows()
    model, plain = classifier(optimizer=make()), classifier(optimizer=make())
    dataset = TFDataset.from_ndarrays((x, y), batch_size=BATCH, shuffle=False)
    KerasModel(model, engine="local", num_ranks=2).fit(dataset, epochs=4, verbose=0)
    order = by_rank(ranks=2)
    plainly(plain, x[order], y[order], epochs=4)
    for one, two in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, **CLOSE)


def test_nadam_keeps_its_formula():
    """That of tf-keras divides by zero, so the reference is Keras 3."""
    x, y = rows()
    model = classifier(optimizer=optimizers.Nadam(0.05))
    plain = keras.Sequential(
        [keras.Input([6]), keras.layers.Dense(8, "relu"), keras.layers.Dense(3)]
    )
    plain.set_weights(model.get_weights())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    plain.compile(keras.optimizers.Nadam(0.05), loss)
    dataset = TFDataset.from_ndarrays((x, y), batch_size=BATCH, shuffle=False)
    KerasModel(model, engine="local", num_ranks=1).fit(dataset, epochs=4, verbose=0)
    plainly(plain, x, y, epochs=4)
    for one, two in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, **CLOSE)
    with pytest.raises(UnsupportedRuleError, match=r"Received: legacy\.Nadam"):
        from_legacy_optimizer(optimizers.legacy.Nadam())


def test_a_rate_is_read_when_it_is_needed():
    for optimizer in (optimizers.Adam(0.1), optimizers.legacy.Adam(0.1)):
        rate = learning_rate_of(from_legacy_optimizer(optimizer))
        assert rate_at(rate, 0) == 0.1
        tf_keras.backend.set_value(optimizer.learning_rate, 0.001)
        assert rate_at(rate, 5) == 0.001


def test_weights_without_decay_are_named():
    optimizer = optimizers.AdamW(0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    x, y = rows()
    model, plain = classifier(optimizer=optimizer), classifier(optimizer=optimizers.AdamW(0.1))
    plain.optimizer.exclude_from_weight_decay(var_names=["bias"])
    dataset = TFDataset.from_ndarrays((x, y), batch_size=BATCH, shuffle=False)
    KerasModel(model, engine="local", num_ranks=1).fit(dataset, epochs=3, verbose=0)
    plainly(plain, x, y, epochs=3)
    for one, two in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, **CLOSE)
    other = optimizers.AdamW(0.1)
    other.exclude_from_weight_decay(var_list=model.trainable_variables[:1])
    with pytest.raises(UnsupportedRuleError, match="var_names"):
        from_legacy_optimizer(other)


@pytest.fixture(scope="module")
def frame(sc):
    x, y = rows()
    made = [(x[i].tolist(), int(y[i])) for i in range(ROWS)]
    return SparkSession(sc).createDataFrame(made, "x array<float>, y int").coalesce(1)


def test_a_data_frame_is_trained_evaluated_and_predicted(sc, frame):
    x, y = rows()
    model, plain = classifier(), classifier()
    keras_model = KerasModel(model, engine="gang", num_ranks=1)
    columns = {"feature_cols": "x", "label_cols": "y"}
    history = keras_model.fit(
        frame, batch_size=BATCH, epochs=2, verbose=0, shuffle=False, **columns
    )
    same(model, history, plain, plainly(plain, x, y, epochs=2))
    found = keras_model.evaluate(frame, return_dict=True, **columns)
    theirs = plain.evaluate(x, y, verbose=0, return_dict=True)
    assert list(found) == list(theirs) and found == pytest.approx(theirs, rel=1e-4)
    np.testing.assert_allclose(
        keras_model.evaluate(frame, **columns), plain.evaluate(x, y, verbose=0), **CLOSE
    )
    predicted = keras_model.predict(frame, feature_cols="x", output_cols="logits").collect()
    expected = plain.predict(x, verbose=0)
    np.testing.assert_allclose([row.logits for row in predicted], expected, **CLOSE)
    register_model_udf(frame.sparkSession, "legacy", plain)
    asked = frame.selectExpr("legacy(x) AS logits").collect()
    np.testing.assert_allclose([row.logits for row in asked], expected, **CLOSE)
    dataset = TFDataset.from_dataframe(frame, "x", batch_per_thread=7)
    rdd = TFPredictor.from_keras(plain, dataset).predict()
    np.testing.assert_allclose(rdd.collect(), expected, **CLOSE)


def test_arrays_stay_here_unless_told(sc):
    x, y = rows()
    model, plain = classifier(), classifier()
    keras_model = KerasModel(model)
    history = keras_model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    same(model, history, plain, plainly(plain, x, y))
    here, there = (keras_model.evaluate(x, y, distributed=d, verbose=0) for d in (False, True))
    np.testing.assert_allclose(here, there, **CLOSE)
    here, there = (keras_model.predict(x, distributed=d, verbose=0) for d in (False, True))
    np.testing.assert_allclose(here, there, **CLOSE)
    keras_model.train_on_batch(x[:4], y[:4])
    assert len(keras_model.predict_on_batch(x[:4])) == 4
    assert keras_model.test_on_batch(x[:4], y[:4])[0] > 0


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_files_are_loaded_by_the_keras_that_saved_them(tmp_path, ending):
    keras_model = KerasModel(classifier())
    path = f"{tmp_path}/model.{ending}"
    keras_model.save_model(path)
    loaded = KerasModel.load_model(path, engine="local")
    assert isinstance(loaded.model, tf_keras.Model) and loaded.model._is_compiled
    for one, two in zip(loaded.get_weights(), keras_model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_losses_and_metrics_may_be_given_instead_of_compiled():
    x, y = rows()
    model, plain = classifier(), classifier(loss="mse", metrics=["mae"], optimizer="sgd")
    target = np.eye(3, dtype=np.float32)[y]
    dataset = TFDataset.from_ndarrays((x, target), batch_size=BATCH, shuffle=False)
    optimizer = TFOptimizer.from_keras(
        model,
        dataset.validated_on(dataset),
        loss="mse",
        metrics=["mae"],
        optimizer=optimizers.SGD(),
        engine="local",
        num_ranks=1,
        progress=False,
    )
    optimizer.optimize(MaxIteration(5), validation_trigger=MaxIteration(5))
    plainly(plain, x, target)
    for one, two in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, **CLOSE)
    expected = plain.evaluate(x, target, verbose=0, return_dict=True)
    assert optimizer.scores == pytest.approx(expected, rel=1e-4)


def test_what_cannot_be_trained_is_refused_with_a_remedy(sc, frame):
    class OwnStep(tf_keras.Sequential):
        def train_step(self, data):
            return super().train_step(data)

    own = OwnStep([layers.Input([6]), layers.Dense(3)])
    own.compile("sgd", "mse")
    with pytest.raises(ProgramError, match="own train_step"):
        KerasModel(own)
    with pytest.raises(InvalidInputError, match=r"model\.compile"):
        KerasModel(tf_keras.Sequential([layers.Input([6]), layers.Dense(3)]))
    for optimizer, said in (
        (optimizers.Adafactor(), "Adafactor: it keeps means"),
        (tf_keras.mixed_precision.LossScaleOptimizer(optimizers.Adam()), "LossScaleOptimizer"),
    ):
        with pytest.raises(UnsupportedRuleError, match=said):
            on_ranks(classifier(optimizer=optimizer), *rows(), engine="local")
    none = losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    with pytest.raises(ProgramError, match="reduction='none'"):
        on_ranks(classifier(loss=none), *rows(), engine="local")
    with pytest.raises(ProgramError, match=r"rows without labels.*columns of labels"):
        KerasModel(classifier()).fit(frame, feature_cols="x", verbose=0)
    with pytest.raises(InvalidInputError, match="Use KerasModel"):
        NNEstimator(classifier(), featuresCol="x", labelCol="y").fit(frame)


@pytest.mark.parametrize(
    "make",
    [
        lambda: optimizers.Adam(schedule(), amsgrad=True),
        lambda: optimizers.SGD(0.1, momentum=0.9),
        lambda: optimizers.RMSprop(0.02, momentum=0.5, centered=True),
        lambda: optimizers.Ftrl(0.1, l1_regularization_strength=0.01),
        lambda: optimizers.Adagrad(0.1),
        lambda: optimizers.Adadelta(0.5),
        lambda: optimizers.Adamax(0.05),
        lambda: optimizers.Lion(0.01),
    ],
)
def test_a_further_fit_goes_on_with_the_optimizer_as_it_is(make):
    x, y = rows()
    order = by_rank(ranks=2)
    model, plain = classifier(optimizer=make()), classifier(optimizer=make())
    dataset = TFDataset.from_ndarrays((x, y), batch_size=BATCH, shuffle=False)
    keras_model = KerasModel(model, engine="local", num_ranks=2)
    for _ in range(2):
        history = keras_model.fit(dataset, epochs=2, verbose=0)
        same(model, history, plain, plainly(plain, x[order], y[order], epochs=2))
    same(model, plainly(model, x, y), plain, plainly(plain, x, y))


def test_tf_keras_is_what_tensorflow_calls_keras(run_python):
    output = run_python(
        """
        import numpy as np, tensorflow as tf
        from tfspark import KerasModel, TFDataset
        model = tf.keras.Sequential([tf.keras.layers.Dense(1, kernel_initializer="zeros")])
        model.compile(tf.keras.optimizers.SGD(0.0), "mse", metrics=["mae"])
        x, y = np.ones([10, 3], np.float32), np.full([10, 1], 3, np.float32)
        dataset = TFDataset.from_ndarrays((x, y), batch_size=4)
        print(KerasModel(model, engine="local").fit(dataset, verbose=0).history)
        """,
        TF_USE_LEGACY_KERAS="1",
    ).stdout
    assert output.strip().endswith("{'loss': [9.0], 'mae': [3.0]}")


def test_an_optimizer_that_has_trained_before_is_taken_as_well():
    x, y = rows()
    for make in (optimizers.legacy.SGD, optimizers.legacy.RMSprop):
        model = classifier(optimizer=make(0.1, momentum=0.9, decay=0.1))
        plainly(model, x, y)
        found = from_legacy_optimizer(model.optimizer)
        assert found.momentum == 0.9
        assert rate_at(learning_rate_of(found), 10) == pytest.approx(0.05)
