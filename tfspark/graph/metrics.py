"""Metrics: Keras's own, those of Analytics Zoo, and one way to name them.

Every metric here is a Keras metric whose accumulators are sums over rows, so the accumulators of
several ranks merge exactly by adding them. Keras's own metrics are of that kind too; a metric of
your own has to be (no running mean, no maximum) if it is to be exact on more than one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops
from keras.metrics import Metric

from tfspark.errors import InvalidInputError


def accuracy(y_true: Any, y_pred: Any) -> Any:
    """Per row, 1.0 where the prediction is right, chosen by shape as Keras does for "accuracy".

    * `y_pred [rows, …, 1]` (or `[rows]`): binary, right on the side of 0.5 that the label is on;
    * labels of one rank less, or with a last dimension of 1: indices of the right class;
    * else: labels as one-hot vectors.

    Args:
        y_true: labels.
        y_pred: scores, `[rows, …, classes]`.
    """
    y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
    if len(y_pred.shape) == 1 or y_pred.shape[-1] == 1:
        if len(y_true.shape) > len(y_pred.shape):
            y_true = ops.squeeze(y_true, -1)
        elif len(y_true.shape) < len(y_pred.shape):
            y_true = ops.expand_dims(y_true, -1)
        return keras.metrics.binary_accuracy(y_true, y_pred)
    if len(y_true.shape) < len(y_pred.shape) or y_true.shape[-1] == 1:
        return keras.metrics.sparse_categorical_accuracy(y_true, y_pred)
    return keras.metrics.categorical_accuracy(y_true, y_pred)


def top_k_accuracy(y_true: Any, y_pred: Any, k: int = 5) -> Any:
    """Per row, 1.0 where the right class is among the k best, ties in its favour.

    Args:
        y_true: indices `[rows]` or `[rows, 1]`, or one-hot vectors `[rows, classes]`.
        y_pred: scores `[rows, classes]`.
        k: how many count as best; with no more than k classes every row is right.
    """
    # The kernel below takes float32 only.
    y_true, y_pred = ops.convert_to_tensor(y_true), ops.cast(y_pred, "float32")
    classes = y_pred.shape[-1]
    if len(y_true.shape) == len(y_pred.shape) and y_true.shape[-1] not in (1, None):
        return keras.metrics.top_k_categorical_accuracy(y_true, y_pred, k=min(k, classes))
    y_true = ops.reshape(y_true, (-1,))
    return keras.metrics.sparse_top_k_categorical_accuracy(y_true, y_pred, k=min(k, classes))


@keras.saving.register_keras_serializable("tfspark")
class Top1Accuracy(keras.metrics.MeanMetricWrapper):
    """The fraction of rows whose best score is the right class; see `accuracy` for the shapes."""

    def __init__(self, name: str = "top1_accuracy", dtype: Any = None):
        super().__init__(accuracy, name=name, dtype=dtype)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {"name": self.name, "dtype": self.dtype}


@keras.saving.register_keras_serializable("tfspark")
class Top5Accuracy(keras.metrics.MeanMetricWrapper):
    """The fraction of rows whose right class is among the five best; see `top_k_accuracy`."""

    def __init__(self, name: str = "top5_accuracy", dtype: Any = None):
        super().__init__(top_k_accuracy, name=name, dtype=dtype, k=5)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {"name": self.name, "dtype": self.dtype}


class _RankingMetric(keras.metrics.MeanMetricWrapper):
    """Base of the metrics over one positive and `neg_num` negative items."""

    def __init__(self, score: Callable[..., Any], k: int, neg_num: int, name: str, dtype: Any):
        if k < 1 or neg_num < 1:
            raise InvalidInputError(
                f"k and neg_num are at least 1. Received: k={k}, neg_num={neg_num}."
            )
        super().__init__(score, name=name, dtype=dtype, k=k, neg_num=neg_num)
        self.k = k
        self.neg_num = neg_num

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {"k": self.k, "neg_num": self.neg_num, "name": self.name, "dtype": self.dtype}


@keras.saving.register_keras_serializable("tfspark")
class HitRatio(_RankingMetric):
    """How often the one item a user chose is among the best k of `neg_num + 1` items.

    One row is one user, with all of the user's items: so the metric does not depend on how rows
    fall into batches and ranks, and every row counts once. (Analytics Zoo had one row per item and
    relied on `neg_num + 1` neighbouring rows staying together; `reshape(items, [-1, neg_num + 1])`
    turns such data into rows of this kind.)

    Args:
        k: how many items are recommended.
        neg_num: negative items of each user.
        name, dtype: as of every Keras metric.

    Call arguments:
        y_true: which item is the positive one: one-hot `[rows, neg_num + 1]` with a single 1, or
            its index, `[rows]` or `[rows, 1]`.
        y_pred: scores `[rows, neg_num + 1]`.

    A row without exactly one positive item makes the result NaN. A tie counts in favour of the
    positive item, a score that is not a number against it. Source: He et al., Neural Collaborative
    Filtering, 2017, section 4.1; BigDL 2, `HitRatio`.

    Example:
        >>> metric = HitRatio(k=2, neg_num=3)
        >>> metric.update_state([[1, 0, 0, 0], [0, 0, 0, 1]], [[9, 1, 2, 3], [4, 3, 2, 1]])
        >>> float(metric.result())
        0.5
    """

    def __init__(self, k: int = 10, neg_num: int = 100, name: str = "hit_ratio", dtype: Any = None):
        super().__init__(_hit, k, neg_num, name, dtype)


@keras.saving.register_keras_serializable("tfspark")
class NDCG(_RankingMetric):
    """Normalised discounted cumulative gain of the one item a user chose, cut off at k.

    `log(2) / log(rank + 1)` if the item's rank (from 1) is at most k, else 0; the mean over rows.
    Rows, arguments and source are those of `HitRatio`.

    Example:
        >>> metric = NDCG(k=2, neg_num=3)
        >>> metric.update_state([0, 1], [[9, 1, 2, 3], [4, 3, 2, 1]])
        >>> round(float(metric.result()), 4)  # (1 + log(2) / log(3)) / 2
        0.8155
    """

    def __init__(self, k: int = 10, neg_num: int = 100, name: str = "ndcg", dtype: Any = None):
        super().__init__(_gain, k, neg_num, name, dtype)


def _hit(y_true: Any, y_pred: Any, k: int, neg_num: int) -> Any:
    rank, is_valid = _rank_of_positive(y_true, y_pred, neg_num)
    return ops.where(is_valid, ops.cast(rank <= k, "float32"), float("nan"))


def _gain(y_true: Any, y_pred: Any, k: int, neg_num: int) -> Any:
    rank, is_valid = _rank_of_positive(y_true, y_pred, neg_num)
    rank = ops.cast(rank, "float32")
    gain = ops.where(rank <= k, ops.log(2.0) / ops.log(rank + 1.0), 0.0)
    return ops.where(is_valid, gain, float("nan"))


def _rank_of_positive(y_true: Any, y_pred: Any, neg_num: int) -> tuple[Any, Any]:
    """The rank (from 1) of each row's positive item, and whether there is exactly one, `[rows]`."""
    items = neg_num + 1
    y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
    shapes = tuple(y_true.shape), tuple(y_pred.shape)
    is_index = len(shapes[0]) == 1 or (len(shapes[0]) == 2 and shapes[0][1] == 1)
    if len(shapes[1]) != 2 or shapes[1][1] != items or not (is_index or shapes[0][1:] == (items,)):
        raise InvalidInputError(
            f"HitRatio and NDCG with neg_num={neg_num} take one row per user: scores "
            f"[rows, {items}], and as label the positive item's index [rows] or a one-hot vector "
            f"[rows, {items}]. Received: labels {list(shapes[0])}, scores {list(shapes[1])}. "
            f"Group the items of a user into one row: reshape(scores, [-1, {items}])."
        )
    if is_index:
        index = ops.cast(ops.reshape(y_true, (-1, 1)), "int32")
        is_positive = ops.equal(ops.expand_dims(ops.arange(items, dtype="int32"), 0), index)
    else:
        is_positive = ops.equal(ops.cast(y_true, "float32"), 1.0)
    scores = ops.cast(y_pred, "float32")
    # where, not a product: an infinite score times 0 is not a number.
    positive = ops.sum(ops.where(is_positive, scores, 0.0), axis=-1, keepdims=True)
    is_better = ops.logical_not(ops.less_equal(scores, positive))
    rank = 1 + ops.sum(ops.cast(is_better, "int32"), axis=-1)
    return rank, ops.equal(ops.sum(ops.cast(is_positive, "int32"), axis=-1), 1)


