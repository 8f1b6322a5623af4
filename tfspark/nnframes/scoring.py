"""A model in use on columns: in memory, as a column of predictions, and as files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import keras
from pyspark.sql import DataFrame

from tfspark.data.columns import DataFrameSource
from tfspark.data.mapping import RowMapping
from tfspark.errors import DataError, InvalidInputError
from tfspark.graph.keras_files import load_model
from tfspark.graph.prediction import with_preprocessing
from tfspark.graph.program import Prediction
from tfspark.inference.dataframe import ModelUdf, predict_columns
from tfspark.inference.models import prediction_of
from tfspark.inference.shipping import active_context
from tfspark.nnframes.features import FeatureColumns, Prepare, Preprocessing, preprocessing_of
from tfspark.nnframes.files import read_json, write_json
from tfspark.nnframes.prediction_files import read_prediction, write_prediction
from tfspark.nnframes.training import Fitted
from tfspark.train.model_files import fetched_file

_KERAS_FILE, _COLUMNS_FILE = "model.keras", "columns.json"


class Scoring:
    """A model, and what makes its inputs of columns.

    Args:
        prediction: of the flat columns of a DataFrame where `images` is given, else of the model's
            own inputs; columns then are fitted to these when they are known.
        images: of the columns, which are images.
        preprocessing: that is not a part of the prediction yet.
        model: the Keras model that it was made of.
        saved: a folder of this process that has it as a file, and goes with this object.
    """

    def __init__(
        self,
        prediction: Prediction,
        *,
        images: tuple[bool, ...] | None = None,
        preprocessing: Preprocessing = (),
        model: keras.Model | None = None,
        saved: tempfile.TemporaryDirectory[str] | None = None,
    ):
        self._prediction, self._images = prediction, images
        self._preprocessing = preprocessing
        self._model, self._saved = model, saved
        self._udfs: dict[Hashable, ModelUdf] = {}  # a broadcast each

    @classmethod
    def of(cls, model: Any, feature_preprocessing: Any) -> Scoring:
        """Of whatever is taken for a model.

        Raises:
            InvalidInputError: it is none, or does not declare its inputs.
        """
        if isinstance(model, (str, os.PathLike)):
            with fetched_file(os.fspath(model)) as file:
                model = load_model(file, compile=False)
        return cls(
            prediction_of(model),
            preprocessing=preprocessing_of(feature_preprocessing, "feature_preprocessing"),
            model=model if isinstance(model, keras.Model) else None,
        )

    @classmethod
    def trained(cls, fitted: Fitted) -> Scoring:
        """Of what a training has made."""
        return cls(fitted.prediction, images=fitted.columns.images, model=fitted.model)

    @property
    def outputs(self) -> Any:
        """Fields of the model's outputs."""
        return self._prediction.outputs.fields

    def predicted(
        self,
        frame: DataFrame,
        feature_cols: str | Sequence[str],
        output_cols: str | Sequence[str],
        batch_size: int,
        finish: Callable[[Prediction], Prediction],
        key: Hashable,
    ) -> DataFrame:
        """A DataFrame with columns of predictions.

        Args:
            frame: the DataFrame.
            feature_cols: the columns of features.
            output_cols: of the outputs, after `finish`.
            batch_size: most rows of one call.
            finish: adds to the prediction what params say.
            key: equal for equal `finish`.

        Raises:
            DataError: columns are missing, or are none that the model takes.
        """
        columns = FeatureColumns.of(frame, feature_cols)
        prediction = self._on(frame, columns)
        names = self._in_order(columns)
        known = (prediction.inputs.fingerprint, batch_size, key)
        if known not in self._udfs:
            self._udfs[known] = ModelUdf(finish(prediction), active_context(), batch_size)
        return predict_columns(frame, self._udfs[known], names, output_cols)

    def _on(self, frame: DataFrame, columns: FeatureColumns) -> Prediction:
        """The prediction of a DataFrame's columns."""
        if self._images is not None:
            if columns.images != self._images:
                raise DataError(
                    "A model is used on columns of the kind it was trained on: "
                    f"{_kinds(self._images)}. Received: {_kinds(columns.images)} in "
                    f"{', '.join(columns.names)}."
                )
            return self._prediction
        inputs = self._prediction.inputs
        as_it_is = len(columns.names) == len(inputs.fields) and not any(columns.images)
        if as_it_is and not self._preprocessing:
            return self._prediction
        spec = DataFrameSource.of(frame, columns.flat).spec
        mapping = RowMapping.identity(spec).then(Prepare(columns, self._preprocessing, inputs))
        self._prediction = with_preprocessing(self._prediction, mapping)
        self._images, self._preprocessing = columns.images, ()
        return self._prediction

    def _in_order(self, columns: FeatureColumns) -> list[str]:
        """The flat columns in the order of the prediction's inputs."""
        names = self._prediction.inputs.names
        by_name = self._images is None and set(names) == set(columns.flat)
        return list(names) if by_name else columns.flat

    # -- the Keras model and files --------------------------------------------------------------

    def keras_model(self, custom_objects: Any, safe_mode: bool) -> keras.Model:
        """The Keras model, from its file where this was loaded.

        Raises:
            InvalidInputError: there is none, or Keras cannot load it.
        """
        if self._model is not None:
            return self._model
        if self._saved is None:
            raise InvalidInputError(
                "A stage has the Keras model that it was made of. "
                "Received: one that was made of something else."
            )
        return load_keras(Path(self._saved.name) / _KERAS_FILE, custom_objects, safe_mode)

    def write_files(self, folder: Path) -> None:
        """Writes the model into a local folder.

        Raises:
            InvalidInputError: what its preprocessing makes of columns is not known yet.
        """
        if self._preprocessing:
            raise InvalidInputError(
                "A stage is saved as a graph of its columns. Received: an NNModel with "
                "feature_preprocessing that has seen no DataFrame. Call transform(df) before."
            )
        write_prediction(folder, self._prediction)
        write_json(folder / _COLUMNS_FILE, {"images": self._images and list(self._images)})
        if self._model is not None:
            self._model.save(folder / _KERAS_FILE)
        elif self._saved is not None:  # as it is: it may need classes that are not here
            shutil.copy(Path(self._saved.name) / _KERAS_FILE, folder)

    @classmethod
    def from_files(cls, folder: Path) -> Scoring:
        """What `write_files` wrote."""
        images = read_json(folder / _COLUMNS_FILE)["images"]
        saved = None
        if (folder / _KERAS_FILE).exists():
            # Kept, because what was loaded may be overwritten, by this very stage for one.
            saved = tempfile.TemporaryDirectory(prefix="tfspark-")
            shutil.copy(folder / _KERAS_FILE, saved.name)
        return cls(
            read_prediction(folder),
            images=None if images is None else tuple(images),
            saved=saved,
        )


def load_keras(file: Path, custom_objects: Any = None, safe_mode: bool = True) -> keras.Model:
    """A Keras model from its file.

    Raises:
        InvalidInputError: it needs classes that are not there, or has code in it.
    """
    try:
        return keras.saving.load_model(file, custom_objects, safe_mode=safe_mode)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            "A Keras model is loaded with the classes that it was made of, and without code. "
            f"Received: {str(error).splitlines()[0]:.300} Decorate its classes with "
            "@keras.saving.register_keras_serializable() and import them, or pass custom_objects."
        ) from error


def _kinds(images: Sequence[bool]) -> str:
    return ", ".join("image" if each else "no image" for each in images)
