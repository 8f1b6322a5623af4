"""Evaluations: metrics over a data set as pure graphs, and what they come to on the driver.

An evaluation is two pure graphs in one. The *forward* graph turns weights, model state and a batch
into what metrics look at; the *update* adds that to the accumulators, which are the variables of
Keras metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

from tfspark.data.spec import RowSpec
from tfspark.errors import ProgramError
from tfspark.graph import from_graph
from tfspark.graph.assembly import BoundProgram, batch_infos, split, step_signature
from tfspark.graph.from_keras import sums_for, view_of
from tfspark.graph.keras_metrics import reset, results_of
from tfspark.graph.keras_sums import batch_sums
from tfspark.graph.keras_view import KerasView, unpack
from tfspark.graph.program import Evaluation
from tfspark.graphdef.functions import trace_graph
from tfspark.graphdef.loader import load
from tfspark.graphdef.pure import PureGraph, TensorInfo
from tfspark.graphdef.variables import Purified, call, purify_function, tensorflow_variable

_SEED = np.zeros(2, np.int64)  # an evaluation draws the same numbers in every batch


@dataclass(frozen=True)
class Forward:
    """What a model makes of a batch, as a pure graph.

    Attributes:
        graph: inputs: the batch, rows, rows again, a seed, then variables.
        sources: what each variable is: ("weight", i), ("state", i) or ("constant", its value).
        batch: indices into the fields of the data set's row spec.
    """

    graph: PureGraph
    sources: tuple[tuple[str, Any], ...]
    batch: tuple[int, ...]

    @property
    def batch_infos(self) -> tuple[TensorInfo, ...]:
        """The inputs that are the batch."""
        return self.graph.inputs[: len(self.batch)]

    def __call__(
        self, bound: BoundProgram, flat: Any, states: Sequence[Any], batch: Sequence[Any]
    ) -> list[Any]:
        """Adds it to the graph that is being built; returns its outputs, without new states."""
        weights = split(flat, bound.program.weights)
        given = {"weight": weights, "state": states}
        variables = [
            tf.constant(which) if kind == "constant" else given[kind][which]
            for kind, which in self.sources
        ]
        rows = tf.shape(batch[0], out_type=tf.int64)[0] if batch else tf.constant(0, tf.int64)
        outputs = call(self.graph, [*batch, rows, rows, tf.constant(_SEED), *variables])
        return outputs[: len(outputs) - len(self.sources)]


def prediction(bound: BoundProgram, forward: Forward) -> PureGraph:
    """A forward graph with the inputs of a program.

    Inputs: flat, the model state, the batch. Outputs: those of the forward graph.
    """
    count = len(bound.program.state)

    def predict(flat: Any, *inputs: Any) -> list[Any]:
        return forward(bound, flat, inputs[:count], inputs[count:])

    graph = trace_graph(predict, _signature(bound, forward), ordered=False)
    return purify_function(graph).graph


def keras_forward(model: Any, bound: BoundProgram, row_spec: RowSpec) -> Forward:
    """The predictions of a Keras model with `training=False`, flat."""
    view = view_of(model)

    def predict(*inputs: Any) -> list[Any]:
        x, _, _ = unpack(row_spec, inputs[:-3])
        return tf.nest.flatten(view.call(x, training=False))

    return _keras_forward(predict, bound, row_spec)


def graph_forward(
    tensors: Sequence[Any],
    *,
    session: Any,
    bound: BoundProgram,
    inputs: Sequence[tuple[Any, int]],
    tensor_with_value: Mapping[Any, Any] | None = None,
) -> Forward:
    """Tensors of a TF1-style graph, with the evaluation values of `tensor_with_value`.

    Args: as of `program_from_loss`.
    """
    purified, variables, used = from_graph.purify_tensors(
        tensors, session, inputs, tensor_with_value
    )
    return _forward(purified, bound, used, lambda v: v.op.name, variables, session.run)


def function_forward(
    function: Callable[[Any], Any], bound: BoundProgram, row_spec: RowSpec
) -> Forward:
    """The flattened results of a function of a batch in the data set's structure."""

    def predict(*inputs: Any) -> list[Any]:
        return tf.nest.flatten(function(row_spec.unflatten(inputs[:-3])))

    return _keras_forward(predict, bound, row_spec)


