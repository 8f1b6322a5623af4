"""Models of tf-keras, which is Keras 2, as programs, evaluations and predictions need them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import tensorflow as tf

from tfspark.data.spec import RowSpec
from tfspark.graph.assembly import batch_infos
from tfspark.graph.eager import name_of
from tfspark.graph.fused import replaced
from tfspark.graph.keras_view import (
    check_loss,
    check_masks,
    check_reduction,
    check_scalar,
    unpack,
)
from tfspark.graphdef.functions import trace_graph

PACKAGE = "tf_keras"


def is_keras_2(value: Any, kind: str) -> bool:
    """Whether a value is of a class of tf-keras, which is imported if there is such a value.

    Args:
        value: any.
        kind: the class by its path in the package, such as `"Model"`.
    """
    found: Any = sys.modules.get(PACKAGE)
    for name in kind.split("."):
        found = getattr(found, name, None)
    return found is not None and isinstance(value, found)


class Keras2View:
    """A model of tf-keras; see `KerasView`.

    Args:
        model: Sequential, functional or subclassed.
        loss: used instead of the compiled one, in any form that `compile` takes.
        loss_weights: go with `loss`.
    """

    def __init__(self, model: Any, loss: Any = None, loss_weights: Any = None):
        self.model = model
        self.keras = importlib.import_module(PACKAGE)
        self._containers = importlib.import_module(f"{PACKAGE}.src.engine.compile_utils")
        self._loss = model.compiled_loss if self.compiled else None
        if loss is not None:
            self._loss = self._containers.LossesContainer(
                loss, loss_weights, output_names=model.output_names
            )

    @property
    def compiled(self) -> bool:
        return bool(self.model._is_compiled)

    def has_own_step(self) -> bool:
        return type(self.model).train_step is not self.keras.Model.train_step

    def build(self, spec: RowSpec) -> None:
        model = self.model
        labelled = unpack(spec, spec.fields)[1] is not None
        parts = list(model._flatten_layers(include_self=False))
        if self.compiled:
            parts += [model.compiled_loss, *([model.compiled_metrics] if labelled else [])]
        if model.built and all(part.built for part in parts):
            return

        def create(*tensors: Any) -> list[Any]:
            x, y, _ = unpack(spec, tensors)
            predictions = self.call(x, training=False)
            if self.compiled:
                model.compiled_loss.build(predictions)
                if labelled:
                    model.compiled_metrics.build(predictions, y)
            return []

        # Keras makes variables outside of the graph in which they are first asked for.
        trace_graph(create, [tf.TensorSpec(i.shape, i.dtype) for i in batch_infos(spec)])
        self.clear()

    def call(self, x: Any, training: bool) -> Any:
        return self.model(x, training=training)

    def rewritten(self) -> AbstractContextManager[None]:
        return nullcontext()  # its BatchNormalization is fused as it is

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
        custom = type(model).compute_loss is not self.keras.Model.compute_loss
        compares = compiled is not None and compiled._user_losses is not None
        has_loss = compares or custom or bool(model.losses)
        check_loss(model.name, has_loss, compares and not custom, y)
        if compiled is None:
            compiled = self._containers.LossesContainer(None, output_names=model.output_names)
        if not compiled.built:
            compiled.build(predictions)
        for entry in compiled._losses:
            _check(entry)
        factors = [_share_of(entry, share) for entry in compiled._losses]
        scaled = {
            "_loss_weights": [
                _times(weight, factor)
                for weight, factor in zip(compiled._loss_weights, factors, strict=True)
            ],
            "_per_output_metrics": [
                None if metric is None else _Scaled(metric, factor)
                for metric, factor in zip(compiled._per_output_metrics, factors, strict=True)
            ],
            "_total_loss_mean": _ByRows(compiled._total_loss_mean, rows),
        }
        with ExitStack() as stack:
            stack.enter_context(replaced(model, "compiled_loss", compiled))
            for name, value in scaled.items():
                stack.enter_context(replaced(compiled, name, value))
            total = model.compute_loss(x, y, predictions, sample_weight)
        check_scalar(model.name, total)
        return total

    # -- metrics --------------------------------------------------------------------------------

    def update_metrics(
        self, loss: Any, rows: Any, x: Any, y: Any, predictions: Any, sample_weight: Any
    ) -> None:
        # `loss` is tracked where it is computed.
        self.model.compute_metrics(x, y, predictions, sample_weight)

    def metric_variables(self) -> list[Any]:
        return [variable for _, variable in _variables(self.model.metrics)]

    def metric_names(self) -> list[str]:
        return [name for name, _ in _variables(self.model.metrics)]

    def statistics(self) -> list[Any]:
        own = self._loss.metrics if self._loss is not None else []
        return [variable for _, variable in _variables([*self.model.metrics, *own])]

    def reset_metrics(self) -> None:
        self.model.reset_metrics()

    def metric_results(self) -> dict[str, Any]:
        return dict(self.model.get_metrics_result())

    def metrics_of(self, metrics: Any, weighted_metrics: Any) -> Any:
        if metrics is None and weighted_metrics is None:
            return _Metrics(self.model.compiled_metrics) if self.compiled else None
        return _Metrics(
            self._containers.MetricsContainer(
                metrics, weighted_metrics, output_names=self.model.output_names
            )
        )

    def clear(self) -> None:
        self.model._clear_losses()


class _Metrics:
    """The metrics of a model as if they were one."""

    name = "compile_metrics"

    def __init__(self, container: Any):
        self._container = container

    @property
    def metrics(self) -> list[Any]:
        """Each of them."""
        return list(self._container.metrics)

    @property
    def variables(self) -> list[Any]:
        """Those of all."""
        return [variable for _, variable in _variables(self.metrics)]

    def update_state(self, y: Any, predictions: Any, sample_weight: Any = None) -> None:
        """With a batch."""
        self._container.update_state(y, predictions, sample_weight)

    def reset_state(self) -> None:
        """Forgets all batches."""
        self._container.reset_state()

    def result(self) -> dict[str, Any]:
        """By the names of the metrics."""
        return {metric.name: metric.result() for metric in self.metrics}


class _Scaled:
    """Updates the mean of an output's loss, which is multiplied first if it is a sum."""

    def __init__(self, mean: Any, factor: Any):
        self._mean, self._factor = mean, factor

    def update_state(self, value: Any, sample_weight: Any = None) -> None:
        """With the loss of a batch."""
        self._mean.update_state(_times(value, self._factor), sample_weight=sample_weight)


class _ByRows:
    """Updates the mean of the total loss, weighted by rows.

    Keras 2 weights it by the rows of the labels, and where there are none, all batches alike.
    """

    def __init__(self, mean: Any, rows: Any):
        self._mean, self._rows = mean, rows

    def update_state(self, value: Any, sample_weight: Any = None) -> None:
        """With the loss of a batch."""
        self._mean.update_state(value, sample_weight=self._rows)


def _variables(metrics: Sequence[Any]) -> list[tuple[str, Any]]:
    """The variables of metrics, each once, with names that say of which metric they are."""
    found = {
        id(variable): (f"{metric.name}/{name_of(variable)}", variable)
        for metric in metrics
        for variable in metric.variables
    }
    return list(found.values())


def _check(loss: Any) -> None:
    if loss is not None:
        exact = loss.reduction in ("sum", "auto", "sum_over_batch_size")
        check_reduction(loss.name, loss.reduction, exact)


def _share_of(loss: Any, share: Any) -> Any:
    if loss is None or loss.reduction != "sum":
        return None
    return tf.cast(share, tf.float32)


def _times(value: Any, factor: Any) -> Any:
    if factor is None:
        return value
    return factor if value is None else value * factor
