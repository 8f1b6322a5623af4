"""Models of Keras 3, as programs, evaluations and predictions need them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import keras
import tensorflow as tf
from keras.src.trainers.compile_utils import CompileLoss, CompileMetrics

from tfspark.data.spec import RowSpec
from tfspark.graph.fused import fused_batch_norm, replaced
from tfspark.graph.keras_view import (
    check_loss,
    check_masks,
    check_reduction,
    check_scalar,
    unpack,
)


class Keras3View:
    """A model of Keras 3; see `KerasView`.

    Args:
        model: Sequential, functional or subclassed.
        loss: used instead of the compiled one, in any form that `compile` takes.
        loss_weights: go with `loss`.
    """

    def __init__(self, model: keras.Model, loss: Any = None, loss_weights: Any = None):
        self.model = model
        self.keras = keras
        self._output_names = getattr(model, "output_names", None)
        self._loss = model._compile_loss
        if loss is not None:
            self._loss = CompileLoss(loss, loss_weights, output_names=self._output_names)

    @property
    def compiled(self) -> bool:
        return bool(self.model.compiled)

    def has_own_step(self) -> bool:
        return type(self.model).train_step is not keras.Model.train_step

    def build(self, spec: RowSpec) -> None:
        # A subclassed model may call itself built before its layers are.
        if all(layer.built for layer in self.model._flatten_layers()):
            return
        inputs = [
            keras.KerasTensor((None, *field.shape), dtype=field.dtype) for field in spec.fields
        ]
        x, _, _ = unpack(spec, inputs)
        self.call(x, training=False)

    def call(self, x: Any, training: bool) -> Any:
        if self.model._call_has_training_arg:
            return self.model(x, training=training)
        return self.model(x)

    def rewritten(self) -> AbstractContextManager[None]:
        return fused_batch_norm(self.model)

    # -- loss -----------------------------------------------------------------------------------

    def loss(
        self,
        rows: Any,
        share: Any,
        x: Any,
        y: Any,
        predictions: Any,
        sample_weight: Any,
        training: bool = True,
    ) -> Any:
        model, compiled = self.model, self._loss
        check_masks(model.name, predictions)
        custom = type(model).compute_loss is not keras.Model.compute_loss
        has_loss = compiled is not None or custom or bool(model.losses)
        check_loss(model.name, has_loss, compiled is not None and not custom, y)
        if compiled is not None and not compiled.built and y is not None:
            compiled.build(y, predictions)
        entries = compiled._flat_losses if compiled is not None and compiled.built else []
        for entry in entries:
            _check(entry.loss, sample_weight is not None)
        with ExitStack() as stack:
            stack.enter_context(replaced(model, "_compile_loss", compiled))
            if entries:
                scaled = [_scaled(entry, share) for entry in entries]
                stack.enter_context(replaced(compiled, "_flat_losses", scaled))
                factors = [share if _is_sum(entry.loss) else None for entry in entries]
                means = _by_rows(compiled._metrics, rows, factors)
                stack.enter_context(replaced(compiled, "_metrics", means))
            total = model._compute_loss(x, y, predictions, sample_weight, training=training)
        check_scalar(model.name, total)
        return total

    # -- metrics --------------------------------------------------------------------------------

    def update_metrics(
        self, loss: Any, rows: Any, x: Any, y: Any, predictions: Any, sample_weight: Any
    ) -> None:
        self.model._loss_tracker.update_state(loss, sample_weight=rows)
        self.model.compute_metrics(x, y, predictions, sample_weight=sample_weight)

    def metric_variables(self) -> list[Any]:
        return list(self.model.metrics_variables)

    def metric_names(self) -> list[str]:
        return [variable.path for variable in self.metric_variables()]

    def statistics(self) -> list[Any]:
        own = self._loss.variables if self._loss is not None else []
        return [*self.model.metrics_variables, *own]

    def reset_metrics(self) -> None:
        self.model.reset_metrics()

    def metric_results(self) -> dict[str, Any]:
        return dict(self.model.get_metrics_result())

    def metrics_of(self, metrics: Any, weighted_metrics: Any) -> Any:
        if metrics is None and weighted_metrics is None:
            return self.model._compile_metrics
        return CompileMetrics(metrics, weighted_metrics, output_names=self._output_names)

    def clear(self) -> None:
        self.model._clear_losses()


def _is_sum(loss: Any) -> bool:
    return getattr(loss, "reduction", None) == "sum"


def _check(loss: Any, weighted: bool) -> None:
    reduction = getattr(loss, "reduction", "mean")
    exact = reduction in ("sum", "mean", "sum_over_batch_size")
    by_weight = reduction == "mean_with_sample_weight" and not weighted
    check_reduction(getattr(loss, "name", repr(loss)), reduction, exact or by_weight)


def _scaled(entry: Any, share: Any) -> Any:
    if not _is_sum(entry.loss):
        return entry
    *path_and_loss, weight, name = entry
    share = tf.cast(share, entry.loss.dtype)
    return type(entry)(*path_and_loss, share if weight is None else share * weight, name)


def _by_rows(means: Sequence[Any], rows: Any, factors: Sequence[Any]) -> list[Any]:
    return [_ByRows(mean, rows, factor) for mean, factor in zip(means, factors, strict=False)]


class _ByRows:
    """Updates the mean that Keras keeps of an output's loss, weighted by rows.

    Keras weights it by the rows of a batch where their number is part of a graph, and not at all
    where it is not, as here.
    """

    def __init__(self, mean: Any, rows: Any, factor: Any):
        self._mean, self._rows, self._factor = mean, rows, factor

    def update_state(self, value: Any, sample_weight: Any = None) -> None:
        """With the loss of a batch."""
        if self._factor is not None:
            value = value * tf.cast(self._factor, value.dtype)
        self._mean.update_state(value, sample_weight=self._rows)