def evaluation_from_keras(
    model: Any,
    bound: BoundProgram,
    row_spec: RowSpec,
    *,
    metrics: Any = None,
    weighted_metrics: Any = None,
    loss: Any = None,
    loss_weights: Any = None,
) -> tuple[Evaluation, list[Any]]:
    """The loss and the metrics of a Keras model.

    Args:
        model: as given to `program_from_keras`; runs with `training=False`.
        bound: what `program_from_keras` made of it.
        row_spec: of the rows to evaluate.
        metrics: in any form that `compile` takes; with `weighted_metrics`, instead of the
            compiled ones.
        weighted_metrics: like `metrics`, weighted by the sample weights.
        loss: instead of the compiled one.
        loss_weights: go with `loss`.

    Returns:
        The evaluation, and its metric objects for `results`. "loss" is the mean over rows.

    Raises:
        ProgramError: a metric whose accumulators cannot be added over ranks.
    """
    view = view_of(model, loss, loss_weights)
    compiled = view.metrics_of(metrics, weighted_metrics)
    structure: list[Any] = []

    def predict(*inputs: Any) -> list[Any]:
        x, y, sample_weight = unpack(row_spec, inputs[:-3])
        predictions = view.call(x, training=False)
        structure[:] = [predictions]
        rows = inputs[-3]
        share = 1 / tf.cast(rows, tf.float64)
        total = view.loss(rows, share, x, y, predictions, sample_weight, training=False)
        return [total, *tf.nest.flatten(predictions)]

    forward = _keras_forward(predict, bound, row_spec)
    view.clear()
    mean = keras.metrics.Mean(name="loss")

    def update(batch: Sequence[Any], loss_value: Any, *predictions: Any) -> None:
        mean.update_state(loss_value, sample_weight=tf.shape(batch[0])[0])
        if compiled is not None:
            _, y, sample_weight = unpack(row_spec, batch)
            packed = tf.nest.pack_sequence_as(structure[0], predictions)
            compiled.update_state(y, packed, sample_weight)

    return _evaluation(bound, forward, [mean] + ([compiled] if compiled else []), update)


class _ModelMetrics:
    """All metrics of a compiled model, as if they were one, whose variables are sums."""

    name = "model"

    def __init__(self, view: KerasView):
        self._view = view
        self.variables = sums_for(view)

    def result(self) -> dict[str, Any]:
        """By their names, in the order of Keras's own logs."""
        return results_of(self._view, [variable.numpy() for variable in self.variables])


def evaluation_of_compiled(
    model: Any, bound: BoundProgram, row_spec: RowSpec
) -> tuple[Evaluation, list[Any]]:
    """What `model.evaluate` measures, under the names that it has there.

    Args:
        model: compiled, as given to `program_from_keras`.
        bound: what `program_from_keras` made of it.
        row_spec: of the rows to evaluate.

    Returns:
        The evaluation, and its metric objects for `results`.
    """
    view = view_of(model)
    reset(view)
    forward = _keras_forward(partial(batch_sums, view, row_spec), bound, row_spec)
    view.clear()
    metrics = _ModelMetrics(view)
    accumulators = tuple(
        TensorInfo(variable.name, "float64", tuple(variable.shape))
        for variable in metrics.variables
    )
    initial = tuple(np.zeros(tuple(variable.shape)) for variable in metrics.variables)
    count, rest = len(bound.program.state), len(bound.program.state) + len(forward.batch_infos)

    def evaluate(flat: Any, *inputs: Any) -> list[Any]:
        sums = forward(bound, flat, inputs[:count], inputs[count:rest])
        return [old + new for old, new in zip(inputs[rest:], sums, strict=True)]

    signature = [
        *_signature(bound, forward),
        *(tf.TensorSpec(info.shape, info.dtype) for info in accumulators),
    ]
    graph = purify_function(trace_graph(evaluate, signature, ordered=False)).graph
    names = ((metrics.name, len(accumulators)),)
    return Evaluation(forward.batch, accumulators, initial, graph, names), [metrics]


