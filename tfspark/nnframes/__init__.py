"""Stages of Spark ML that train and use Keras models.

The classes are known by the name of this module, which is what saved stages refer to. Names load
what they need on first use, so that a task that decodes images does without Keras.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfspark.nnframes.classifier import NNClassifier, NNClassifierModel
    from tfspark.nnframes.estimator import NNEstimator, NNModel
    from tfspark.nnframes.featurizer import NNFeaturizer
    from tfspark.nnframes.images import NNImageReader
    from tfspark.nnframes.summary import TrainingSummary

_FILE_OF = {
    "NNClassifier": "classifier",
    "NNClassifierModel": "classifier",
    "NNEstimator": "estimator",
    "NNFeaturizer": "featurizer",
    "NNImageReader": "images",
    "NNModel": "estimator",
    "TrainingSummary": "summary",
}

__all__ = [
    "NNClassifier",
    "NNClassifierModel",
    "NNEstimator",
    "NNFeaturizer",
    "NNImageReader",
    "NNModel",
    "TrainingSummary",
]


def __getattr__(name: str) -> Any:
    """Imports a stage when it is first used (PEP 562)."""
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_FILE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
