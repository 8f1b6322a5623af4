"""Saved Keras models, which say themselves which Keras has saved them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import h5py
import keras

from tfspark.graph.keras_2 import PACKAGE


def load_model(
    file: str,
    custom_objects: Mapping[str, Any] | None = None,
    *,
    compile: bool = True,
    safe_mode: bool = True,
) -> Any:
    """A model of a file, loaded by the Keras that has saved it.

    Files of Keras 2 are loaded by tf-keras where it is installed, and by Keras 3 where it is not.

    Args:
        file: of this machine, ends in `.keras` or `.h5`.
        custom_objects: classes and functions by name.
        compile: whether to compile the model as it was.
        safe_mode: whether to refuse code that is stored in a `.keras` file.
    """
    package: Any = keras
    if saved_by(file).startswith("2.") and importlib.util.find_spec(PACKAGE) is not None:
        package = importlib.import_module(PACKAGE)
    return package.models.load_model(file, custom_objects, compile=compile, safe_mode=safe_mode)


def saved_by(file: str) -> str:
    """The version of the Keras that has saved a model; "" where the file does not say."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if "metadata.json" not in archive.namelist():
                return ""
            return str(json.loads(archive.read("metadata.json")).get("keras_version", ""))
    if h5py.is_hdf5(file):
        with h5py.File(file) as archive:
            return str(archive.attrs.get("keras_version", ""))
    return ""
