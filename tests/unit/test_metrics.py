"""Metrics against NumPy by hand, and merged over ranks."""

import math

import keras
import numpy as np
import pytest

from tfspark.errors import InvalidInputError
from tfspark.graph.metrics import (
    NDCG,
    HitRatio,
    Top1Accuracy,
    Top5Accuracy,
    metric_from,
    metrics_from,
)

RNG = np.random.default_rng(0)


def value_of(metric, y_true, y_pred):
    metric.reset_state()
    metric.update_state(y_true, y_pred)
    return float(metric.result())


def ranking_by_hand(scores, positives, k):
    """Hit ratio and gain by counting, item by item."""
    hits = gains = 0.0
    for row, positive in zip(scores, positives, strict=True):
        rank = 1 + sum(score > row[positive] for score in row)
        hits += rank <= k
        gains += math.log(2) / math.log(rank + 1) if rank <= k else 0.0
    return hits / len(scores), gains / len(scores)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_ranking_metrics_by_hand(k):
    scores = RNG.integers(0, 30, [50, 21]).astype(np.float32)  # with ties
    positives = RNG.integers(0, 21, 50)
    hit_ratio, ndcg = ranking_by_hand(scores, positives, k)
    assert 0 < ndcg < 1
    for labels in (positives, positives[:, None], np.eye(21)[positives]):
        assert value_of(HitRatio(k, 20), labels, scores) == pytest.approx(hit_ratio)
        assert value_of(NDCG(k, 20), labels, scores) == pytest.approx(ndcg)


def test_ranking_metrics_merge_over_ranks_by_sums():
    scores, positives = RNG.random([11, 5]), RNG.integers(0, 5, 11)
    for cls in (HitRatio, NDCG):
        whole, parts = cls(2, 4), [cls(2, 4) for _ in range(3)]
        whole.update_state(positives, scores)
        for part, rows in zip(parts, np.split(np.arange(11), [1, 4]), strict=True):
            part.update_state(positives[rows], scores[rows])
        merged = cls(2, 4)
        for index, variable in enumerate(merged.variables):
            variable.assign(sum(part.variables[index].numpy() for part in parts))
        assert float(merged.result()) == pytest.approx(float(whole.result()))


def test_ranking_metrics_with_odd_scores():
    nan, inf = np.nan, np.inf
    assert value_of(HitRatio(1, 2), [0], [[inf, 1, 2]]) == 1
    assert value_of(HitRatio(1, 2), [0], [[-inf, 1, 2]]) == 0
    assert value_of(HitRatio(2, 2), [0], [[nan, 1, 2]]) == 0
    assert value_of(HitRatio(1, 2), [0], [[3, nan, 2]]) == 0
    assert value_of(HitRatio(1, 2), [0], [[2, 2, 2]]) == 1


@pytest.mark.parametrize("label", [[0, 0, 0], [1, 1, 0]])
def test_not_exactly_one_positive_shows(label):
    assert math.isnan(value_of(HitRatio(1, 2), [[1, 0, 0], label], np.ones([2, 3])))
    assert math.isnan(value_of(NDCG(1, 2), [[1, 0, 0], label], np.ones([2, 3])))


def test_rows_that_are_no_groups_are_refused():
    with pytest.raises(InvalidInputError, match=r"one row per user.*reshape\(scores, \[-1, 101\]"):
        HitRatio().update_state(np.zeros([202, 1]), np.zeros([202, 1]))
    with pytest.raises(InvalidInputError, match=r"labels \[2, 50\]"):
        NDCG().update_state(np.zeros([2, 50]), np.zeros([2, 101]))
    with pytest.raises(InvalidInputError, match="k=0"):
        HitRatio(k=0)


def test_accuracies_by_hand():
    scores = RNG.random([40, 12])
    labels = RNG.integers(0, 12, 40)
    order = np.argsort(-scores, axis=1)
    top1 = np.mean(order[:, 0] == labels)
    top5 = np.mean([label in row[:5] for label, row in zip(labels, order, strict=True)])
    assert 0 < top5 < 1
    for form in (labels, labels[:, None], np.eye(12)[labels]):
        assert value_of(Top1Accuracy(), form, scores) == pytest.approx(top1)
        assert value_of(Top5Accuracy(), form, scores) == pytest.approx(top5)
    assert value_of(Top5Accuracy(), [2, 0], RNG.random([2, 3])) == 1


