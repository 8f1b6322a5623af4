"""Train TensorFlow and Keras models inside Spark tasks, on the data where it lies.

The everyday names come straight from here and load what they need on first use, so that
`import tfspark` itself imports neither TensorFlow nor PySpark.

Example:
    >>> from tfspark import Adam, MaxEpoch, TFDataset, TFOptimizer, init_nncontext
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keras.optimizers import (
        SGD,
        Adadelta,
        Adagrad,
        Adam,
        Adamax,
        AdamW,
        Ftrl,
        Lamb,
        Lion,
        Nadam,
        RMSprop,
    )

    from tfspark import errors
    from tfspark.context import init_nncontext
    from tfspark.data.dataset import TFDataset
    from tfspark.graph.lars import LARS
    from tfspark.graph.metrics import NDCG, HitRatio, Top1Accuracy, Top5Accuracy
    from tfspark.inference.models import register_model_udf
    from tfspark.inference.predictor import TFNet, TFPredictor
    from tfspark.nnframes import (
        NNClassifier,
        NNClassifierModel,
        NNEstimator,
        NNFeaturizer,
        NNImageReader,
        NNModel,
    )
    from tfspark.sync.stragglers import LeaveOut
    from tfspark.train.estimator import ModeKeys, TFEstimator, TFEstimatorSpec
    from tfspark.train.failure_policy import FailurePolicy
    from tfspark.train.gan import GANEstimator
    from tfspark.train.keras_model import KerasModel
    from tfspark.train.optimizer import TFOptimizer
    from tfspark.train.plateau import Plateau
    from tfspark.train.scaling import LinearScaling
    from tfspark.train.schedules import EpochStep, MultiStep, Poly, Step, Warmup
    from tfspark.train.sequence import SequentialSchedule
    from tfspark.train.summary import TrainSummary, ValidationSummary
    from tfspark.train.triggers import (
        EveryEpoch,
        MaxEpoch,
        MaxIteration,
        MaxScore,
        MinLoss,
        SeveralIteration,
        TriggerAnd,
        TriggerOr,
    )

__version__ = "0.1.0"

_NAMES_OF = {
    "keras.optimizers": (
        "SGD Adadelta Adagrad Adam AdamW Adamax Ftrl Lamb Lion Nadam RMSprop"  # as Keras's
    ),
    "tfspark.context": "init_nncontext",
    "tfspark.data.dataset": "TFDataset",
    "tfspark.graph.lars": "LARS",
    "tfspark.inference.models": "register_model_udf",
    "tfspark.inference.predictor": "TFNet TFPredictor",
    "tfspark.nnframes": (
        "NNClassifier NNClassifierModel NNEstimator NNFeaturizer NNImageReader NNModel"
    ),
    "tfspark.sync.stragglers": "LeaveOut",
    "tfspark.train.estimator": "ModeKeys TFEstimator TFEstimatorSpec",
    "tfspark.train.failure_policy": "FailurePolicy",
    "tfspark.train.gan": "GANEstimator",
    "tfspark.train.keras_model": "KerasModel",
    "tfspark.graph.metrics": "HitRatio NDCG Top1Accuracy Top5Accuracy",
    "tfspark.train.optimizer": "TFOptimizer",
    "tfspark.train.plateau": "Plateau",
    "tfspark.train.scaling": "LinearScaling",
    "tfspark.train.schedules": "EpochStep MultiStep Poly Step Warmup",
    "tfspark.train.sequence": "SequentialSchedule",
    "tfspark.train.summary": "TrainSummary ValidationSummary",
    "tfspark.train.triggers": (
        "EveryEpoch MaxEpoch MaxIteration MaxScore MinLoss SeveralIteration TriggerAnd TriggerOr"
    ),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names.split()}

__all__ = [
    "LARS",
    "NDCG",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "EpochStep",
    "EveryEpoch",
    "FailurePolicy",
    "Ftrl",
    "GANEstimator",
    "HitRatio",
    "KerasModel",
    "Lamb",
    "LeaveOut",
    "LinearScaling",
    "Lion",
    "MaxEpoch",
    "MaxIteration",
    "MaxScore",
    "MinLoss",
    "ModeKeys",
    "MultiStep",
    "NNClassifier",
    "NNClassifierModel",
    "NNEstimator",
    "NNFeaturizer",
    "NNImageReader",
    "NNModel",
    "Nadam",
    "Plateau",
    "Poly",
    "RMSprop",
    "SequentialSchedule",
    "SeveralIteration",
    "Step",
    "TFDataset",
    "TFEstimator",
    "TFEstimatorSpec",
    "TFNet",
    "TFOptimizer",
    "TFPredictor",
    "Top1Accuracy",
    "Top5Accuracy",
    "TrainSummary",
    "TriggerAnd",
    "TriggerOr",
    "ValidationSummary",
    "Warmup",
    "errors",
    "init_nncontext",
    "register_model_udf",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    if name == "errors":
        return importlib.import_module("tfspark.errors")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tfspark' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
