"""Models on their way to Python workers, which share one copy of the weights on each host.

Weights travel as a Spark broadcast. The first worker of an executor that unpacks it writes them
into a file of the executor's own folder; all of them map that file, so that their pages are in
memory once.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from pyspark import Broadcast, SparkContext

from tfspark._aligned import ALIGNMENT
from tfspark.data.chunks import store_folder
from tfspark.data.spec import RowSpec
from tfspark.errors import ClusterError
from tfspark.graph.program import Prediction
from tfspark.graphdef.pure import PureGraph
from tfspark.slots import task_threads

MOST_KEPT = 8
"""Models that an executor keeps on disk, and a worker loaded."""

_PREFIX = "weights-"


@dataclass(frozen=True)
class Shipped:
    """A graph with its weights as tasks hold it: a few hundred bytes, and a broadcast.

    Attributes:
        fingerprint: of graph and weights; what workers keep it by.
        threads: of TensorFlow in one task.
        content: broadcast `_Content`.
    """

    fingerprint: str
    threads: int
    content: Broadcast

    def unpack(self) -> tuple[PureGraph, list[np.ndarray]]:
        """Graph and weights, the latter mapped from a file; called in a worker."""
        content: _Content = self.content.value
        return content.graph, content.weights()


@dataclass(frozen=True)
class ShippedPrediction(Shipped):
    """A prediction as tasks hold it.

    Attributes:
        inputs, outputs: of a row.
    """

    inputs: RowSpec
    outputs: RowSpec


def active_context() -> SparkContext:
    """The SparkContext there is.

    Raises:
        ClusterError: there is none.
    """
    context = SparkContext._active_spark_context
    if context is None:
        raise ClusterError(
            "What Spark computes needs a SparkContext. Received: none. Call init_nncontext() first."
        )
    return context


def ship(prediction: Prediction, context: SparkContext) -> ShippedPrediction:
    """Broadcasts a prediction."""
    shipped = ship_graph(prediction.graph, prediction.weights, context)
    return ShippedPrediction(
        shipped.fingerprint, shipped.threads, shipped.content, prediction.inputs, prediction.outputs
    )


def ship_graph(graph: PureGraph, weights: Sequence[np.ndarray], context: SparkContext) -> Shipped:
    """Broadcasts a graph and the values of its last inputs."""
    digest = hashlib.sha256(graph.fingerprint.encode())
    for weight in weights:
        digest.update(np.ascontiguousarray(weight).reshape(-1).view(np.uint8).data)
    fingerprint = digest.hexdigest()
    content = _Content.of(graph, weights, fingerprint)
    return Shipped(fingerprint, task_threads(context), context.broadcast(content))


@dataclass(frozen=True)
class _Content:
    """A graph, and where its weights are.

    Pickled it holds the weights themselves; to be unpickled is to be written to a file, once per
    executor.

    Attributes:
        graph: of the prediction.
        layout: dtype, shape and place of each weight in the bytes.
        path: of the file in which they lie; "" where they are at hand.
        parts: the weights, where they are at hand.
    """

    graph: PureGraph
    layout: tuple[tuple[str, tuple[int, ...], int], ...]
    fingerprint: str
    path: str = ""
    parts: tuple[np.ndarray, ...] = ()

    @classmethod
    def of(cls, graph: PureGraph, weights: Sequence[np.ndarray], fingerprint: str) -> _Content:
        """Of values that are at hand."""
        layout, end = [], 0
        for weight in weights:
            layout.append((weight.dtype.str, weight.shape, end))
            end += -(-weight.nbytes // ALIGNMENT) * ALIGNMENT
        return cls(graph, tuple(layout), fingerprint, parts=tuple(weights))

    def weights(self) -> list[np.ndarray]:
        """All of them; from a file they are mapped, not read."""
        if not self.path:
            return list(self.parts)
        if not self.layout:
            return []
        mapped = np.memmap(self.path, np.uint8, "r")
        found = []
        for dtype, shape, start in self.layout:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            found.append(mapped[start : start + size].view(dtype).reshape(shape))
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled where they lie, without a copy.
        parts = [pickle.PickleBuffer(np.ascontiguousarray(part).data) for part in self.parts]
        return _land, (self.graph, self.layout, self.fingerprint, parts)


def _land(
    graph: PureGraph,
    layout: tuple[tuple[str, tuple[int, ...], int], ...],
    fingerprint: str,
    parts: Sequence[Any],
) -> _Content:
    """Writes weights to the file of this executor, unless another worker has."""
    folder = store_folder(0)
    path = os.path.join(folder, f"{_PREFIX}{fingerprint}")
    if not os.path.exists(path):
        os.makedirs(folder, mode=0o700, exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            for (_, _, start), part in zip(layout, parts, strict=True):
                file.seek(start)
                file.write(part)
            file.truncate(max(file.tell(), 1))
        os.replace(temporary, path)
        _forget_oldest(folder)
    return _Content(graph, layout, fingerprint, path)


def _forget_oldest(folder: str) -> None:
    """Removes the weights that were used longest ago; who has mapped them keeps them."""
    found = [os.path.join(folder, name) for name in os.listdir(folder) if name.startswith(_PREFIX)]
    ages = {}
    for path in found:
        with suppress(FileNotFoundError):  # another worker does the same
            ages[path] = os.stat(path).st_mtime
    for path in sorted(ages, key=lambda each: ages[each])[:-MOST_KEPT]:
        with suppress(FileNotFoundError):
            os.unlink(path)
