"""`KerasModel` on ranks of a gang against plain Keras on the same batches."""

import csv

import keras
import numpy as np
import pytest
from keras_fits import BATCH, CLOSE, ROWS, by_rank, on_board, on_ranks, plainly, rows, same
from pyspark.sql import SparkSession

from tfspark import TFDataset
from tfspark.errors import InvalidInputError, ProgramError
from tfspark.train.keras_model import KerasModel

DENSE = keras.layers.Dense


def classifier(**compiled):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input([6]),
            DENSE(8, "relu"),
            keras.layers.BatchNormalization(momentum=0.5),
            DENSE(3, kernel_regularizer="l2"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    settings = {"optimizer": keras.optimizers.Adam(0.01), "loss": loss, "metrics": ["accuracy"]}
    model.compile(**{**settings, **compiled})
    return model


def without_batch_norm(**compiled):
    """A model that learns alike on any number of ranks."""
    keras.utils.set_random_seed(1)
    layers = [keras.Input([6]), DENSE(8, "relu", name="hidden"), DENSE(3, name="out")]
    model = keras.Sequential(layers, name="model")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    settings = {"optimizer": keras.optimizers.Adam(0.01), "loss": loss, "metrics": ["accuracy"]}
    model.compile(**{**settings, **compiled})
    return model


@pytest.mark.parametrize("engine", ["local", "gang", "shuffle"])
def test_a_history_is_that_of_keras_on_the_same_batches(sc, engine):
    x, y = rows()
    model, plain = without_batch_norm(), without_batch_norm()
    history = on_ranks(model, x, y, engine=engine, epochs=3, validation_data=rows(1))
    order = by_rank()
    same(
        model, history, plain, plainly(plain, x[order], y[order], epochs=3, validation_data=rows(1))
    )


def test_a_batch_in_parts_counts_once(sc):
    x, y = rows()
    histories = []
    for settings in ({}, {"accumulation_steps": 3}):
        keras_model = KerasModel(without_batch_norm(), engine="local", num_ranks=2, **settings)
        dataset = TFDataset.from_ndarrays((x, y), batch_size=BATCH, seed=7)
        histories.append(keras_model.fit(dataset, epochs=2, verbose=0).history)
    for name, values in histories[0].items():
        np.testing.assert_allclose(histories[1][name], values, **CLOSE)


def test_weights_of_rows_and_weighted_metrics(sc):
    x, y = rows()
    weight = np.random.default_rng(5).uniform(0.1, 3, ROWS).astype(np.float32)
    settings = {"weighted_metrics": ["accuracy", keras.metrics.AUC(name="auc")], "metrics": []}
    settings["loss"] = "mse"
    y = np.eye(3, dtype=np.float32)[y]
    model, plain = without_batch_norm(**settings), without_batch_norm(**settings)
    for each in (model, plain):
        each.layers[-1].activation = keras.activations.sigmoid
    history = on_ranks(model, x, y, sample_weight=weight, epochs=2)
    order = by_rank()
    expected = plainly(plain, x[order], y[order], sample_weight=weight[order], epochs=2)
    same(model, history, plain, expected)


def test_weights_of_classes(sc):
    x, y = rows()
    weights = {0: 0.2, 2: 4.0}
    model, plain = without_batch_norm(), without_batch_norm()
    history = on_ranks(model, x, y, class_weight=weights, epochs=2, validation_data=rows(1))
    order = by_rank()
    expected = plainly(
        plain, x[order], y[order], class_weight=weights, epochs=2, validation_data=rows(1)
    )
    same(model, history, plain, expected)
    with pytest.raises(InvalidInputError, match="whole numbers"):
        on_ranks(model, x, y, class_weight={"a": 1.0})


def two_outputs():
    keras.utils.set_random_seed(2)
    inputs = keras.Input([6])
    hidden = DENSE(5, "tanh")(inputs)
    model = keras.Model(
        inputs, {"kind": DENSE(3, name="kind")(hidden), "size": DENSE(1, name="size")(hidden)}
    )
    model.compile(
        "sgd",
        {"kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "size": "mse"},
        metrics={"kind": "accuracy", "size": "mae"},
        loss_weights={"kind": 1.0, "size": 0.5},
    )
    return model


def test_several_outputs_have_losses_of_their_own(sc):
    x, kind = rows(number=64)  # whole batches: Keras does not weight these losses by rows
    y = {"kind": kind, "size": x.sum(axis=1, keepdims=True)}
    held_x, held_kind = rows(1, 32)
    held = (held_x, {"kind": held_kind, "size": held_x.sum(axis=1, keepdims=True)})
    model, plain = two_outputs(), two_outputs()
    history = on_ranks(model, x, y, epochs=2, validation_data=held)
    order = by_rank(64)
    shuffled = {name: values[order] for name, values in y.items()}
    expected = plainly(plain, x[order], shuffled, epochs=2, validation_data=held)
    same(model, history, plain, expected)
    assert "kind_loss" in history.history and "val_size_mae" in history.history


def test_batch_norm_and_regularizers_on_one_rank(sc):
    x, y = rows()
    model, plain = classifier(), classifier()
    history = on_ranks(model, x, y, num_ranks=1, epochs=2)
    same(model, history, plain, plainly(plain, x, y, epochs=2))


def test_callbacks_between_epochs(sc, tmp_path):
    x, y = rows()
    order = by_rank()

    class Mine(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.said = []

        def on_epoch_end(self, epoch, logs=None):
            rate = float(self.model.optimizer.learning_rate)
            self.said.append(
                (epoch, sorted(logs), round(rate, 6), int(self.model.optimizer.iterations))
            )

    def callbacks(folder):
        folder.mkdir()
        return [
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5),
            keras.callbacks.ReduceLROnPlateau("val_loss", 0.1, patience=1, min_delta=10.0),
            keras.callbacks.CSVLogger(str(folder / "log.csv")),
            keras.callbacks.ModelCheckpoint(
                str(folder / "{epoch}.weights.h5"), save_weights_only=True
            ),
            keras.callbacks.TensorBoard(str(folder / "board")),
            keras.callbacks.EarlyStopping("loss", patience=2, min_delta=10.0),
            mine := Mine(),
        ], mine

    model, plain = without_batch_norm(), without_batch_norm()
    given, mine = callbacks(tmp_path / "ranks")
    history = on_ranks(model, x, y, epochs=9, validation_data=rows(1), callbacks=given)
    theirs, other = callbacks(tmp_path / "plain")
    expected = plainly(
        plain, x[order], y[order], epochs=9, validation_data=rows(1), callbacks=theirs
    )
    same(model, history, plain, expected)
    assert mine.said == other.said and len(mine.said) == 3
    logs = [list(csv.DictReader((tmp_path / who / "log.csv").open())) for who in ("ranks", "plain")]
    assert [row.keys() for row in logs[0]] == [row.keys() for row in logs[1]]
    for part, prefix in (("train", ""), ("validation", "val_")):
        shown = on_board(tmp_path / "ranks" / "board" / part, "epoch_loss")
        np.testing.assert_allclose(shown, history.history[f"{prefix}loss"], **CLOSE)
    model.load_weights(tmp_path / "ranks" / "1.weights.h5")
    plain.load_weights(tmp_path / "plain" / "1.weights.h5")
    for one, two in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, **CLOSE)


def test_callbacks_that_want_batches_are_refused_by_name(sc, tmp_path):
    class Impatient(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise AssertionError

    for callback, said in (
        (Impatient(), "Impatient, which has on_train_batch_end"),
        (keras.callbacks.LambdaCallback(on_train_batch_begin=print), "LambdaCallback"),
        (keras.callbacks.TensorBoard(str(tmp_path), update_freq="batch"), "update_freq='epoch'"),
        (keras.callbacks.ModelCheckpoint("x.keras", save_freq=3), "save_freq='epoch'"),
        (keras.callbacks.BackupAndRestore(str(tmp_path)), "model_dir"),
        (keras.callbacks.TerminateOnNaN(), "NonFiniteError"),
        (print, "keras.callbacks.Callback"),
    ):
        with pytest.raises(InvalidInputError, match=said):
            on_ranks(without_batch_norm(), *rows(), callbacks=[callback])
    spoken = []
    harmless = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: spoken.append(epoch))
    on_ranks(without_batch_norm(), *rows(), engine="local", callbacks=[harmless])
    assert spoken == [0]


def test_weights_that_a_callback_sets(sc):
    x, y = rows()
    dataset = TFDataset.from_ndarrays((x, y), batch_size=BATCH, shuffle=False)

    class Rounding(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.set_weights([np.round(w, 2) for w in self.model.get_weights()])

    class Putting(keras.callbacks.Callback):
        """Sets others, and the old ones again before training goes on."""

        def on_epoch_end(self, epoch, logs=None):
            self.before = self.model.get_weights()
            self.model.set_weights([0 * w for w in self.before])

        def on_epoch_begin(self, epoch, logs=None):
            if epoch:
                self.model.set_weights(self.before)

    for engine in ("local", "gang"):
        keras_model = KerasModel(without_batch_norm(), engine=engine, num_ranks=2)
        with pytest.raises(InvalidInputError, match=r"set before epoch 1, .* Rounding\. End the"):
            keras_model.fit(dataset, epochs=3, verbose=0, callbacks=[Rounding()])
        keras_model.fit(dataset, epochs=1, verbose=0, callbacks=[Rounding()])
        assert all((np.round(w, 2) == w).all() for w in keras_model.get_weights())
        keras_model.fit(dataset, epochs=3, verbose=0, callbacks=[Putting()])


def test_the_best_weights_are_restored():
    x, y = rows()
    order = by_rank(ranks=2)
    held = rows(1)
    dataset = TFDataset.from_ndarrays((x, y), batch_size=BATCH, shuffle=False)
    dataset = dataset.validated_on(TFDataset.from_ndarrays(held, batch_size=BATCH))

    def stopping():
        return keras.callbacks.EarlyStopping(
            "val_loss", mode="max", patience=2, restore_best_weights=True
        )

    model, plain = without_batch_norm(), without_batch_norm()
    keras_model = KerasModel(model, engine="local", num_ranks=2)
    history = keras_model.fit(dataset, epochs=8, verbose=0, callbacks=[stopping()])
    expected = plainly(
        plain, x[order], y[order], epochs=8, validation_data=held, callbacks=[stopping()]
    )
    same(model, history, plain, expected)
    assert len(history.history["loss"]) < 8


def test_epochs_of_some_steps_and_their_numbers(sc):
    x, y = rows(number=48)
    model, plain = without_batch_norm(), without_batch_norm()
    history = on_ranks(
        model,
        x,
        y,
        num_ranks=1,
        engine="local",
        initial_epoch=2,
        epochs=5,
        validation_freq=2,
        validation_data=rows(1),
    )
    expected = plainly(
        plain, x, y, initial_epoch=2, epochs=5, validation_freq=2, validation_data=rows(1)
    )
    same(model, history, plain, expected)
    assert history.epoch == [2, 3, 4] and len(history.history["val_loss"]) == 1
    model, plain = without_batch_norm(), without_batch_norm()
    history = on_ranks(model, x, y, num_ranks=1, engine="local", epochs=3, steps_per_epoch=2)
    # Six steps are two rounds of three batches.
    for _ in range(2):
        plain.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    assert len(history.history["loss"]) == 3
    for one, two in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, **CLOSE)


def test_the_last_rows_of_arrays_validate(sc):
    x, y = rows()
    model, plain = without_batch_norm(), without_batch_norm()
    history = on_ranks(model, x, y, num_ranks=1, engine="local", validation_split=0.3)
    same(model, history, plain, plainly(plain, x, y, validation_split=0.3))


def test_a_fit_goes_on_where_it_was_killed(sc, tmp_path):
    x, y = rows()
    model, plain = without_batch_norm(), without_batch_norm()
    whole = on_ranks(plain, x, y, epochs=4)
    on_ranks(model, x, y, epochs=2, model_dir=str(tmp_path))
    again = without_batch_norm()
    rest = on_ranks(again, x, y, epochs=4, model_dir=str(tmp_path))
    assert rest.epoch == [2, 3]
    assert rest.history["loss"] == whole.history["loss"][2:]
    assert rest.history["accuracy"] == whole.history["accuracy"][2:]
    for one, two in zip(again.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.fixture(scope="module")
def frame(sc):
    x, y = rows()
    spark = SparkSession(sc)
    made = [(x[i].tolist(), int(y[i]), 1.0 + i % 3, f"row {i}") for i in range(ROWS)]
    return spark.createDataFrame(made, "x array<float>, y int, weight float, name string").coalesce(
        1
    )


def test_a_data_frame_is_trained_evaluated_and_predicted(sc, frame):
    x, y = rows()
    weight = np.array([1.0 + i % 3 for i in range(ROWS)], np.float32)
    model, plain = without_batch_norm(), without_batch_norm()
    keras_model = KerasModel(model, engine="gang", num_ranks=1)
    columns = {"feature_cols": "x", "label_cols": "y", "weight_col": "weight"}
    history = keras_model.fit(
        frame, batch_size=BATCH, epochs=2, verbose=0, shuffle=False, **columns
    )
    expected = plainly(plain, x, y, sample_weight=weight, epochs=2)
    same(model, history, plain, expected)
    found = keras_model.evaluate(frame, return_dict=True, **columns)
    theirs = plain.evaluate(x, y, sample_weight=weight, verbose=0, return_dict=True)
    assert found == pytest.approx(theirs, rel=1e-4)
    predicted = keras_model.predict(frame, feature_cols="x", output_cols="logits")
    assert predicted.columns == [*frame.columns, "logits"]
    np.testing.assert_allclose(
        [row.logits for row in predicted.collect()], plain.predict(x, verbose=0), **CLOSE
    )
    split = keras_model.fit(frame, verbose=0, validation_split=0.25, **columns)
    assert "val_accuracy" in split.history


def test_arrays_stay_here_unless_told(sc):
    x, y = rows()
    model, plain = without_batch_norm(), without_batch_norm()
    keras_model = KerasModel(model)
    history = keras_model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    same(model, history, plain, plainly(plain, x, y))
    here, there = (keras_model.evaluate(x, y, distributed=d, verbose=0) for d in (False, True))
    np.testing.assert_allclose(here, there, **CLOSE)
    here, there = (keras_model.predict(x, distributed=d, verbose=0) for d in (False, True))
    np.testing.assert_allclose(here, there, **CLOSE)
    rdd = keras_model.predict(sc.parallelize(x, 2))
    np.testing.assert_allclose(rdd.collect(), here, **CLOSE)
    keras_model.train_on_batch(x[:4], y[:4])
    assert len(keras_model.predict_on_batch(x[:4])) == 4
    assert keras_model.test_on_batch(x[:4], y[:4])[0] > 0


def test_an_evaluation_in_this_process_needs_no_spark(run_python):
    output = run_python("""
        import keras, numpy as np
        from tfspark import KerasModel, TFDataset
        from tfspark.errors import ClusterError
        x, y = np.ones([10, 3], np.float32), np.zeros([10, 1], np.float32)
        dense = keras.layers.Dense(1, kernel_initializer="ones")
        model = keras.Sequential([keras.Input([3]), dense])
        model.compile("sgd", "mse", metrics=["mae"])
        dataset = TFDataset.from_ndarrays((x, y), batch_size=4)
        print(KerasModel(model, engine="local").evaluate(dataset, return_dict=True))
        try:
            KerasModel(model).evaluate(dataset)
        except ClusterError as error:
            print(error)
    """).stdout
    assert "{'loss': 9.0, 'mae': 3.0}" in output and "init_nncontext()" in output


def test_models_are_saved_and_loaded_wherever_files_lie(tmp_path):
    keras_model = KerasModel(without_batch_norm())
    for path in (f"{tmp_path}/deep/model.keras", "memory://tfspark-test/model.keras"):
        keras_model.save_model(path)
        with pytest.raises(InvalidInputError, match="overwrite=False"):
            keras_model.save_model(path, overwrite=False)
        loaded = KerasModel.load_model(path, engine="local")
        for one, two in zip(loaded.get_weights(), keras_model.get_weights(), strict=True):
            np.testing.assert_array_equal(one, two)
        assert loaded.model.compiled
    keras_model.save_weights(f"{tmp_path}/w.weights.h5")
    before = keras_model.get_weights()
    keras_model.set_weights([np.zeros_like(weight) for weight in before])
    keras_model.load_weights(f"{tmp_path}/w.weights.h5")
    for one, two in zip(keras_model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, two)
    with pytest.raises(InvalidInputError, match="there is none"):
        KerasModel.load_model(f"{tmp_path}/nothing.keras")


def test_a_file_with_code_is_not_run(tmp_path):
    model = keras.Sequential([keras.Input([2]), keras.layers.Lambda(lambda x: x + 1)])
    model.compile("sgd", "mse")
    KerasModel(model).save_model(f"{tmp_path}/model.keras")
    with pytest.raises(ValueError, match="safe_mode"):
        KerasModel.load_model(f"{tmp_path}/model.keras")
    assert KerasModel.load_model(f"{tmp_path}/model.keras", safe_mode=False).model.compiled


def test_bad_input_is_one_clear_error(sc, frame):
    x, y = rows()
    with pytest.raises(InvalidInputError, match=r"model\.compile"):
        KerasModel(keras.Sequential([keras.Input([6]), DENSE(1)]))
    with pytest.raises(InvalidInputError, match="average_every=4"):
        KerasModel(without_batch_norm(), average_every=4)
    with pytest.raises(InvalidInputError, match="Did you mean num_ranks"):
        KerasModel(without_batch_norm(), num_rank=4)
    keras_model = KerasModel(without_batch_norm())
    with pytest.raises(InvalidInputError, match="there are x, y, weight, name"):
        keras_model.fit(frame, label_cols="y")
    for method in (keras_model.fit, keras_model.evaluate):
        with pytest.raises(ProgramError, match=r"rows without labels.*columns of labels"):
            method(frame, feature_cols="x", verbose=0)
    with pytest.raises(InvalidInputError, match="hold their labels"):
        keras_model.fit(frame, y, feature_cols="x")
    with pytest.raises(InvalidInputError, match="distributed=False"):
        keras_model.fit(frame, feature_cols="x", label_cols="y", distributed=False)
    dataset = TFDataset.from_ndarrays((x, y), batch_size=8)
    with pytest.raises(InvalidInputError, match="validation_split divides"):
        keras_model.fit(dataset, validation_split=0.5)

    class Longest(keras.metrics.Metric):
        def __init__(self):
            super().__init__(name="longest")
            self.most = self.add_weight(name="most", initializer="zeros")

        def update_state(self, y_true, y_pred, sample_weight=None):
            self.most.assign(keras.ops.maximum(self.most, keras.ops.max(y_pred)))

        def result(self):
            return self.most

    with pytest.raises(ProgramError, match="longest/most"):
        on_ranks(without_batch_norm(metrics=[Longest()]), x, y, engine="local")


@pytest.mark.parametrize("engine", ["local", "gang", "shuffle"])
def test_a_further_fit_goes_on_with_the_optimizer_as_it_is(sc, engine, tmp_path):
    x, y = rows()
    order = by_rank()
    decay = keras.optimizers.schedules.InverseTimeDecay(0.02, 3, 0.5)

    model, plain = (
        without_batch_norm(optimizer=keras.optimizers.Adam(decay, amsgrad=True)) for _ in range(2)
    )
    for epochs in (2, 1):
        history = on_ranks(model, x, y, engine=engine, epochs=epochs)
        expected = plainly(plain, x[order], y[order], epochs=epochs)
        same(model, history, plain, expected)
    for one, two in zip(model.optimizer.variables, plain.optimizer.variables, strict=True):
        np.testing.assert_allclose(one, two, err_msg=one.path, **CLOSE)
    # And so does Keras by itself, with the model as it is or as it was saved.
    KerasModel(model).save_model(f"{tmp_path}/model.keras")
    loaded = KerasModel.load_model(f"{tmp_path}/model.keras")
    expected = plainly(plain, x, y)
    same(model, plainly(model, x, y), plain, expected)
    same(loaded.model, loaded.fit(x, y, BATCH, verbose=0, shuffle=False), plain, expected)


def partly_decayed():
    """Of two parameter groups."""
    optimizer = keras.optimizers.AdamW(0.05, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


@pytest.mark.parametrize(
    "make",
    [
        partly_decayed,
        lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
        lambda: keras.optimizers.Adagrad(0.1),
        lambda: keras.optimizers.Ftrl(0.1, l1_regularization_strength=0.01),
        lambda: keras.optimizers.Nadam(0.02),
        lambda: keras.optimizers.Adam(0.02, use_ema=True, ema_momentum=0.8),
        lambda: keras.optimizers.Lamb(0.02),
    ],
)
def test_the_slots_of_every_rule_go_on(make):
    x, y = rows()
    order = by_rank(ranks=2)
    model, plain = without_batch_norm(optimizer=make()), without_batch_norm(optimizer=make())
    dataset = TFDataset.from_ndarrays((x, y), batch_size=BATCH, shuffle=False)
    keras_model = KerasModel(model, engine="local", num_ranks=2)
    for _ in range(3):
        history = keras_model.fit(dataset, epochs=1, verbose=0)
        same(model, history, plain, plainly(plain, x[order], y[order]))


def test_a_training_with_checkpoints_begins_with_the_optimizer_as_it_is(sc, tmp_path):
    x, y = rows()
    decay = keras.optimizers.schedules.InverseTimeDecay(0.02, 3, 0.5)
    made = [without_batch_norm(optimizer=keras.optimizers.Adam(decay)) for _ in range(2)]
    for model in made:
        on_ranks(model, x, y, engine="local")
    on_ranks(made[0], x, y, engine="local", epochs=3, model_dir=f"{tmp_path}/whole")
    on_ranks(made[1], x, y, engine="local", epochs=1, model_dir=f"{tmp_path}/parts")
    again = without_batch_norm(optimizer=keras.optimizers.Adam(decay))
    on_ranks(again, x, y, engine="local", epochs=3, model_dir=f"{tmp_path}/parts")
    for one, two in zip(again.get_weights(), made[0].get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    assert int(again.optimizer.iterations) == int(made[0].optimizer.iterations) == 20


def test_an_optimizer_of_other_weights_starts_anew(caplog):
    x, y = rows()
    dataset = TFDataset.from_ndarrays((x, y), batch_size=BATCH)
    model = without_batch_norm()
    model.layers[0].trainable = False
    keras_model = KerasModel(model, engine="local", num_ranks=1)
    keras_model.fit(dataset, verbose=0)
    model.layers[0].trainable = True
    with caplog.at_level("WARNING", "tfspark"):
        keras_model.fit(dataset, verbose=0)
    assert "Compile the model after layers are frozen" in caplog.text
