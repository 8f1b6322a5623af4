"""One clear error, before any training where that is possible, and nothing is lost."""

import re
import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from training import assert_same_bits, classified, differ

from tfspark import Adam, MaxEpoch, MaxIteration, TFDataset, TFOptimizer
from tfspark.errors import (
    InvalidInputError,
    NonFiniteError,
    ProgramError,
    TrainingError,
    UnsupportedRuleError,
)
from tfspark.slots import busy_slots
from tfspark.train.engines import choose_engine

v1 = tf.compat.v1
LOCAL = {"engine": "local", "progress": False}
LOSS = "sparse_categorical_crossentropy"


def classifier():
    return keras.Sequential([keras.Input((6,)), layers.Dense(3, "softmax")])


def data(batch_size=8, **options):
    return TFDataset.from_ndarrays(classified(26), batch_size=batch_size, **options)


def keras_optimizer(model=None, dataset=None, loss=LOSS, optimizer="adam", **options):
    return TFOptimizer.from_keras(
        model or classifier(), dataset or data(), loss=loss, optimizer=optimizer,
        **{**LOCAL, **options},
    )  # fmt: skip


def graph_optimizer(loss_of, optimizer="adam", **options):
    dataset = data()
    with tf.Graph().as_default():
        loss = loss_of(*dataset.tensors)
        return TFOptimizer.from_loss(loss, optimizer, **LOCAL, **options)


def kernel():
    return v1.get_variable("kernel", [6, 3])


class OwnTrainStep(keras.Model):
    def train_step(self, data):
        return {}


BAD = {
    "a vector as loss": (
        lambda: graph_optimizer(lambda x, y: tf.reduce_sum(x @ kernel(), 1)),
        ProgramError,
        r"must be a scalar.*Received: .*\(None,\).*reduce_mean",
    ),
    "a loss without variables": (
        lambda: graph_optimizer(lambda x, y: tf.reduce_mean(x)),
        ProgramError,
        "must depend on a trainable variable.*Mean.*trainable=True",
    ),
    "a loss without the data set": (
        lambda: graph_optimizer(lambda x, y: tf.reduce_mean(kernel()) ** 2),
        ProgramError,
        "must depend on the tensors of one data set.*of 0",
    ),
    "a data set the loss does not use": (
        lambda: graph_optimizer(lambda x, y: tf.reduce_mean(kernel()) ** 2, dataset=data()),
        ProgramError,
        "must depend on the data set.*uses none of its tensors features.*labels",
    ),
    "an integer loss": (
        lambda: graph_optimizer(lambda x, y: tf.reduce_sum(y)),
        ProgramError,
        "must be a float",
    ),
    "an eager loss": (
        lambda: TFOptimizer.from_loss(tf.constant(1.0), "adam", dataset=data(), **LOCAL),
        ProgramError,
        "a tensor of a graph.*disable_eager_execution",
    ),
    "a misspelt setting": (
        lambda: keras_optimizer(num_rank=2),
        InvalidInputError,
        "Settings of a training are.*num_ranks.*Received: num_rank. Did you mean num_ranks",
    ),
    "no loss at all": (
        lambda: keras_optimizer(loss=None),
        ProgramError,
        "needs a loss.*Compile it, or give loss",
    ),
    "a model that was not compiled": (
        lambda: TFOptimizer.from_keras(classifier(), data(), **LOCAL),
        InvalidInputError,
        "needs an optimizer.*not compiled.*pass optimizer",
    ),
    "no model": (
        lambda: keras_optimizer(model=tf.Module()),
        ProgramError,
        "A Keras model is expected.*Module",
    ),
    "its own train_step": (
        lambda: keras_optimizer(model=OwnTrainStep()),
        ProgramError,
        "its own train_step.*OwnTrainStep.*compute_loss",
    ),
    "a constraint": (
        lambda: keras_optimizer(
            keras.Sequential(
                [keras.Input((6,)), layers.Dense(3, kernel_constraint="non_neg", name="c")]
            )
        ),
        ProgramError,
        "constraint.*c/kernel",
    ),
    "all frozen": (
        lambda: keras_optimizer(
            keras.Sequential([keras.Input((6,)), layers.Dense(3, trainable=False)])
        ),
        ProgramError,
        "must depend on a trainable weight",
    ),
    "an optimizer of TF1": (
        lambda: keras_optimizer(optimizer=v1.train.AdamOptimizer()),
        InvalidInputError,
        "one of keras.optimizers.*namesake",
    ),
    "an optimizer's class": (
        lambda: keras_optimizer(optimizer=Adam),
        InvalidInputError,
        r"Make an instance: Adam\(",
    ),
    "an unknown optimizer": (
        lambda: keras_optimizer(optimizer="adamant"),
        InvalidInputError,
        "'adamant'",
    ),
    "a rule that cannot be sharded": (
        lambda: keras_optimizer(optimizer=keras.optimizers.Adafactor()),
        UnsupportedRuleError,
        "Adafactor.*use Adam or Lion",
    ),
    "a prefix of nothing": (
        lambda: keras_optimizer(optimizer={"nothing/": Adam(), "": Adam()}),
        InvalidInputError,
        "Every prefix.*nothing/.*kernel",
    ),
    "no batch size": (
        lambda: keras_optimizer(dataset=data(batch_size=-1, batch_per_thread=4)),
        InvalidInputError,
        "needs a global batch size.*Pass batch_size",
    ),
    "no data set": (
        lambda: TFOptimizer.from_function(lambda batch: 0.0, [], None, "adam", **LOCAL),
        InvalidInputError,
        "must be a TFDataset.*NoneType",
    ),
    "an engine that is not there": (
        lambda: keras_optimizer(engine="gangs").optimize(),
        InvalidInputError,
        "'local', 'shuffle'.*Received: engine='gangs'",
    ),
    "ranks": (lambda: keras_optimizer(num_ranks=0), InvalidInputError, "num_ranks.*Received: 0"),
    "parts of a batch": (
        lambda: keras_optimizer(accumulation_steps=1.5),
        InvalidInputError,
        "accumulation_steps.*Received: 1.5",
    ),
    "bounds": (
        lambda: keras_optimizer().set_constant_gradient_clipping(1.0, -1.0),
        InvalidInputError,
        "smaller and a larger bound",
    ),
    "a norm": (
        lambda: keras_optimizer().set_gradient_clipping_by_l2_norm(0.0),
        InvalidInputError,
        "norm above 0",
    ),
    "a trigger's number": (
        lambda: keras_optimizer().optimize(5),
        InvalidInputError,
        r"end_trigger is a trigger, such as MaxEpoch\(5\).*Received: 5",
    ),
    "a trigger's class": (
        lambda: keras_optimizer().optimize(MaxEpoch(1), checkpoint_trigger=MaxEpoch),
        InvalidInputError,
        "checkpoint_trigger is a trigger.*the class MaxEpoch",
    ),
    "a summary's name": (
        lambda: keras_optimizer().set_train_summary("/tmp/logs"),
        InvalidInputError,
        "A TrainSummary is expected.*'/tmp/logs'",
    ),
    "a model_dir": (
        lambda: keras_optimizer(model_dir="nosuch://bucket"),
        InvalidInputError,
        "model_dir is a path or a URL",
    ),
    "inputs of another structure": (
        lambda: graph_optimizer(lambda x, y: tf.reduce_mean(x @ kernel()), inputs=[1, 2, 3]),
        InvalidInputError,
        "inputs have the structure",
    ),
    "metrics without predictions": (
        lambda: TFOptimizer.from_function(
            lambda batch: tf.reduce_mean(VARIABLE**2),
            [VARIABLE],
            data(),
            "sgd",
            metrics="accuracy",
            **LOCAL,
        ),
        ProgramError,
        "need labels and predictions.*predict_fn",
    ),
}
VARIABLE = tf.Variable(1.0)


