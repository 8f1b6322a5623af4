"""What a `TFOptimizer` trains: a graph, a Keras model or a function, behind one interface."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from tfspark.data.dataset import TFDataset, dataset_of
from tfspark.errors import InvalidInputError, ProgramError
from tfspark.graph.assembly import BoundProgram
from tfspark.graph.eager import name_of
from tfspark.graph.evaluation import (
    evaluation_from_function,
    evaluation_from_graph,
    evaluation_from_keras,
    evaluation_of_compiled,
)
from tfspark.graph.from_function import program_from_function
from tfspark.graph.from_graph import name_of as graph_name_of
from tfspark.graph.from_graph import program_from_loss
from tfspark.graph.from_keras import check_model, program_from_keras, view_of
from tfspark.graph.from_train_op import program_from_train_op
from tfspark.graph.metrics import metrics_from
from tfspark.graph.program import Evaluation
from tfspark.graphdef.nodes import ancestors

Metrics = Sequence[Any]
"""The metric objects of an evaluation, which turn accumulators into results."""


class FrontEnd(Protocol):
    """The user's model, as `TFOptimizer` needs it."""

    def trainable(self) -> tuple[list[str], list[Any]]:
        """Names and variables of the trainable weights."""

    def program(self, group_of: Callable[[str], int]) -> BoundProgram:
        """The program, its weights sorted by parameter group; called once."""

    def evaluation(self) -> tuple[Evaluation, Metrics] | None:
        """What a validation measures; None: nothing. Called after `program`."""


class KerasFrontEnd:
    """A model of Keras 3 or tf-keras.

    Args:
        model: it is built, if it is not.
        dataset: rows `(x, y)` or `(x, y, sample_weight)`.
        loss, loss_weights, metrics: instead of the compiled ones.
        tracks_metrics: sum up the compiled metrics while training; see `metric_sums`.
    """

    def __init__(
        self,
        model: Any,
        dataset: TFDataset,
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        tracks_metrics: bool = False,
    ):
        check_dataset(dataset)
        self._tracks_metrics = tracks_metrics
        check_model(model)
        self._model = model
        self._spec = dataset.row_spec
        self._validation_spec = (dataset.validation or dataset).row_spec
        self._loss, self._loss_weights, self._metrics = loss, loss_weights, metrics
        view_of(model).build(self._spec)
        constrained = [name_of(v) for v in model.trainable_variables if v.constraint is not None]
        if constrained:
            raise ProgramError(
                "A weight's constraint needs the whole tensor after every step, a rank holds a "
                f"slice. Received: constraints on {', '.join(constrained)}. Use a regularizer, or "
                "reparametrise the layer."
            )

    def compiled_optimizer(self) -> Any:
        """The optimizer that the model was compiled with."""
        optimizer = getattr(self._model, "optimizer", None)
        if optimizer is None:
            raise InvalidInputError(
                "Training needs an optimizer. Received: a model that is not compiled, and no "
                "optimizer. Call model.compile(optimizer=…), or pass optimizer=…."
            )
        return optimizer

    def trainable(self) -> tuple[list[str], list[Any]]:
        variables = list(self._model.trainable_variables)
        return [name_of(variable) for variable in variables], variables

    def program(self, group_of: Callable[[str], int]) -> BoundProgram:
        self._bound = program_from_keras(
            self._model,
            self._spec,
            loss=self._loss,
            loss_weights=self._loss_weights,
            group_of=group_of,
            tracks_metrics=self._tracks_metrics,
        )
        return self._bound

    def fingerprint(self) -> bytes:
        """Of the weights and the model state that are in the model's variables, but for seeds."""
        flat, state = self._bound.values()
        digest = hashlib.blake2b(flat.tobytes(), digest_size=16)
        for slot, value in zip(self._bound.program.state, state, strict=True):
            if slot.kind in ("mean", "constant"):
                digest.update(np.ascontiguousarray(value).tobytes())
        return digest.digest()

    def metric_sums(self) -> list[Any]:
        """What all steps so far have added to each variable of the model's metrics."""
        slots = zip(self._bound.program.state, self._bound.state_variables, strict=True)
        found = sorted((slot.name, variable) for slot, variable in slots if slot.kind == "sum")
        return [variable.numpy() for _, variable in found]

    def evaluation(self) -> tuple[Evaluation, Metrics]:
        if self._tracks_metrics:
            return evaluation_of_compiled(self._model, self._bound, self._validation_spec)
        return evaluation_from_keras(
            self._model,
            self._bound,
            self._validation_spec,
            metrics=self._metrics,
            loss=self._loss,
            loss_weights=self._loss_weights,
        )


