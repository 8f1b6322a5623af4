"""Models loaded: in a Python worker once, and kept between tasks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfspark.data.spec import RowSpec
from tfspark.errors import UserFunctionError
from tfspark.graph.program import SEED
from tfspark.graphdef.loader import configure_threads, load, op_error
from tfspark.graphdef.pure import PureGraph
from tfspark.inference.shipping import MOST_KEPT, ShippedPrediction

_LOADED: OrderedDict[str, Predictor] = OrderedDict()


class Predictor:
    """A loaded model.

    Args:
        graph, weights, outputs: of a `Prediction`; the weights are read where they are.
    """

    def __init__(self, graph: PureGraph, weights: Sequence[np.ndarray], outputs: RowSpec):
        self._run = load(graph)
        self._weights = weights
        self._names = outputs.names

    def __call__(self, batch: Sequence[Any]) -> list[np.ndarray]:
        """Outputs `[rows, *shape]` of a batch `[rows, *shape]`, both in flat order.

        Raises:
            UserFunctionError: an operation of the model failed, or an output has no row for each
                row of the batch.
        """
        try:
            outputs = self._run(*batch, SEED, *self._weights)
        except tf.errors.OpError as error:
            raise UserFunctionError(
                f"A model must predict every row that it gets. Received: {op_error(error)}"
            ) from error
        for name, output in zip(self._names, outputs, strict=True):
            if output.shape.rank == 0 or output.shape[0] != len(batch[0]):
                raise UserFunctionError(
                    "A model must return a row for each row that it gets. "
                    f"Received: {name!r} of shape {output.shape} for {len(batch[0])} rows."
                )
        return [output.numpy() for output in outputs]


def predictor_of(shipped: ShippedPrediction) -> Predictor:
    """The model in this worker, loaded by the first task that needs it."""
    if shipped.fingerprint in _LOADED:
        _LOADED.move_to_end(shipped.fingerprint)
    else:
        configure_threads(shipped.threads)
        _LOADED[shipped.fingerprint] = Predictor(*shipped.unpack(), shipped.outputs)
        while len(_LOADED) > MOST_KEPT:
            _LOADED.popitem(last=False)
    return _LOADED[shipped.fingerprint]
