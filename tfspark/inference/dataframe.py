"""Predictions as columns of DataFrames and as SQL functions."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyspark import SparkContext, TaskContext
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from tfspark.data.columns import column_named
from tfspark.data.failures import locating
from tfspark.data.spec import STRING, Field, RowSpec
from tfspark.errors import DataError, InvalidInputError
from tfspark.graph.program import Prediction
from tfspark.inference.columns import batch_of, column_of
from tfspark.inference.shipping import ShippedPrediction, ship
from tfspark.inference.worker import predictor_of

PHASE = "prediction"

_TYPES: dict[str, tuple[T.DataType, pa.DataType]] = {
    "bool": (T.BooleanType(), pa.bool_()),
    "int8": (T.ByteType(), pa.int8()),
    "int16": (T.ShortType(), pa.int16()),
    "int32": (T.IntegerType(), pa.int32()),
    "int64": (T.LongType(), pa.int64()),
    "uint8": (T.ShortType(), pa.int16()),
    "uint16": (T.IntegerType(), pa.int32()),
    "uint32": (T.LongType(), pa.int64()),
    "float16": (T.FloatType(), pa.float32()),
    "bfloat16": (T.FloatType(), pa.float32()),
    "float32": (T.FloatType(), pa.float32()),
    "float64": (T.DoubleType(), pa.float64()),
    STRING: (T.StringType(), pa.string()),
}


def predicted_type(field: Field) -> tuple[T.DataType, pa.DataType]:
    """The types, of Spark and of Arrow, of a column that an output of a model becomes.

    An output of one element per row is a number (or text), others are arrays, nested as often as
    they have dimensions.

    Raises:
        DataError: Spark has no type for it.
    """
    if field.dtype not in _TYPES:
        raise DataError(
            f"An output of a model must fit into a column. Received: {field.dtype} in "
            f"{field.name!r}. Cast it in the model."
        )
    spark, arrow = _TYPES[field.dtype]
    if field.shape in ((), (1,)):
        return spark, arrow
    for _ in field.shape:
        spark, arrow = T.ArrayType(spark), pa.list_(arrow)
    return spark, arrow


class ModelUdf:
    """A model as a function of columns.

    Args:
        prediction: the model.
        context: of Spark, which gets its weights as a broadcast.
        batch_size: most rows of one call of the model.

    Attributes:
        return_type: of the column: that of the output where there is one, else a struct.
        function: what Spark calls: a user-defined function of one column per input.
    """

    def __init__(self, prediction: Prediction, context: SparkContext, batch_size: int):
        if batch_size < 1:
            raise InvalidInputError(f"A batch has at least one row. Received: {batch_size}.")
        fields = prediction.outputs.fields
        types = [predicted_type(field) for field in fields]
        self.prediction = prediction
        self.return_type: T.DataType = types[0][0]
        if len(fields) > 1:
            self.return_type = T.StructType(
                [
                    T.StructField(field.name, spark)
                    for field, (spark, _) in zip(fields, types, strict=True)
                ]
            )
        self._shipped = ship(prediction, context)
        task = _Predict(self._shipped, tuple(arrow for _, arrow in types), batch_size)
        self.function = _udf(task, len(prediction.inputs.fields), self.return_type)


@dataclass(frozen=True)
class _Predict:
    """What a task does with batches of columns.

    Attributes:
        model: to call.
        kinds: Arrow types of its outputs.
        batch_size: most rows of one call.
    """

    model: ShippedPrediction
    kinds: tuple[pa.DataType, ...]
    batch_size: int

    def __call__(self, batches: Iterator[Sequence[pa.Array]]) -> Iterator[pa.Array]:
        context = TaskContext.get()
        partition = context.partitionId() if context is not None else 0
        with locating(partition=partition, phase=PHASE):
            predictor, done = predictor_of(self.model), 0
            for columns in batches:
                rows = len(columns[0])
                parts = []
                for start in range(0, rows, self.batch_size):
                    part = [column.slice(start, self.batch_size) for column in columns]
                    parts.append(self._part(predictor, part, partition, done + start))
                yield pa.concat_arrays(parts) if parts else pa.array([], self._kind)
                done += rows

    @property
    def _kind(self) -> pa.DataType:
        """Of the column that it returns."""
        if len(self.kinds) == 1:
            return self.kinds[0]
        names = [field.name for field in self.model.outputs.fields]
        return pa.struct(list(zip(names, self.kinds, strict=True)))

    def _part(
        self, predictor: Any, columns: Sequence[pa.Array], partition: int, first: int
    ) -> pa.Array:
        """The prediction of the rows of one call."""
        fields = self.model.inputs.fields
        try:
            batch = [batch_of(c, field) for c, field in zip(columns, fields, strict=True)]
            outputs = predictor(batch)
            arrays = [column_of(t, kind) for t, kind in zip(outputs, self.kinds, strict=True)]
        except DataError as error:
            where = {"partition": partition, **error.where}
            if "row" in error.where:
                where["row"] = first + error.row
            raise DataError(error.message, **where) from error
        if len(arrays) == 1:
            return arrays[0]
        return pa.StructArray.from_arrays(arrays, [f.name for f in self.model.outputs.fields])


def _udf(task: _Predict, num_columns: int, return_type: T.DataType) -> Any:
    """A task as a user-defined function, through Arrow alone where this Spark can (4.1)."""

    # Spark reads from the annotations what it has to call these with.
    def of_one(columns: Iterator[pa.Array]) -> Iterator[pa.Array]:
        return task((column,) for column in columns)

    def of_several(batches: Iterator[tuple[pa.Array, ...]]) -> Iterator[pa.Array]:
        return task(batches)

    of_one.__name__ = of_several.__name__ = "model"  # as plans show it
    function: Any = of_one if num_columns == 1 else of_several
    if hasattr(F, "arrow_udf"):
        make: Any = F.arrow_udf  # its overloads know no function whose kind is chosen
        return make(function, return_type)
    return through_pandas(function, num_columns, return_type)


def through_pandas(function: Any, num_columns: int, return_type: T.DataType) -> Any:
    """A function of Arrow columns for a Spark that knows pandas only."""
    import pandas as pd
    from pyspark.sql.functions import pandas_udf

    def arrow(series: pd.Series) -> pa.Array:
        return pa.Array.from_pandas(series)

    def back(column: pa.Array) -> Any:
        if pa.types.is_struct(column.type):
            return pd.DataFrame({f.name: column.field(f.name).to_pandas() for f in column.type})
        return column.to_pandas()

    def of_one(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        return map(back, function(map(arrow, batches)))

    def of_several(batches: Iterator[tuple[pd.Series, ...]]) -> Iterator[pd.Series]:
        return map(back, function(tuple(map(arrow, batch)) for batch in batches))

    chosen: Any = of_one if num_columns == 1 else of_several
    # Spark resolves annotations in the module, where pandas is not imported.
    returned: Any = pd.DataFrame if isinstance(return_type, T.StructType) else pd.Series
    taken: Any = pd.Series if num_columns == 1 else tuple[pd.Series, ...]
    chosen.__annotations__ = {"batches": Iterator[taken], "return": Iterator[returned]}
    make: Any = pandas_udf
    return make(chosen, return_type)


def predict_columns(
    frame: DataFrame,
    udf: ModelUdf,
    feature_cols: Any,
    output_cols: str | Sequence[str] = "prediction",
) -> DataFrame:
    """A DataFrame with the outputs of a model beside its own columns.

    Nothing is computed before the result is used; then partitions are streamed, and their rows
    keep their order. It works on a streaming DataFrame, too.

    Args:
        frame: the DataFrame.
        udf: the model.
        feature_cols: names of columns in the structure of the model's inputs: one for one input,
            a list or a dict of them for several.
        output_cols: of the outputs in flat order.

    Raises:
        DataError: a column is missing, or there are more or fewer than inputs or outputs.
    """
    inputs, outputs = udf.prediction.inputs, udf.prediction.outputs
    columns = [column_named(frame, name) for name in _by_input(inputs, feature_cols)]
    names = [output_cols] if isinstance(output_cols, str) else list(output_cols)
    if len(names) != len(outputs.fields):
        raise DataError(
            "There is a column for each output of a model. "
            f"Received: {', '.join(names)} for the outputs {', '.join(outputs.names)}."
        )
    if len(names) == 1:
        return frame.withColumn(names[0], udf.function(*columns))
    # Not a name that anybody has.
    both = f"tfspark-{uuid.uuid4().hex}"
    predicted = frame.withColumn(both, udf.function(*columns))
    parts = {
        name: F.col(f"`{both}`.`{field.name}`")
        for name, field in zip(names, outputs.fields, strict=True)
    }
    return predicted.withColumns(parts).drop(both)


def _by_input(inputs: RowSpec, feature_cols: Any) -> list[str]:
    """A column's name for each input."""
    names: Any = feature_cols
    if isinstance(feature_cols, dict):
        with suppress(ValueError):
            names = inputs.flatten(feature_cols)
    elif isinstance(feature_cols, str):
        names = [feature_cols]
    if (
        isinstance(names, (list, tuple))
        and len(names) == len(inputs.fields)
        and all(isinstance(name, str) for name in names)
    ):
        return list(names)
    raise DataError(
        f"There is a column for each input of a model: {', '.join(inputs.names)}. Received: "
        f"{feature_cols!r}. To join columns into one input, use F.array or a VectorAssembler."
    )
