"""Importing what not every user needs, with an error that names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from tfspark.errors import TFSparkError


class MissingExtraError(TFSparkError, ImportError):
    """An optional dependency is not installed."""


def import_optional(module: str, extra: str, purpose: str) -> ModuleType:
    """The module, or an error that says how to install it.

    Args:
        module: what to import, such as `"matplotlib.pyplot"`.
        extra: the extra of tfspark that brings it, such as `"plots"`.
        purpose: what it is needed for, as the subject of a sentence: `"Plotting a loss curve"`.

    Raises:
        MissingExtraError: the module's package is not installed. A package that is there but
            fails while it is imported keeps its own error.

    Example:
        >>> pyplot = import_optional("matplotlib.pyplot", "plots", "Plotting a loss curve")
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:
            raise
        raise MissingExtraError(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'tfspark[{extra}]'"
        ) from error