_ALIASES: dict[str, type[Metric]] = {
    "accuracy": Top1Accuracy,
    "acc": Top1Accuracy,
    "top1": Top1Accuracy,
    "top1accuracy": Top1Accuracy,
    "top5": Top5Accuracy,
    "top5accuracy": Top5Accuracy,
    "hitratio": HitRatio,
    "ndcg": NDCG,
    "auc": keras.metrics.AUC,
    "precision": keras.metrics.Precision,
    "recall": keras.metrics.Recall,
}


def metric_from(value: Any, name: str | None = None) -> Metric:
    """A Keras metric from a name, a metric, a loss or a function.

    Args:
        value: a `keras.metrics.Metric` (returned as it is), a metric class, a loss of Keras, a
            function `(y_true, y_pred) -> [rows]`, or a name: any of Keras's, or "accuracy",
            "top1", "top5", "auc", "hit_ratio", "ndcg", "precision", "recall" (underscores and
            capitals do not matter).
        name: for results and summaries; a metric object is renamed. Default: the metric's own
            name, or `value` where that is a name, as in Keras.

    Raises:
        InvalidInputError: anything else.

    Example:
        >>> metric_from("top5").name
        'top5'
    """
    metric = _resolve(value)
    if name is not None or isinstance(value, str):
        metric.name = name or value
    return metric