@pytest.mark.parametrize("true_shape", [(4,), (4, 1)])
@pytest.mark.parametrize("pred_shape", [(4,), (4, 1)])
def test_binary_accuracy(true_shape, pred_shape):
    y_true = np.reshape([1, 0, 1, 0], true_shape)
    y_pred = np.reshape([0.9, 0.8, 0.3, 0.1], pred_shape)
    assert value_of(metric_from("accuracy"), y_true, y_pred) == 0.5


def test_accuracy_is_that_of_keras():
    x = RNG.random([32, 4]).astype(np.float32)
    for units, labels in ((1, RNG.integers(0, 2, 32)), (3, RNG.integers(0, 3, 32))):
        model = keras.Sequential([keras.layers.Dense(units, activation="sigmoid")])
        model.compile(metrics=["accuracy"], loss="mse")
        expected = model.evaluate(x, labels[:, None], verbose=0, return_dict=True)["accuracy"]
        ours = value_of(metric_from("accuracy"), labels[:, None], model.predict(x, verbose=0))
        assert ours == pytest.approx(expected)


def double_error(y_true, y_pred):
    return 2 * keras.ops.abs(y_true - y_pred)[:, 0]


@pytest.mark.parametrize(
    ("value", "name", "kind"),
    [
        ("accuracy", "accuracy", Top1Accuracy),
        ("Top5Accuracy", "Top5Accuracy", Top5Accuracy),
        ("top5", "top5", Top5Accuracy),
        ("AUC", "AUC", keras.metrics.AUC),
        ("hit_ratio", "hit_ratio", HitRatio),
        ("mae", "mae", keras.metrics.MeanAbsoluteError),
        ("MeanSquaredError", "MeanSquaredError", keras.metrics.MeanSquaredError),
        (keras.metrics.Recall, "recall", keras.metrics.Recall),
        (keras.losses.Huber(name="huber"), "huber", keras.metrics.MeanMetricWrapper),
        (double_error, "double_error", keras.metrics.MeanMetricWrapper),
    ],
)
def test_names_become_metrics(value, name, kind):
    keras.utils.clear_session()  # Keras numbers repeated names
    metric = metric_from(value)
    assert type(metric) is kind
    assert metric.name == name
    assert metric_from(value, "mine").name == "mine"


def test_values_of_wrapped_functions_and_losses():
    y_true, y_pred = np.float32([[0], [1], [5]]), np.float32([[1], [1], [1]])
    assert value_of(metric_from(double_error), y_true, y_pred) == pytest.approx(10 / 3)
    loss = metric_from(keras.losses.MeanSquaredError())
    loss.update_state(y_true[:2], y_pred[:2])
    loss.update_state(y_true[2:], y_pred[2:])
    assert float(loss.result()) == pytest.approx(17 / 3)  # a mean of batch means gives 8.25


def test_collections():
    auc = keras.metrics.AUC(name="auc")
    assert metrics_from(None) == {}
    assert metrics_from(auc) == {"auc": auc}
    assert list(metrics_from(["mae", auc])) == ["mae", "auc"]
    assert list(metrics_from({"error": "mae", "area": auc})) == ["error", "area"]
    assert auc.name == "area"
    with pytest.raises(InvalidInputError, match=r"different names.*\['mae', 'mae'\]"):
        metrics_from(["mae", "mae"])


@pytest.mark.parametrize("value", ["no_such_metric", 3, None, int, object(), {"a": 1}])
def test_wrong_types_are_refused(value):
    with pytest.raises(InvalidInputError, match=r"A metric is a Keras metric.*Received"):
        metric_from(value)


@pytest.mark.parametrize(
    "metric", [HitRatio(3, 7, name="h"), NDCG(2, 9), Top1Accuracy(), Top5Accuracy("t")]
)
def test_config_round_trip(metric):
    again = keras.metrics.deserialize(keras.metrics.serialize(metric))
    assert type(again) is type(metric)
    assert again.get_config() == metric.get_config()