@pytest.mark.parametrize("case", BAD)
def test_refused(case):
    make, error, message = BAD[case]
    with pytest.raises(error) as raised:
        make()
    assert re.search(message, str(raised.value)), str(raised.value)


def test_a_loss_of_another_graph():
    dataset = data()
    with tf.Graph().as_default():
        x, _ = dataset.tensors
    message = "in the graph of the data set's tensors.*features:0"
    with tf.Graph().as_default(), pytest.raises(ProgramError, match=message):
        own = v1.placeholder(tf.float32, [None, 6])
        TFOptimizer.from_loss(
            tf.reduce_mean(own @ kernel()), "adam", dataset=dataset, inputs=(x, x), **LOCAL
        )


def test_settings_after_training_has_begun():
    optimizer = keras_optimizer()
    optimizer.optimize(MaxIteration(1))
    with pytest.raises(InvalidInputError, match=r"clip_norm must be set before.*close\(\)"):
        optimizer.set_gradient_clipping_by_l2_norm(1.0)


def test_plateau_of_a_score_that_is_not_there():
    from tfspark import Plateau

    rule = keras.optimizers.SGD(Plateau("accuracy", learning_rate=0.1))
    optimizer = keras_optimizer(optimizer=rule, dataset=data(val_tensors=classified(5)))
    with pytest.raises(InvalidInputError, match=r"monitors 'accuracy'.*\['loss', 'score'\]"):
        optimizer.optimize(MaxEpoch(1))