def evaluation_from_graph(
    *,
    session: Any,
    bound: BoundProgram,
    inputs: Sequence[tuple[Any, int]],
    loss: Any = None,
    outputs: Sequence[Any] = (),
    labels: Sequence[Any] = (),
    metrics: Mapping[str, Any] | None = None,
    tensor_with_value: Mapping[Any, Any] | None = None,
) -> tuple[Evaluation, list[Any]]:
    """The loss and the metrics of a TF1-style graph.

    Args:
        session: as of `program_from_loss`.
        bound: what `program_from_loss` made.
        inputs: as of `program_from_loss`.
        loss: its mean over rows is evaluated as "loss"; None: no loss.
        outputs: predictions that metrics see: tensors of the graph, `[rows, …]`. Metrics see one
            tensor as it is, several as a list.
        labels: what metrics compare them with.
        metrics: by name, a Keras metric of (labels, outputs), or a tensor of the graph, a scalar
            mean over rows or `[rows]`, of which the mean over rows is taken.
        tensor_with_value: as of `program_from_loss`.

    Returns:
        The evaluation, and its metric objects for `results`.

    Raises:
        ProgramError: a metric whose accumulators cannot be added over ranks.
    """
    tensors: dict[str, Any] = {} if loss is None else {"loss": loss}
    tensors |= {name: m for name, m in (metrics or {}).items() if tf.is_tensor(m)}
    objects = {name: m for name, m in (metrics or {}).items() if not tf.is_tensor(m)}
    forward = graph_forward(
        [*tensors.values(), *labels, *outputs],
        session=session,
        bound=bound,
        inputs=inputs,
        tensor_with_value=tensor_with_value,
    )
    counts = (len(tensors), len(tensors) + len(labels))

    def looked_at(values: Sequence[Any]) -> tuple[Any, Any, Sequence[Any]]:
        return _one(values[counts[0] : counts[1]]), _one(values[counts[1] :]), values[: counts[0]]

    return _named_evaluation(bound, forward, list(tensors), objects, looked_at)


