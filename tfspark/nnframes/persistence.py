"""Stages on disk, so that Spark ML's `Pipeline` and `CrossValidator` save and load them as its own.

A stage is a folder: `metadata`, as Spark ML writes it, with the params, and beside it files of the
stage in `data`, whose digests are in the metadata.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any, ClassVar, cast

from pyspark import SparkContext
from pyspark.ml.util import (
    DefaultParamsReader,
    DefaultParamsWriter,
    MLReadable,
    MLReader,
    MLWritable,
    MLWriter,
)

import tfspark
from tfspark.errors import InvalidInputError
from tfspark.nnframes.files import exists, fetched_files, put_files
from tfspark.nnframes.values import decoded, encoded

FORMAT = 1
"""Of the files; a stage of a higher one was saved by a newer version."""


class StageIO(MLWritable, MLReadable[Any]):
    """Base of stages that can be saved: `write`, `read`, `save`, `load`.

    A stage says what it has besides params: `_write_files` and `_from_files`.

    Attributes:
        unsaved: names of params that are left out, with a warning: DataFrames.
        in_files: names of params that are files.
    """

    unsaved: ClassVar[tuple[str, ...]] = ()
    in_files: ClassVar[tuple[str, ...]] = ()

    def write(self) -> MLWriter:
        """A writer: `stage.write().overwrite().save(path)`."""
        return StageWriter(self)

    @classmethod
    def read(cls) -> MLReader[Any]:
        """A reader: `NNModel.read().load(path)`."""
        return StageReader(cls)

    def _write_files(self, folder: Path) -> None:
        """Writes what it has besides params into a local folder."""
        raise NotImplementedError

    @classmethod
    def _from_files(cls, folder: Path) -> Any:
        """A stage of its files, without params.

        Args:
            folder: a copy of the files, for as long as the call takes.
        """
        raise NotImplementedError


class StageWriter(MLWriter):
    """Writes a stage."""

    def __init__(self, stage: Any):
        super().__init__()
        self._stage = stage

    def save(self, path: str) -> None:
        """Writes params and files.

        Raises:
            InvalidInputError: a param, or the model, cannot be written; names it. Then nothing is,
                and what was to be replaced is still there.
        """
        with tempfile.TemporaryDirectory(prefix="tfspark-") as name:
            self._folder = Path(name)
            self._params = self._encoded_params()
            self._stage._write_files(self._folder)
            super().save(path)  # removes what is to be replaced, then calls saveImpl

    def saveImpl(self, path: str) -> None:
        """Puts what `save` has prepared where it belongs."""
        context = _context()
        if exists(context, path):
            raise InvalidInputError(
                "A stage is saved where nothing is. "
                f"Received: {path!r}. To replace it: write().overwrite().save(path)."
            )
        digests = put_files(context, self._folder, f"{path}/data")
        DefaultParamsWriter.saveMetadata(
            self._stage,
            path,
            context,
            extraMetadata={
                "tfspark": {
                    "format": FORMAT,
                    "version": tfspark.__version__,
                    "files": digests,
                }
            },
            paramMap=self._params,
        )

    def _encoded_params(self) -> dict[str, Any]:
        stage = self._stage
        given = {
            param.name: encoded(value, param.name)
            for param, value in stage._paramMap.items()
            if param.name not in (*stage.unsaved, *stage.in_files)
        }
        left_out = [n for n in stage.unsaved if stage.isSet(stage.getParam(n))]
        if left_out:
            warnings.warn(
                f"{', '.join(left_out)} of {stage.uid} is not saved, because a DataFrame is no "
                "param. For rows to validate on that stay with it, use validationIndicatorCol.",
                stacklevel=4,
            )
        return given


class StageReader(MLReader[Any]):
    """Reads a stage of a class.

    Args:
        kind: the class.
    """

    def __init__(self, kind: type):
        super().__init__()
        self._kind = kind

    def load(self, path: str) -> Any:
        """The stage.

        Raises:
            InvalidInputError: another stage was saved there, by a newer version, or its files are
                missing or changed.
        """
        context = _context()
        metadata = DefaultParamsReader.loadMetadata(path, cast(Any, context))
        name = f"{self._kind.__module__}.{self._kind.__name__}"
        saved = metadata.get("tfspark", {})
        if metadata["class"] != name or not saved:
            raise InvalidInputError(
                f"{self._kind.__name__}.load reads what a {self._kind.__name__} was saved as. "
                f"Received: {path!r}, where a {metadata['class']} is."
            )
        if saved["format"] > FORMAT:
            raise InvalidInputError(
                f"This version of tfspark ({tfspark.__version__}) reads stages of the formats up "
                f"to {FORMAT}. Received: format {saved['format']}, written by tfspark "
                f"{saved['version']}, in {path!r}. Update tfspark."
            )
        with fetched_files(context, f"{path}/data", saved["files"]) as folder:
            stage = cast(Any, self._kind)._from_files(folder)
        stage._resetUid(metadata["uid"])
        for param, value in metadata["paramMap"].items():
            stage._set(**{param: decoded(value)})
        stage._setDefault(**metadata["defaultParamMap"])
        return stage


def _context() -> SparkContext:
    context = SparkContext._active_spark_context
    if context is None:
        raise InvalidInputError(
            "A stage is saved and loaded by Spark. Received: no SparkContext. "
            "Start one with init_nncontext()."
        )
    return context