def metrics_from(value: Any) -> dict[str, Metric]:
    """Metrics by name, in order, from one, a list or tuple, a dict of name to metric, or None.

    Raises:
        InvalidInputError: as `metric_from`, or two metrics of one name.
    """
    if value is None:
        return {}
    if isinstance(value, dict):
        return {str(name): metric_from(metric, str(name)) for name, metric in value.items()}
    values = value if isinstance(value, list | tuple) else [value]
    metrics = [metric_from(item) for item in values]
    names = [metric.name for metric in metrics]
    if len(set(names)) != len(names):
        raise InvalidInputError(
            f"Metrics need different names. Received: {names}. Give a dict of name to metric."
        )
    return dict(zip(names, metrics, strict=True))


def _resolve(value: Any) -> Metric:
    if isinstance(value, Metric):
        return value
    if isinstance(value, str):
        alias = value.lower().replace("_", "")
        if alias in _ALIASES:
            return _ALIASES[alias]()
        try:
            found = keras.metrics.get(value)
        except ValueError as error:
            raise _not_a_metric(value) from error
        return found if isinstance(found, Metric) else _mean_of(found, value)
    if isinstance(value, type) and issubclass(value, Metric):
        return value()
    if isinstance(value, keras.losses.Loss):
        # `call` gives one value per row; the loss itself their mean, which would weigh a partial
        # batch like a full one.
        return _mean_of(value.call, value.name)
    if callable(value) and not isinstance(value, type):
        return _mean_of(value, getattr(value, "__name__", type(value).__name__))
    raise _not_a_metric(value)


def _mean_of(function: Callable[..., Any], name: str) -> Metric:
    return keras.metrics.MeanMetricWrapper(function, name=name)


def _not_a_metric(value: Any) -> InvalidInputError:
    return InvalidInputError(
        "A metric is a Keras metric, a loss, a function (y_true, y_pred) -> [rows], or a name "
        f"such as 'accuracy', 'top5', 'auc', 'mae'. Received: {value!r}."
    )