def test_the_setting_of_an_application(sc, monkeypatch):
    class Context:
        def __init__(self, value):
            self._conf = {"spark.tfspark.engine": value}

    assert choose_engine("auto", Context("local"), 2) == "local"
    assert choose_engine("shuffle", Context("local"), 2) == "shuffle"
    with pytest.raises(InvalidInputError, match=r"Received: spark\.tfspark\.engine='gangs'"):
        choose_engine("auto", Context("gangs"), 2)
    assert choose_engine("auto", sc, 4) == "gang"
    assert choose_engine("auto", sc, 5) == "shuffle"
    with pytest.raises(
        InvalidInputError, match=r"4 task slots, \d of them free now, for 5 ranks.*shuffle"
    ):
        choose_engine("gang", sc, 5)
    assert choose_engine("auto", None, 2) == "local"
    with pytest.raises(InvalidInputError, match=r"no active SparkContext.*init_nncontext\(\)"):
        choose_engine("shuffle", None, 2)


def test_slots_that_other_jobs_hold_are_counted(sc, caplog, tmp_path):
    def hold(rows):  # until the file is there
        import os
        import time

        deadline = time.monotonic() + 60
        while not os.path.exists(folder / "end") and time.monotonic() < deadline:
            time.sleep(0.05)
        return rows

    folder = tmp_path
    job = threading.Thread(
        target=sc.parallelize(range(3), 3).mapPartitions(hold).count, daemon=True
    )
    job.start()
    try:
        while busy_slots(sc) < 3:
            assert job.is_alive()
            time.sleep(0.05)
        with pytest.raises(InvalidInputError, match=r"4 task slots, 1 of them free now, for 5 "):
            choose_engine("gang", sc, 5)
        with caplog.at_level("INFO", logger="tfspark"):
            assert choose_engine("auto", sc, 2) == "gang"
            assert choose_engine("auto", sc, 1) == "gang"
    finally:
        (folder / "end").touch()
        job.join()
    first, second = (record.getMessage() for record in caplog.records)
    assert "all 2 ranks at the same time (free now: 1, a round waits for the others)" in first
    assert second.endswith("all 1 ranks at the same time.")


@pytest.mark.parametrize("engine", ["local", "shuffle", "gang"])
def test_what_an_operation_complains_of(sc, engine):
    x, y = classified(26)
    y[17] = 12
    dataset = TFDataset.from_ndarrays((x, y), batch_size=8, shuffle=False)
    optimizer = TFOptimizer.from_keras(
        classifier(), dataset, loss=LOSS, optimizer="sgd", engine=engine, num_ranks=1,
        progress=False,
    )  # fmt: skip
    with pytest.raises(TrainingError) as raised:
        optimizer.optimize(MaxIteration(9))
    assert (raised.value.rank, raised.value.step) == (0, 3)
    assert re.search(r"compute every batch.*label value of 12", str(raised.value))
    assert "Traceback" not in str(raised.value)
    assert 1 <= optimizer.step < 3  # that of the last commit
    optimizer.close()


@pytest.mark.parametrize("engine", ["local", "shuffle", "gang"])
@pytest.mark.parametrize("what", ["row", "rate"])
def test_not_a_number_stops_and_keeps_the_last_good_weights(sc, engine, what):
    """A row that is NaN, or a rate so high that the weights explode."""

    def run(end, bad):
        x, y = classified(26)
        if bad and what == "row":
            x[17, 2] = np.nan
        dataset = TFDataset.from_ndarrays((x, y), batch_size=8, shuffle=False)
        model = keras.Sequential([keras.Input((6,)), layers.Dense(3, "softmax", use_bias=False)])
        model.set_weights([np.ones((6, 3), "f")])
        optimizer = TFOptimizer.from_keras(
            model, dataset, loss=LOSS,
            optimizer=keras.optimizers.SGD(1e38 if what == "rate" else 0.1), engine=engine,
            num_ranks=2, progress=False,
        )  # fmt: skip
        try:
            optimizer.optimize(MaxIteration(end))
        except NonFiniteError as error:
            return error, optimizer.step, model.get_weights()
        finally:
            optimizer.close()
        return None, end, model.get_weights()

    error, _, weights = run(50, bad=True)
    assert error is not None
    good = error.step - 1
    assert 1 <= good < 50
    assert error.rank == (1 if what == "row" else error.rank)
    assert f"step {error.step}" in str(error) and "last good commit" in str(error)
    none, _, expected = run(good, bad=False)
    assert none is None
    assert np.isfinite(weights[0]).all() and differ(weights, [np.ones((6, 3))])
    assert_same_bits(weights, expected)


def test_training_goes_on_after_the_bad_step_was_explained():
    """After an error the optimizer is whole: the same call meets the same step again."""
    x, y = classified(26)
    x[17, 2] = np.nan
    dataset = TFDataset.from_ndarrays((x, y), batch_size=8, shuffle=False)
    optimizer = keras_optimizer(dataset=dataset, num_ranks=1)
    steps = []
    for _ in range(2):
        with pytest.raises(NonFiniteError) as raised:
            optimizer.optimize(MaxIteration(9))
        steps.append(raised.value.step)
    assert steps == [3, 3]
    assert optimizer.step == 2
