"""What is taken for a model, and how a model becomes a function of SQL."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from pyspark.sql import SparkSession

from tfspark.data.mapping import RowMapping
from tfspark.data.spec import RowSpec, declared
from tfspark.errors import InvalidInputError
from tfspark.graph.from_keras import is_keras_model
from tfspark.graph.keras_files import load_model
from tfspark.graph.prediction import (
    prediction_from_function,
    prediction_from_keras,
    with_preprocessing,
)
from tfspark.graph.program import Prediction
from tfspark.inference.dataframe import ModelUdf

BATCH_SIZE = 128
"""Rows of one call of a model, unless told."""


def prediction_of(
    model: Any, *, inputs: Any = None, preprocess: Callable[..., Any] | None = None
) -> Prediction:
    """A model as a prediction.

    Args:
        model: a Keras model; the path of one (`.keras`, `.h5`), which is loaded in Keras' safe
            mode; a function of a batch of tensors; or a `Prediction`.
        inputs: `(dtype, shape)` of one row, or a list or dict of these; needed for a function,
            for a model that does not declare its inputs, and with `preprocess`.
        preprocess: a function from one row to what the model takes, as `TFDataset.map` takes it;
            it runs in TensorFlow where the model runs.

    Raises:
        InvalidInputError: it is none of these, or `inputs` are missing.
    """
    spec = None if inputs is None else RowSpec.of(declared(inputs))
    if preprocess is not None:
        if spec is None:
            raise InvalidInputError(
                "With preprocess= it must be said what a row is. "
                "Received: no inputs=. Pass inputs=(dtype, shape), or a list or dict of these."
            )
        mapping = RowMapping.identity(spec).then(preprocess)
        return with_preprocessing(_prediction(model, mapping.target), mapping)
    return _prediction(model, spec)


def _prediction(model: Any, spec: RowSpec | None) -> Prediction:
    if isinstance(model, Prediction):
        return model
    if isinstance(model, (str, os.PathLike)):
        model = load_model(os.fspath(model), compile=False)
    if is_keras_model(model):
        return prediction_from_keras(model, spec)
    held = getattr(model, "prediction", None)
    if isinstance(held, Prediction):
        return held
    if not callable(model):
        raise InvalidInputError(
            "A model is a Keras model, the path of one, or a function of tensors. "
            f"Received: {type(model).__name__}."
        )
    if spec is None:
        raise InvalidInputError(
            "Of a function it must be said what it takes. Received: no inputs=. "
            "Pass inputs=(dtype, shape) of one row, or a list or dict of these."
        )
    return prediction_from_function(model, spec)


def register_model_udf(
    spark: SparkSession,
    name: str,
    model: Any,
    *,
    inputs: Any = None,
    preprocess: Callable[..., Any] | None = None,
    batch_size: int = BATCH_SIZE,
) -> Any:
    """Makes a model a function of Spark SQL.

    It takes one column per input of the model and returns a number, an array, or, of a model with
    several outputs, a struct. Its model is loaded once per Python worker.

    Args:
        spark: the session in whose queries it is known.
        name: of the function.
        model, inputs, preprocess: see `prediction_of`.
        batch_size: most rows of one call of the model.

    Returns:
        The function, for use with columns of DataFrames.

    Raises:
        InvalidInputError: `model` is no model.
        ProgramError: the model cannot become a graph.
        DataError: Spark has no type for an output.

    Example:
        >>> register_model_udf(spark, "classify", model)  # doctest: +SKIP
        >>> spark.sql("SELECT id, classify(image) FROM images")  # doctest: +SKIP
    """
    prediction = prediction_of(model, inputs=inputs, preprocess=preprocess)
    udf = ModelUdf(prediction, spark.sparkContext, batch_size)
    return spark.udf.register(name, udf.function)
