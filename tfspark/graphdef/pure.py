"""A pure TensorFlow function as bytes: what tfspark ships to executors instead of objects."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype and static shape of one tensor."""

    name: str
    dtype: str  # TensorFlow's name of the dtype: "float32", "int64", "string", "bool", "bfloat16"
    shape: tuple[int | None, ...] | None  # None: unknown rank; a None entry: unknown dimension


@dataclass(frozen=True)
class PureGraph:
    """A serialised GraphDef without variables and without stateful random operations.

    `inputs` are its placeholders in call order, `outputs` its results. The same inputs give the
    same outputs bit for bit, in every process. It pickles; loading it needs TensorFlow's runtime
    only, none of the code it was traced from.
    """

    graph_def: bytes
    inputs: tuple[TensorInfo, ...]  # name: the placeholder's node name
    outputs: tuple[TensorInfo, ...]  # name: the tensor's name in the graph, "node:0"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the graph and its signature; the key of every cache of loaded programs."""
        digest = hashlib.sha256(self.graph_def)
        digest.update(repr((self.inputs, self.outputs)).encode())
        return digest.hexdigest()
