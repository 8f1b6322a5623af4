"""Predictions of rows that are Python objects or arrays: of RDDs, data sets and local arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from pyspark.rdd import RDD

from tfspark.data.batches import chunk_batches
from tfspark.data.dataset import TFDataset
from tfspark.data.failures import locating, user_rows
from tfspark.data.rows import RowBuffer
from tfspark.data.spec import STRING, Field, RowSpec
from tfspark.errors import DataError
from tfspark.graph.program import Prediction
from tfspark.graphdef.pure import PureGraph
from tfspark.inference.shipping import ShippedPrediction, active_context, ship
from tfspark.inference.worker import Predictor, predictor_of

PHASE = "prediction"


def predict_rdd(prediction: Prediction, rdd: RDD, batch_size: int) -> RDD:
    """What a model makes of each row of an RDD, in the same partitions and order.

    Args:
        prediction: the model.
        rdd: of rows in the structure of its inputs.
        batch_size: most rows of one call of the model.

    Returns:
        RDD of the outputs in their structure, arrays `[*shape]`. It is lazy; a row that the model
        cannot take is a `DataError` when it is computed.
    """
    return rdd.mapPartitionsWithIndex(_PredictRows(ship(prediction, rdd.context), batch_size))


def predict_dataset(prediction: Prediction, dataset: TFDataset, batch_size: int) -> RDD:
    """What a model makes of each row of a data set, labels left out.

    Args:
        prediction: the model.
        dataset: whose rows, or features where they have labels, are the model's inputs.
        batch_size: most rows of one call of the model.

    Returns:
        RDD of the outputs in their structure, in the order of the rows; lazy. The rows of tf.data
        and TFRecord data sets are in the order in which partitions read them: each its share.

    Raises:
        DataError: the rows are not what the model takes.
    """
    context = active_context()
    spec = dataset.row_spec
    structure = spec.structure()
    features = RowSpec.of(structure[0] if dataset.labelled else structure)
    check_inputs(features, prediction.inputs)
    task = _PredictChunks(
        ship(prediction, context), dataset.spec, dataset.mapping, len(features.fields), batch_size
    )
    return dataset.partitions(context).mapPartitionsWithIndex(task)


def predict_arrays(prediction: Prediction, arrays: Any, batch_size: int) -> Any:
    """What a model makes of arrays, in this process.

    Args:
        prediction: the model.
        arrays: `[rows, *shape]` in the structure of its inputs.
        batch_size: most rows of one call of the model.

    Returns:
        Arrays `[rows, *shape]` in the structure of its outputs.

    Raises:
        DataError: they have another structure, dtype or shape, or differ in their rows.
    """
    spec = prediction.inputs
    try:
        given = [np.asarray(array) for array in spec.flatten(arrays)]
    except ValueError as error:
        raise DataError(
            f"Arrays have the structure of the model's inputs: {', '.join(spec.names)}. "
            f"Received: {error}."
        ) from error
    shapes = [array.shape for array in given]
    rows = {shape[0] for shape in shapes if shape}
    if len(rows) != 1 or not all(shapes):
        raise DataError(
            f"All inputs are arrays with the same number of rows. Received: shapes {shapes}."
        )
    predictor = Predictor(prediction.graph, prediction.weights, prediction.outputs)
    parts: list[list[np.ndarray]] = []
    (count,) = rows
    for start in range(0, max(count, 1), batch_size):
        batch = [
            _as_declared(array[start : start + batch_size], field, start)
            for array, field in zip(given, spec.fields, strict=True)
        ]
        parts.append(predictor(batch))
    joined = [np.concatenate(list(part)) for part in zip(*parts, strict=True)]
    return prediction.outputs.unflatten(joined)


def _as_declared(array: np.ndarray, field: Field, first: int) -> np.ndarray:
    """Rows of an array in the dtype of an input; looked at one by one only where they must be."""
    fits = len(array.shape) == len(field.shape) + 1 and all(
        want in (None, have) for have, want in zip(array.shape[1:], field.shape, strict=True)
    )
    if fits and array.dtype == field.numpy_dtype and field.dtype != STRING:
        return array
    return stacked(list(array), field, 0, first)


def stacked(values: Sequence[Any], field: Field, partition: int, first: int) -> np.ndarray:
    """Values of rows as one tensor, padded with 0 or empty text where rows may differ.

    Args:
        values: of an input, one per row.
        field: the input.
        partition, first: where the rows are, for errors.

    Raises:
        DataError: a value is null, of another dtype or shape; names partition and row.
    """
    buffer = RowBuffer(RowSpec.of(field), partition)
    checked = []
    for number, value in enumerate(values):
        buffer.rows = first + number
        checked.append(buffer.checked(value, field))
    if not checked:
        return np.empty((0, *(size or 0 for size in field.shape)), field.numpy_dtype)
    if None not in field.shape:
        return np.stack(checked)
    shape = tuple(max(sizes) for sizes in zip(*(array.shape for array in checked), strict=True))
    fill = b"" if field.dtype == STRING else 0
    padded = np.full((len(checked), *shape), fill, field.numpy_dtype)
    for row, array in zip(padded, checked, strict=True):
        row[tuple(slice(size) for size in array.shape)] = array
    return padded


@dataclass(frozen=True)
class _PredictRows:
    """What a task does with rows."""

    model: ShippedPrediction
    batch_size: int

    def __call__(self, partition: int, rows: Iterable[Any]) -> Iterator[Any]:
        spec, first = self.model.inputs, 0
        with locating(partition=partition, phase=PHASE):
            predictor = predictor_of(self.model)
            remaining = iter(user_rows(rows, partition))
            while part := list(islice(remaining, self.batch_size)):
                columns = zip(
                    *(_leaves(spec, row, partition, first + i) for i, row in enumerate(part)),
                    strict=True,
                )
                batch = [
                    stacked(values, field, partition, first)
                    for values, field in zip(columns, spec.fields, strict=True)
                ]
                yield from rows_of(self.model.outputs, predictor(batch))
                first += len(part)


@dataclass(frozen=True)
class _PredictChunks:
    """What a task does with chunks of a data set.

    Attributes:
        model: to call.
        spec: of the rows as they are in chunks.
        mapping: of the data set.
        features: how many of a row's fields the model takes: the first ones.
        batch_size: most rows of one call.
    """

    model: ShippedPrediction
    spec: RowSpec
    mapping: PureGraph | None
    features: int
    batch_size: int

    def __call__(self, partition: int, chunks: Iterable[bytes]) -> Iterator[Any]:
        with locating(partition=partition, phase=PHASE):
            predictor = predictor_of(self.model)
            batches = chunk_batches(chunks, self.spec, self.mapping, self.batch_size, partition)
            for batch, _ in batches:
                yield from rows_of(self.model.outputs, predictor(batch[: self.features]))


def check_inputs(have: RowSpec, want: RowSpec) -> None:
    """Refuses rows that are not what a model takes.

    Raises:
        DataError: names both.
    """

    def shown(spec: RowSpec) -> str:
        return ", ".join(f"{f.name}: {f.dtype} {list(f.shape)}" for f in spec.fields)

    agree = len(have.fields) == len(want.fields) and all(
        h.dtype == w.dtype
        and len(h.shape) == len(w.shape)
        and all(x is None or y is None or x == y for x, y in zip(h.shape, w.shape, strict=True))
        for h, w in zip(have.fields, want.fields, strict=True)
    )
    if not agree:
        raise DataError(
            f"The rows of a data set must be what the model takes, {shown(want)}. "
            f"Received: {shown(have)}. Declare other types and shapes, or map() the data set."
        )


def rows_of(outputs: RowSpec, tensors: Sequence[np.ndarray]) -> Iterator[Any]:
    """The rows of tensors `[rows, *shape]`, in the structure of the outputs."""
    for leaves in zip(*tensors, strict=True):
        yield outputs.unflatten(leaves)


def _leaves(spec: RowSpec, row: Any, partition: int, number: int) -> list[Any]:
    try:
        return spec.flatten(row)
    except ValueError as error:
        raise DataError(
            f"Every row must have the model's inputs: {', '.join(spec.names)}. Received: {error}.",
            partition=partition,
            row=number,
        ) from error
