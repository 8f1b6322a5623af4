"""Predictions: what a model makes of a batch as a pure graph, with the weights beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import optree
import tensorflow as tf

from tfspark.data.mapping import DATASET_OPS, RowMapping
from tfspark.data.spec import Field, RowSpec
from tfspark.errors import ProgramError
from tfspark.graph import from_graph
from tfspark.graph.from_keras import view_of
from tfspark.graph.program import Prediction
from tfspark.graphdef.functions import trace_graph
from tfspark.graphdef.pure import PureGraph
from tfspark.graphdef.variables import call, purify_function


def prediction_from_keras(model: Any, inputs: RowSpec | None = None) -> Prediction:
    """The predictions of a Keras model, `model(x, training=False)`.

    Args:
        model: of Keras 3 or tf-keras; it is built if it is not.
        inputs: of the rows that it will see; None: as the model's own inputs are declared.

    Raises:
        ProgramError: it is no Keras model, or of a subclass that does not declare its inputs, and
            `inputs` is None; a shape of its outputs is unknown.

    Example:
        >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
        >>> prediction = prediction_from_keras(model)
        >>> prediction.inputs.fields[0].shape, prediction.outputs.fields[0].shape
        ((3,), (1,))
    """
    view = view_of(model)
    spec = declared_inputs(model) if inputs is None else inputs
    if spec is None:
        raise ProgramError(
            "A model that does not declare its inputs is used on rows of a known kind. "
            f"Received: {type(model).__name__} {model.name!r}, which has no Input. Say what it "
            "takes: inputs=(dtype, shape), or a list or dict of these, without the rows."
        )
    view.build(spec)
    names = getattr(model, "output_names", None)

    def predict(*tensors: Any) -> Any:
        return view.call(spec.unflatten(tensors), training=False)

    return _traced(predict, spec, names)


def prediction_from_function(
    function: Callable[[Any], Any], inputs: RowSpec, names: Sequence[str] | None = None
) -> Prediction:
    """The results of a function of a batch.

    Args:
        function: called with tensors `[rows, *shape]` in the structure of `inputs`; returns a
            structure of tensors `[rows, …]`. It may be a `tf.function` and read variables.
        inputs: of a row.
        names: of its results in flat order; None: after their place in the structure.

    Raises:
        ProgramError: a result has no known number of dimensions, or none at all.
    """
    return _traced(lambda *tensors: function(inputs.unflatten(tensors)), inputs, names)


def prediction_from_graph(
    outputs: Any,
    *,
    session: Any,
    inputs: Any,
    tensor_with_value: Mapping[Any, Any] | None = None,
) -> Prediction:
    """Tensors of a TF1-style graph.

    Args:
        outputs: a structure of tensors of the session's graph, `[rows, …]`.
        session: that holds the variables.
        inputs: a structure of placeholders, or of other tensors that take their place,
            `[rows, …]`.
        tensor_with_value: a dict of placeholder to (value in training, value in evaluation).

    Raises:
        ProgramError: the outputs depend on placeholders besides `inputs`.
    """
    fed = optree.tree_leaves(inputs)
    spec = RowSpec.of(optree.tree_map(_field_of, inputs))
    purified, variables, batch = from_graph.purify_tensors(
        optree.tree_leaves(outputs),
        session,
        [(tensor, index) for index, tensor in enumerate(fed)],
        tensor_with_value,
    )
    weights = tuple(session.run(variables)) if variables else ()

    def predict(*tensors: Any) -> list[Any]:
        *row, seed = tensors[: len(fed) + 1]
        rows = tf.shape(row[0], out_type=tf.int64)[0]
        used = [row[index] for index in batch]
        results = call(purified.graph, [*used, rows, rows, seed, *tensors[len(fed) + 1 :]])
        return results[: len(results) - len(variables)]

    values = [tf.TensorSpec(weight.shape, weight.dtype) for weight in weights]
    traced = trace_graph(predict, [*_signature(spec), *values], ordered=False)
    graph = purify_function(traced).graph
    return Prediction(graph, weights, spec, _output_spec(outputs, graph, None))


def prediction_from_saved_model(
    path: str,
    tag: str | None = None,
    signature: str | None = None,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
) -> Prediction:
    """A signature of a SavedModel, of TensorFlow 1 or 2.

    Args:
        path: of its folder.
        tag: of the graph; None: the only one.
        signature: None: "serving_default".
        inputs, outputs: names of the signature's tensors; None: all, sorted by name. One tensor
            stands alone, several are a dict.

    Raises:
        ProgramError: there is no such signature or tensor; names those there are.
    """
    loaded = tf.saved_model.load(path, tags=None if tag is None else [tag])
    name = signature or "serving_default"
    if name not in loaded.signatures:
        raise ProgramError(
            "A signature of a SavedModel is used. "
            f"Received: {name!r}; {path!r} has {', '.join(loaded.signatures) or 'none'}."
        )
    function = loaded.signatures[name]
    declared = function.structured_input_signature[1]
    taken = _chosen(inputs, declared, "input")
    given = _chosen(outputs, function.structured_outputs, "output")
    fields = {key: _field_of(declared[key], key) for key in taken}
    spec = RowSpec.of(fields if len(taken) > 1 else fields[taken[0]])

    def predict(row: Any) -> Any:
        results = function(**(row if len(taken) > 1 else {taken[0]: row}))
        return {key: results[key] for key in given} if len(given) > 1 else results[given[0]]

    return _traced(lambda *tensors: predict(spec.unflatten(tensors)), spec, given)


def _chosen(names: Sequence[str] | None, there: Mapping[str, Any], what: str) -> list[str]:
    chosen = sorted(there) if names is None else list(names)
    unknown = [name for name in chosen if name not in there]
    if unknown or not chosen:
        raise ProgramError(
            f"An {what} of a signature is named. "
            f"Received: {', '.join(unknown) or 'none'}; there are {', '.join(sorted(there))}."
        )
    return chosen


def _traced(
    function: Callable[..., Any], inputs: RowSpec, names: Sequence[str] | None
) -> Prediction:
    structure: list[Any] = []

    def flat(*tensors: Any) -> list[Any]:
        results = function(*tensors[:-1])
        structure[:] = [results]
        return [tf.convert_to_tensor(tensor) for tensor in optree.tree_leaves(results)]

    purified = purify_function(trace_graph(flat, _signature(inputs)), seeded=True)
    # What is left are the new values of variables: a prediction changes none.
    count = len(purified.graph.outputs) - len(purified.variables)
    graph = replace(purified.graph, outputs=purified.graph.outputs[:count])
    weights = tuple(variable.numpy() for variable in purified.variables)
    return Prediction(graph, weights, inputs, _output_spec(structure[0], graph, names))


def _signature(inputs: RowSpec) -> list[tf.TensorSpec]:
    batch = [tf.TensorSpec([None, *field.shape], field.dtype) for field in inputs.fields]
    return [*batch, tf.TensorSpec([2], tf.int64)]


def declared_inputs(model: Any) -> RowSpec | None:
    """Of a row, as a functional or Sequential model declares its inputs; None: it does not."""
    if isinstance(model, keras.Sequential):
        # `input` only after a first call, and `inputs` only with a layer after the Input.
        inputs = getattr(model, "inputs", None)
        declared = inputs[0] if inputs else None
    else:
        declared = getattr(model, "input", None)
    return None if declared is None else RowSpec.of(optree.tree_map(_field_of, declared))


def _field_of(tensor: Any, name: str | None = None) -> Field:
    shape = tensor.shape
    if getattr(shape, "rank", len(shape) if isinstance(shape, tuple) else None) in (None, 0):
        raise ProgramError(
            "An input of a model is a batch: its first dimension are rows, and the number of its "
            f"dimensions is known. Received: {tensor.name!r} of shape {shape}."
        )
    clean = re.sub(r"[^A-Za-z0-9_.]", "_", (name or tensor.name).split(":")[0])
    return Field(clean, tf.as_dtype(tensor.dtype).name, tuple(shape)[1:])


def _output_spec(structure: Any, graph: PureGraph, names: Sequence[str] | None) -> RowSpec:
    """Of what is returned for a row; names are those given, or places in the structure."""
    paths = optree.tree_paths(structure)
    fields = []
    for index, (info, path) in enumerate(zip(graph.outputs, paths, strict=True)):
        named = any(isinstance(key, str) for key in path)
        if names is not None and len(names) == len(paths) and not named:
            name = names[index]
        else:
            name = "_".join(map(str, path)) or "prediction"
        if not info.shape:
            raise ProgramError(
                "A prediction has rows, and a known number of dimensions. "
                f"Received: {name!r} of {'an unknown shape' if info.shape is None else 'shape []'}."
                " Set it with tf.ensure_shape, or leave this output out."
            )
        fields.append(Field(name, info.dtype, info.shape[1:]))
    return RowSpec.of(optree.tree_unflatten(optree.tree_structure(structure), fields))


def with_preprocessing(prediction: Prediction, mapping: RowMapping) -> Prediction:
    """A prediction of rows that a mapping is applied to first.

    Args:
        prediction: of rows as the mapping returns them.
        mapping: from the rows that there are.

    Raises:
        ProgramError: the mapping returns other dtypes or shapes than the prediction takes.
    """
    for have, want in zip(mapping.target.fields, prediction.inputs.fields, strict=False):
        if have.dtype != want.dtype or not _fits(have.shape, want.shape):
            raise ProgramError(
                "Preprocessing must return what the model takes: "
                f"{want.dtype} {list(want.shape)} for {want.name!r}. "
                f"Received: {have.dtype} {list(have.shape)}."
            )
    if len(mapping.target.fields) != len(prediction.inputs.fields):
        raise ProgramError(
            f"Preprocessing must return the {len(prediction.inputs.fields)} inputs of the model. "
            f"Received: {len(mapping.target.fields)} tensors."
        )

    def predict(*tensors: Any) -> list[Any]:
        row, seed = tensors[: len(mapping.source.fields)], tensors[len(mapping.source.fields)]
        rows = tf.shape(row[0])[0]
        seeds = tf.tile(seed[tf.newaxis], [rows, 1])
        batch = call(mapping.batch, [*row, seeds])
        return call(prediction.graph, [*batch, seed, *tensors[len(mapping.source.fields) + 1 :]])

    values = [tf.TensorSpec(weight.shape, weight.dtype) for weight in prediction.weights]
    traced = trace_graph(predict, [*_signature(mapping.source), *values], ordered=False)
    graph = purify_function(traced, allow=DATASET_OPS).graph
    return Prediction(graph, prediction.weights, mapping.source, prediction.outputs)


def _fits(have: Sequence[int | None], want: Sequence[int | None]) -> bool:
    return len(have) == len(want) and all(
        expected is None or size == expected for size, expected in zip(have, want, strict=True)
    )


def with_postprocessing(
    prediction: Prediction, function: Callable[..., Mapping[str, Any]]
) -> Prediction:
    """A prediction with other outputs.

    Args:
        prediction: whose outputs are taken.
        function: from its outputs, `[rows, *shape]`, to tensors `[rows, …]` by name; their order
            is that of the outputs.
    """
    names: list[str] = []

    def predict(*tensors: Any) -> list[Any]:
        named = function(*call(prediction.graph, tensors))
        names[:] = named
        return list(named.values())

    values = [tf.TensorSpec(weight.shape, weight.dtype) for weight in prediction.weights]
    traced = trace_graph(predict, [*_signature(prediction.inputs), *values], ordered=False)
    graph = purify_function(traced, allow=DATASET_OPS).graph
    outputs = _output_spec(list(range(len(names))), graph, names)
    return Prediction(graph, prediction.weights, prediction.inputs, outputs)