class FunctionFrontEnd:
    """A function from a batch to a loss.

    Args:
        loss_fn: see `program_from_function`.
        variables: to train.
        dataset: whose batches it gets.
        reduction: "mean" or "sum" over rows.
        predict_fn, metrics: see `evaluation_from_function`.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any], Any],
        variables: Sequence[Any],
        dataset: TFDataset,
        reduction: str,
        predict_fn: Callable[[Any], Any] | None,
        metrics: Any,
    ):
        check_dataset(dataset)
        self._loss_fn = loss_fn
        self._variables = list(variables)
        self._spec = dataset.row_spec
        self._reduction = reduction
        self._predict_fn = predict_fn
        self._metrics = metrics_from(metrics)
        if self._metrics and predict_fn is None:
            raise ProgramError(
                "Metrics of a function need labels and predictions. "
                f"Received: {', '.join(self._metrics)} without predict_fn. Pass "
                "predict_fn=lambda batch: (labels, predictions)."
            )

    def trainable(self) -> tuple[list[str], list[Any]]:
        return [name_of(variable) for variable in self._variables], self._variables

    def program(self, group_of: Callable[[str], int]) -> BoundProgram:
        self._bound = program_from_function(
            self._loss_fn,
            self._variables,
            self._spec,
            group_of=group_of,
            reduction=self._reduction,
        )
        return self._bound

    def evaluation(self) -> tuple[Evaluation, Metrics]:
        return evaluation_from_function(
            self._loss_fn,
            self._bound,
            self._spec,
            predict_fn=self._predict_fn,
            metrics=self._metrics,
        )


class GraphFrontEnd:
    """A TF1-style graph that ends in a scalar loss.

    Args:
        loss: the tensor.
        session: of its graph; None: a new one, with `session_config`.
        session_config: see `session`.
        dataset: None: found by the placeholders that the loss depends on.
        inputs: placeholders of the user's own for the fields of the data set, in its structure;
            None: `dataset.tensors`.
        updates: operations to run in every step, besides UPDATE_OPS.
        tensor_with_value: placeholder to (training value, evaluation value).
        val_outputs, val_labels: tensors that metrics compare.
        metrics: Keras metrics of them, or tensors of the graph, by name.
        reduction: "mean" or "sum" over rows.
        train_op: applies the gradients; None: they are those of the loss.
    """

    def __init__(
        self,
        loss: Any,
        *,
        session: Any,
        session_config: Any,
        dataset: TFDataset | None,
        inputs: Any,
        updates: Sequence[Any] | None,
        tensor_with_value: Mapping[Any, Any] | None,
        val_outputs: Any,
        val_labels: Any,
        metrics: Mapping[str, Any],
        reduction: str,
        train_op: Any = None,
    ):
        self._loss = loss
        self._updates = updates
        self._values = tensor_with_value
        self._outputs, self._labels = _as_list(val_outputs), _as_list(val_labels)
        self._metrics = metrics
        self._reduction = reduction
        graph = _graph_of(loss)
        self.dataset = dataset if dataset is not None else _dataset_behind(loss)
        check_dataset(self.dataset)
        with graph.as_default():
            tensors = inputs if inputs is not None else self.dataset.tensors
            self.session = session or tf.compat.v1.Session(graph=graph, config=session_config)
        self._inputs = _fed(self.dataset, tensors)
        self._applied: tuple[BoundProgram, Any] | None = None
        if train_op is not None:
            self._applied = program_from_train_op(
                train_op,
                loss,
                session=self.session,
                inputs=self._inputs,
                updates=updates,
                tensor_with_value=tensor_with_value,
                reduction=reduction,
            )

    def rule(self) -> Any:
        """The optimizer of the training operation."""
        assert self._applied is not None
        return self._applied[1]

    def trainable(self) -> tuple[list[str], list[Any]]:
        if self._applied is not None:
            variables = self._applied[0].weight_variables
            return [graph_name_of(variable) for variable in variables], list(variables)
        variables = self._loss.graph.get_collection(tf.compat.v1.GraphKeys.TRAINABLE_VARIABLES)
        return [graph_name_of(variable) for variable in variables], list(variables)

    def program(self, group_of: Callable[[str], int]) -> BoundProgram:
        if self._applied is not None:
            self._bound, _ = self._applied  # it has one rule, so all weights are one group
            return self._bound
        self._bound = program_from_loss(
            self._loss,
            session=self.session,
            inputs=self._inputs,
            group_of=group_of,
            updates=self._updates,
            tensor_with_value=self._values,
            reduction=self._reduction,
        )
        return self._bound

    def evaluation(self) -> tuple[Evaluation, Metrics]:
        return evaluation_from_graph(
            session=self.session,
            bound=self._bound,
            inputs=self._inputs,
            loss=self._loss,
            outputs=self._outputs,
            labels=self._labels,
            metrics=self._metrics,
            tensor_with_value=self._values,
        )


def check_dataset(dataset: Any) -> None:
    """Refuses what is not a `TFDataset`.

    Raises:
        InvalidInputError: names the type and the remedy.
    """
    if not isinstance(dataset, TFDataset):
        raise InvalidInputError(
            f"The data set must be a TFDataset. Received: {type(dataset).__name__}. "
            "Make one with TFDataset.from_rdd, from_dataframe or from_ndarrays."
        )


def graph_metrics(metrics: Any, val_method: Any) -> dict[str, Any]:
    """`metrics` and `val_method` of `from_loss` by name: Keras metrics, or tensors as they are."""
    named: dict[str, Any] = {}
    if isinstance(metrics, Mapping):
        named.update({name: m for name, m in metrics.items() if tf.is_tensor(m)})
        metrics = {name: m for name, m in metrics.items() if not tf.is_tensor(m)}
    for given in (val_method, metrics):
        for name, metric in metrics_from(given).items():
            if name in named:
                raise InvalidInputError(
                    f"Metrics need different names. Received: {name!r} twice. "
                    "Give a dict of name to metric."
                )
            named[name] = metric
    return named


def _graph_of(loss: Any) -> Any:
    if not tf.is_tensor(loss) or not tf.is_symbolic_tensor(loss):
        raise ProgramError(
            "A loss is a tensor of a graph. "
            f"Received: {loss!r}. Build it under tf.Graph().as_default(), or call "
            "tf.compat.v1.disable_eager_execution() first; a Keras model goes to from_keras, a "
            "function to from_function."
        )
    return loss.graph


def _dataset_behind(loss: Any) -> TFDataset:
    """The data set whose placeholders the loss depends on."""
    found = [
        dataset_of(op.outputs[0])
        for op in ancestors([loss.op]).values()
        if op.type == "Placeholder"
    ]
    datasets = list({id(entry[0]): entry[0] for entry in found if entry is not None}.values())
    if len(datasets) != 1:
        raise ProgramError(
            "The loss must depend on the tensors of one data set. "
            f"Received: {loss.name!r}, which depends on those of {len(datasets)}. Build it from "
            "dataset.tensors, or pass dataset= and inputs=."
        )
    return datasets[0]


def _fed(dataset: TFDataset, tensors: Any) -> list[tuple[Any, int]]:
    """Which placeholder is fed with which field of the data set."""
    spec = dataset.row_spec
    try:
        flat = spec.flatten(tensors)
    except ValueError as error:
        raise InvalidInputError(
            "inputs have the structure of the data set's rows. "
            f"Received: {tensors!r} for rows of {', '.join(spec.names)} ({error})."
        ) from error
    return [(tensor, index) for index, tensor in enumerate(flat)]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
