"""Scores of validations, and what looks at them: exact over ranks, and acted on at once."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from training import batches, classified

from tfspark import (
    NDCG,
    EpochStep,
    EveryEpoch,
    HitRatio,
    MaxEpoch,
    MaxIteration,
    MaxScore,
    MinLoss,
    Plateau,
    SequentialSchedule,
    SeveralIteration,
    Step,
    TFDataset,
    TFOptimizer,
    Top5Accuracy,
    TrainSummary,
    ValidationSummary,
    Warmup,
)

LOCAL = {"engine": "local", "progress": False}
ROWS, VAL_ROWS = 26, 19  # four steps an epoch


def classifier(classes=3, rule="adam", **compiled):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(classes, "softmax")])
    rng = np.random.default_rng(5)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    model.compile(rule, "sparse_categorical_crossentropy", **compiled)
    return model


def data(val_rows=VAL_ROWS, batch_size=8):
    return TFDataset.from_ndarrays(
        classified(ROWS), batch_size=batch_size, val_tensors=classified(val_rows, 9)
    )


class Spy:
    """What training reported, step by step, read from the summaries."""

    def __init__(self, folder):
        self.train, self.val = TrainSummary(folder, "spy"), ValidationSummary(folder, "spy")

    def __call__(self, optimizer):
        return optimizer.set_train_summary(self.train).set_val_summary(self.val)

    def values(self, tag):
        return self.train.read_scalar(tag)[:, 1]

    def scores(self, tag):
        return {int(step): value for step, value, _ in self.val.read_scalar(tag)}


def binary():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(1, "sigmoid")])
    model.compile(
        "adam",
        "binary_crossentropy",
        metrics=[keras.metrics.AUC(name="auc"), "accuracy", keras.metrics.Precision(name="p")],
    )
    x, y = classified(VAL_ROWS, 9, classes=2)
    return model, (x, y[:, None].astype("f"))


def multiclass():
    model = classifier(classes=9, metrics=[Top5Accuracy(), "accuracy"])
    x, y = classified(VAL_ROWS, 9)
    return model, (x, y * 3)


def ranked():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8)])
    model.compile("adam", "mse", metrics=[HitRatio(k=3, neg_num=7), NDCG(k=3, neg_num=7)])
    chosen = np.random.default_rng(3).integers(0, 8, VAL_ROWS)
    x = np.random.default_rng(4).normal(size=(VAL_ROWS, 8)).astype("f")
    return model, (x, np.eye(8, dtype="f")[chosen])


def weighted():
    model = classifier(weighted_metrics=["accuracy"])
    weights = np.random.default_rng(6).uniform(size=VAL_ROWS).astype("f")
    return model, (*classified(VAL_ROWS, 9), weights)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("make", [binary, multiclass, ranked, weighted])
def test_scores_are_those_of_plain_keras(make, ranks):
    model, rows = make()
    dataset = TFDataset.from_ndarrays(rows, batch_size=7, val_tensors=rows)
    optimizer = TFOptimizer.from_keras(model, dataset, num_ranks=ranks, **LOCAL)
    optimizer.optimize(MaxIteration(2), validation_trigger=SeveralIteration(2))
    x, y, *sample_weight = rows
    expected = model.evaluate(
        x, y, sample_weight=sample_weight[0] if sample_weight else None, verbose=0,
        return_dict=True, batch_size=VAL_ROWS,
    )  # fmt: skip
    assert optimizer.scores == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("val_tensors", [None, classified(5)])
def test_only_what_is_measured_is_traced(val_tensors):
    weight, traced = keras.Variable(np.ones((6, 3), "f")), []

    def predict(batch):
        traced.append(True)
        return batch[1], tf.nn.softmax(batch[0] @ weight)

    optimizer = TFOptimizer.from_function(
        lambda batch: tf.reduce_mean((batch[0] @ weight) ** 2),
        [weight],
        TFDataset.from_ndarrays(classified(9), batch_size=4, val_tensors=val_tensors),
        "sgd",
        predict_fn=predict,
        metrics="accuracy",
        **LOCAL,
    )
    optimizer.close()
    assert bool(traced) == (val_tensors is not None)


def test_scores_come_from_the_executors_too(sc):
    model = classifier(metrics=["accuracy"])
    optimizer = TFOptimizer.from_keras(model, data(), engine="shuffle", num_ranks=2, progress=False)
    optimizer.optimize(MaxIteration(2), validation_trigger=SeveralIteration(2))
    optimizer.close()
    scores = model.evaluate(*classified(VAL_ROWS, 9), verbose=0, return_dict=True)
    assert scores["loss"] > 0
    # fewer rows than ranks, of which one is empty
    few = TFOptimizer.from_keras(model, data(1), engine="shuffle", num_ranks=2, progress=False)
    few.optimize(MaxIteration(1), validation_trigger=SeveralIteration(1))
    expected = model.evaluate(*classified(1, 9), verbose=0, return_dict=True)
    assert few.scores == pytest.approx(expected, rel=1e-5)
    few.close()


def test_a_score_stops_training_at_the_very_step(tmp_path):
    """The score is the first metric, not the loss."""

    def run(end, folder):
        spy = Spy(tmp_path / folder)
        rule = keras.optimizers.Adam(0.1)
        optimizer = TFOptimizer.from_keras(
            classifier(rule=rule, metrics=["accuracy"]), data(), num_ranks=2, **LOCAL
        )
        spy(optimizer).optimize(end, validation_trigger=SeveralIteration(3))
        return optimizer.step, spy.scores("accuracy")

    _, scores = run(MaxIteration(30), "all")
    bound = max(scores.values()) - 1e-6
    expected = min(step for step, score in scores.items() if score > bound)
    assert 3 < expected < 30
    step, seen = run(MaxScore(bound) | MaxIteration(30), "stopped")
    assert step == expected
    assert list(seen) == list(range(3, expected + 1, 3))
    step, _ = run(MaxScore(bound) & MaxIteration(expected + 4), "and")
    assert step >= expected + 4


def test_a_loss_stops_training_at_the_very_step(tmp_path):
    def run(end, folder):
        spy = Spy(tmp_path / folder)
        optimizer = TFOptimizer.from_keras(
            classifier(rule=keras.optimizers.SGD(0.5)), data(), num_ranks=2, **LOCAL
        )
        spy(optimizer).optimize(end)
        return optimizer.step, spy.values("Loss")

    _, losses = run(MaxIteration(20), "all")
    bound = np.median(losses)
    expected = 1 + int(np.argmax(losses < bound))
    assert 1 < expected < 20
    step, seen = run(MinLoss(float(bound)) | MaxIteration(20), "stopped")
    assert step == expected
    np.testing.assert_array_equal(seen, losses[:expected])


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        (
            lambda: (
                SequentialSchedule(learning_rate=0.01).add(Warmup(0.01), 4).add(Step(3, 0.5), 100)
            ),
            lambda step: 0.01 + 0.01 * step if step < 4 else 0.05 * 0.5 ** ((step - 4) // 3),
        ),
        (lambda: EpochStep(2, 0.1, learning_rate=0.5), lambda step: 0.5 * 0.1 ** (step // 8)),
        (
            lambda: keras.optimizers.schedules.CosineDecay(0.1, 10),
            lambda step: 0.05 * (1 + np.cos(np.pi * min(step, 10) / 10)),
        ),
    ],
    ids=["warmup and step", "epochs", "keras"],
)
def test_rates_follow_the_schedule(tmp_path, schedule, formula):
    spy = Spy(tmp_path)
    model = classifier(rule=keras.optimizers.SGD(schedule()))
    start = model.get_weights()
    optimizer = TFOptimizer.from_keras(model, data(), num_ranks=2, **LOCAL)
    spy(optimizer).optimize(MaxEpoch(4))
    rates = spy.values("LearningRate")
    np.testing.assert_allclose(rates, [formula(step) for step in range(16)], rtol=1e-5, atol=1e-9)

    # And these rates are what the weights were moved by: the same by a rate set by hand each step.
    by_hand = classifier(rule=keras.optimizers.SGD(1.0))
    by_hand.set_weights(start)
    for rate, batch in zip(rates, batches(data(), classified(ROWS), 2, 16), strict=True):
        by_hand.optimizer.learning_rate = rate
        by_hand.train_on_batch(*batch)
    for ours, theirs in zip(model.get_weights(), by_hand.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("monitor", ["score", "accuracy", "loss"])
def test_plateau_follows_validation(tmp_path, monitor):
    """The rate halves each time that the monitored score was not better twice in a row."""
    mode = "min" if monitor == "loss" else "max"
    spy = Spy(tmp_path)
    schedule = Plateau(monitor, 0.5, patience=1, mode=mode, epsilon=0.3, learning_rate=0.1)
    optimizer = TFOptimizer.from_keras(
        classifier(rule=keras.optimizers.SGD(schedule), metrics=["accuracy"]),
        data(),
        num_ranks=2,
        **LOCAL,
    )
    spy(optimizer).optimize(MaxIteration(24), validation_trigger=SeveralIteration(2))
    scores = spy.scores("accuracy" if monitor == "score" else monitor)
    assert list(scores) == list(range(2, 25, 2))
    rate, best, waited, expected = 0.1, None, 0, []
    for step in range(24):
        if step in scores:
            value = scores[step] if mode == "max" else -scores[step]
            if best is None or value > best + 0.3:
                best, waited = value, 0
            elif waited >= 1:
                rate, waited = rate / 2, 1
            else:
                waited += 1
        expected.append(rate)
    assert expected[-1] < 0.1, "nothing was tested"
    np.testing.assert_allclose(spy.values("LearningRate"), expected, rtol=1e-5)


def test_curves(tmp_path):
    """Every curve has a value per step; the scores one per validation."""
    spy = Spy(tmp_path)
    spy.train.set_summary_trigger("LearningRate", EveryEpoch())
    model = classifier(metrics=["accuracy"], rule=keras.optimizers.SGD(0.25))
    start = model.get_weights()
    optimizer = TFOptimizer.from_keras(model, data(), num_ranks=2, **LOCAL)
    spy(optimizer).optimize(MaxEpoch(3))
    phases = {f"Phase/{name}" for name in ("data", "gradient", "update", "exchange")}
    assert set(spy.train.tags()) == {"Loss", "LearningRate", "Throughput"} | phases
    assert set(spy.val.tags()) == {"loss", "accuracy"}
    for tag in {"Loss", "Throughput"} | phases:
        np.testing.assert_array_equal(spy.train.read_scalar(tag)[:, 0], np.arange(1, 13))
        assert (spy.values(tag) >= 0).all() and np.isfinite(spy.values(tag)).all()
    np.testing.assert_array_equal(
        spy.train.read_scalar("LearningRate")[:, :2], [[4, 0.25], [8, 0.25], [12, 0.25]]
    )
    assert list(spy.scores("accuracy")) == [4, 8, 12]
    assert spy.scores("accuracy")[12] == pytest.approx(optimizer.scores["accuracy"])
    by_hand = classifier(rule=keras.optimizers.SGD(0.25))
    by_hand.set_weights(start)
    losses = [by_hand.train_on_batch(*b) for b in batches(data(), classified(ROWS), 2, 12)]
    assert len(losses) == 12
    assert spy.values("Loss")[0] == pytest.approx(float(losses[0]), rel=1e-5)


@pytest.mark.parametrize("engine", ["shuffle", "gang"])
def test_curves_from_the_executors(sc, tmp_path, engine):
    spy = Spy(tmp_path)
    local, other = (
        TFOptimizer.from_keras(classifier(), data(), engine=name, num_ranks=2, progress=False)
        for name in ("local", engine)
    )
    spy(other).optimize(MaxIteration(9))
    other.close()
    reference = Spy(tmp_path / "local")
    reference(local).optimize(MaxIteration(9))
    np.testing.assert_array_equal(spy.values("Loss"), reference.values("Loss"))
    assert set(spy.train.tags()) == set(reference.train.tags())
    assert (spy.values("Throughput") > 0).all()
    assert (spy.values("Phase/gradient") > 0).all()