def evaluation_from_function(
    loss_fn: Callable[[Any], Any],
    bound: BoundProgram,
    row_spec: RowSpec,
    *,
    predict_fn: Callable[[Any], tuple[Any, Any]] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> tuple[Evaluation, list[Any]]:
    """The loss and the metrics of a function.

    Args:
        loss_fn: as of `program_from_function`, a mean over rows.
        bound: what `program_from_function` made.
        row_spec: of the rows to evaluate.
        predict_fn: from a batch to (labels, predictions), for metrics.
        metrics: Keras metrics of (labels, predictions), by name; they need `predict_fn`.

    Returns:
        The evaluation, and its metric objects for `results`.

    Raises:
        ProgramError: a metric whose accumulators cannot be added over ranks.
    """
    structure: list[Any] = []

    def both(batch: Any) -> list[Any]:
        compared = predict_fn(batch) if predict_fn is not None else ()
        structure[:] = [compared]
        return [loss_fn(batch), *tf.nest.flatten(compared)]

    forward = function_forward(both, bound, row_spec)

    def looked_at(values: Sequence[Any]) -> tuple[Any, Any, Sequence[Any]]:
        compared = tf.nest.pack_sequence_as(structure[0], values[1:])
        return (*(compared or (None, None)), values[:1])

    return _named_evaluation(bound, forward, ["loss"], metrics or {}, looked_at)


def results(
    evaluation: Evaluation, metrics: Sequence[Any], accumulators: Sequence[np.ndarray]
) -> dict[str, float]:
    """What accumulators come to, by metric name, in order.

    Args:
        evaluation: from one of the builders here.
        metrics: the metric objects that the builder returned with it.
        accumulators: merged over all ranks.
    """
    scores: dict[str, float] = {}
    start = 0
    with context.eager_mode():
        for (name, count), metric in zip(evaluation.metrics, metrics, strict=True):
            before = [variable.numpy() for variable in metric.variables]
            values = accumulators[start : start + count]
            start += count
            for variable, value in zip(metric.variables, values, strict=True):
                variable.assign(value)
            result = metric.result()
            named = result if isinstance(result, dict) else {name: result}
            for key, value in named.items():
                array = np.asarray(value)
                if array.ndim == 0:
                    scores[key] = float(array)
                else:
                    scores |= {f"{key}_{i}": float(x) for i, x in enumerate(array.reshape(-1))}
            for variable, value in zip(metric.variables, before, strict=True):
                variable.assign(value)
    return scores


def _named_evaluation(
    bound: BoundProgram,
    forward: Forward,
    means: Sequence[str],
    objects: Mapping[str, Any],
    looked_at: Callable[[Sequence[Any]], tuple[Any, Any, Sequence[Any]]],
) -> tuple[Evaluation, list[Any]]:
    """Means of tensors, then metrics of labels and outputs."""
    with context.eager_mode():
        trackers = [keras.metrics.Mean(name=name) for name in means]
        metrics = [_eager(metric) for metric in objects.values()]

    def update(batch: Sequence[Any], *values: Any) -> None:
        labels, outputs, averaged = looked_at(values)
        for tracker, value in zip(trackers, averaged, strict=True):
            weight = tf.shape(batch[0])[0] if value.shape.rank == 0 else None
            tracker.update_state(value, sample_weight=weight)
        for metric in metrics:
            metric.update_state(labels, outputs)

    return _evaluation(bound, forward, [*trackers, *metrics], update, [*means, *objects])


def _evaluation(
    bound: BoundProgram,
    forward: Forward,
    metrics: list[Any],
    update: Callable[..., None],
    names: Sequence[str] | None = None,
) -> tuple[Evaluation, list[Any]]:
    """Joins a forward graph and an update of metrics."""
    infos = forward.batch_infos
    shown = forward.graph.outputs[: len(forward.graph.outputs) - len(forward.sources)]

    def updated(*inputs: Any) -> list[Any]:
        update(inputs[: len(infos)], *inputs[len(infos) :])
        return []

    specs = [tf.TensorSpec(info.shape, info.dtype) for info in (*infos, *shown)]
    with context.eager_mode():
        traced = trace_graph(updated, specs)
        variables = [variable for metric in metrics for variable in metric.variables]
        adding = purify_function(traced, variables)
        if len(adding.variables) > len(variables):
            odd = adding.variables[len(variables) :]
            raise ProgramError(
                "A metric keeps its state in its own variables. "
                f"Received: a metric that uses {', '.join(v.name for v in odd)} besides. Create "
                "them with add_weight or add_variable."
            )
        initial = _initial(metrics)
    count = len(bound.program.state)
    rest = count + len(infos)

    def evaluate(flat: Any, *inputs: Any) -> list[Any]:
        batch = inputs[count:rest]
        values = forward(bound, flat, inputs[:count], batch)
        return call(adding.graph, [*batch, *values, *inputs[rest:]])

    accumulators = tuple(
        TensorInfo(variable.name, value.dtype.name, value.shape)
        for variable, value in zip(variables, initial, strict=True)
    )
    signature = [
        *_signature(bound, forward),
        *(tf.TensorSpec(info.shape, info.dtype) for info in accumulators),
    ]
    graph = trace_graph(evaluate, signature, ordered=False)
    names = names or [metric.name for metric in metrics]
    evaluation = Evaluation(
        batch=forward.batch,
        accumulators=accumulators,
        initial=tuple(initial),
        graph=purify_function(graph).graph,
        metrics=tuple(
            (name, len(metric.variables)) for name, metric in zip(names, metrics, strict=True)
        ),
    )
    _check_mergeable(bound, forward, adding.graph, initial, metrics)
    return evaluation, metrics


def _check_mergeable(
    bound: BoundProgram,
    forward: Forward,
    adding: PureGraph,
    initial: Sequence[np.ndarray],
    metrics: Sequence[Any],
) -> None:
    """Compares the accumulators of random rows with the sum of those of two halves.

    Predictions are made once: a graph may well have its dropout or BatchNorm switched on.
    """
    rng = np.random.default_rng(0)
    rows = 8

    def column(info: TensorInfo) -> np.ndarray:
        shape = [rows, *(2 if size is None else size for size in (info.shape or ())[1:])]
        if info.dtype == "string":
            return np.full(shape, b"0", object)
        numbers = rng.integers(0, 2, shape)
        dtype = tf.as_dtype(info.dtype)
        return (rng.uniform(size=shape) if dtype.is_floating else numbers).astype(
            dtype.as_numpy_dtype
        )

    batch = [column(info) for info in forward.batch_infos]
    predict, add = load(prediction(bound, forward)), load(adding)

    def added(low: int, high: int) -> list[np.ndarray]:
        parts = [x[low:high] if x.shape[:1] == (rows,) else x for x in columns]
        return [v.numpy() - i for v, i in zip(add(*parts, *initial), initial, strict=True)]

    try:
        columns = [*batch, *(v.numpy() for v in predict(bound.flat, *bound.state, *batch))]
        whole, first, second = added(0, rows), added(0, 3), added(3, rows)
    except tf.errors.InvalidArgumentError:
        return  # made-up rows that this model cannot read, such as encoded images
    owners = [(metric.name, v) for metric in _leaves(metrics) for v in metric.variables]
    by_variable = {id(v): name for name, v in owners}
    variables = [variable for metric in metrics for variable in metric.variables]
    for variable, w, a, b in zip(variables, whole, first, second, strict=True):
        if not np.allclose(w, a + b, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise ProgramError(
                "A metric's accumulators must be sums over rows, to be added over ranks. "
                f"Received: metric {by_variable[id(variable)]!r}, whose {variable.name!r} is "
                "not. Use a metric that sums in update_state and divides in result."
            )


def _leaves(metrics: Sequence[Any]) -> list[Any]:
    """The metrics, and instead of those that a model was compiled with, each of them."""
    return [leaf for metric in metrics for leaf in getattr(metric, "metrics", [metric])]


def _initial(metrics: Sequence[Any]) -> list[np.ndarray]:
    """The variables after `reset_state`; they keep the values they have."""
    initial = []
    for metric in metrics:
        before = [variable.numpy() for variable in metric.variables]
        metric.reset_state()
        initial += [np.array(variable.numpy()) for variable in metric.variables]
        for variable, value in zip(metric.variables, before, strict=True):
            variable.assign(value)
    return initial


def _eager(metric: Any) -> Any:
    """The metric, or an equal one with eager variables if it was made in a graph."""
    if all(isinstance(v.value.handle, tf.__internal__.EagerTensor) for v in metric.variables):
        return metric
    return type(metric).from_config(metric.get_config())


def _one(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else list(values)


def _signature(bound: BoundProgram, forward: Forward) -> list[tf.TensorSpec]:
    program = bound.program
    return [
        tf.TensorSpec([program.size], program.dtype),
        *(tf.TensorSpec(slot.shape, slot.dtype) for slot in program.state),
        *(tf.TensorSpec(info.shape, info.dtype) for info in forward.batch_infos),
    ]


def _keras_forward(
    function: Callable[..., list[Any]], bound: BoundProgram, row_spec: RowSpec
) -> Forward:
    infos = batch_infos(row_spec)
    purified = purify_function(trace_graph(function, step_signature(infos)), seeded=True)
    return _forward(
        purified,
        bound,
        tuple(range(len(infos))),
        lambda v: id(tensorflow_variable(v).handle),
        purified.variables,
        lambda variables: [variable.numpy() for variable in variables],
    )


def _forward(
    purified: Purified,
    bound: BoundProgram,
    batch: Sequence[int],
    key: Callable[[Any], Any],
    variables: Sequence[Any],
    read: Callable[[Sequence[Any]], Sequence[Any]],
) -> Forward:
    known: dict[Any, tuple[str, Any]] = {}
    known |= {key(v): ("weight", i) for i, v in enumerate(bound.weight_variables)}
    known |= {key(v): ("state", i) for i, v in enumerate(bound.state_variables)}
    # What training does not use, it does not change either.
    others = [variable for variable in variables if key(variable) not in known]
    values = read(others) if others else []
    known |= {key(v): ("constant", value) for v, value in zip(others, values, strict=True)}
    return Forward(purified.graph, tuple(known[key(v)] for v in variables), tuple(batch))
