"""A `Prediction` as files: a graph, weights, and the fields that go in and come out.

Nothing in them is code of Python, and nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfspark.data.spec import Field, RowSpec
from tfspark.errors import InvalidInputError
from tfspark.graph.program import Prediction
from tfspark.graphdef.pure import PureGraph, TensorInfo
from tfspark.nnframes.files import read_json, write_json

_GRAPH, _WEIGHTS, _FIELDS = "graph.pb", "weights.bin", "prediction.json"


def write_prediction(folder: Path, prediction: Prediction) -> None:
    """Writes the files.

    Raises:
        InvalidInputError: the model holds text, as a lookup table does.
    """
    graph = prediction.graph
    if any(weight.dtype.hasobject for weight in prediction.weights):
        raise InvalidInputError(
            "The weights of a saved model are numbers. Received: a model that holds text. Index "
            "it before, for example with a StringIndexer."
        )
    (folder / _GRAPH).write_bytes(graph.graph_def)
    with (folder / _WEIGHTS).open("wb") as file:
        for weight in prediction.weights:
            file.write(np.ascontiguousarray(weight).data.cast("B") if weight.size else b"")
    write_json(
        folder / _FIELDS,
        {
            "graph_inputs": [_info(info) for info in graph.inputs],
            "graph_outputs": [_info(info) for info in graph.outputs],
            "weights": [[weight.dtype.name, list(weight.shape)] for weight in prediction.weights],
            "inputs": _spec(prediction.inputs),
            "outputs": _spec(prediction.outputs),
        },
    )


def read_prediction(folder: Path) -> Prediction:
    """Reads the files."""
    content = read_json(folder / _FIELDS)
    raw = (folder / _WEIGHTS).read_bytes()
    weights, start = [], 0
    for name, shape in content["weights"]:
        dtype = np.dtype(tf.as_dtype(name).as_numpy_dtype)  # also bfloat16
        end = start + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        weights.append(np.frombuffer(raw[start:end], dtype).reshape(shape))
        start = end
    if start != len(raw):
        raise InvalidInputError(
            f"The weights of a saved model have {start} bytes. Received: {len(raw)}."
        )
    graph = PureGraph(
        (folder / _GRAPH).read_bytes(),
        tuple(_read_info(info) for info in content["graph_inputs"]),
        tuple(_read_info(info) for info in content["graph_outputs"]),
    )
    return Prediction(
        graph, tuple(weights), _read_spec(content["inputs"]), _read_spec(content["outputs"])
    )


def _info(info: TensorInfo) -> list[Any]:
    return [info.name, info.dtype, None if info.shape is None else list(info.shape)]


def _read_info(content: list[Any]) -> TensorInfo:
    name, dtype, shape = content
    return TensorInfo(name, dtype, None if shape is None else tuple(shape))


def _spec(spec: RowSpec) -> Any:
    return _nested(spec.structure())


def _nested(structure: Any) -> Any:
    # JSON has no tuples, and a dict may have any keys.
    if isinstance(structure, Field):
        return {"field": [structure.name, structure.dtype, list(structure.shape)]}
    if isinstance(structure, dict):
        return {"dict": {key: _nested(value) for key, value in structure.items()}}
    kind = "tuple" if isinstance(structure, tuple) else "list"
    return {kind: [_nested(value) for value in structure]}


def _read_spec(content: Any) -> RowSpec:
    return RowSpec.of(_read_nested(content))


def _read_nested(content: dict[str, Any]) -> Any:
    ((kind, value),) = content.items()
    if kind == "field":
        name, dtype, shape = value
        return Field(name, dtype, tuple(shape))
    if kind == "dict":
        return {key: _read_nested(each) for key, each in value.items()}
    parts = [_read_nested(each) for each in value]
    return tuple(parts) if kind == "tuple" else parts
