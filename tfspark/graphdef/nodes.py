"""Nodes and operations of graphs: which ones are needed, in which order, and which are pure."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tensorflow.python.framework import op_def_registry

from tfspark.errors import ProgramError
from tfspark.graphdef.randomness import RANDOM_OPS

# Stateful by registration only: what they keep lives and dies within one run of a v1 loop.
_LOCAL = re.compile("Stack(Push|Pop|Close)?V2|TensorArray.*V3")

# What else is stateful and has no place in a pure graph, and what to do about it.
_REMEDIES = (
    ("Table", "look words up in the data set's map, or use a keras.layers.StringLookup there"),
    ("Queue|Reader|Iterator|Dataset|Stack|Barrier|Staging", "feed the data through a TFDataset"),
    ("PyFunc", "write it with TensorFlow operations, or do it in the RDD before the TFDataset"),
    ("Rng|Stateful.*", "use tf.random.uniform and its like, or keras.random with a SeedGenerator"),
    ("Read|Assign|Var|Scatter|Apply", "let the loss only read its variables and assign them"),
)


def inputs_of(op: Any) -> list[Any]:
    """The operations that an operation depends on, over data and control edges."""
    return [tensor.op for tensor in op.inputs] + list(op.control_inputs)


def ancestors(roots: Iterable[Any]) -> dict[str, Any]:
    """Operations and all that they depend on, by name."""
    seen: dict[str, Any] = {}
    pending = list(roots)
    while pending:
        op = pending.pop()
        if op.name not in seen:
            seen[op.name] = op
            pending += inputs_of(op)
    return seen


def topological(operations: Sequence[Any]) -> list[Any]:
    """In order of dependencies, then of creation; the back edges of v1 loops do not count."""
    # Operations know no creation index in public: their graph lists them in that order.
    position = (
        {op.name: i for i, op in enumerate(operations[0].graph.get_operations())}
        if operations
        else {}
    )
    waiting: dict[str, int] = {}
    consumers: dict[str, list[Any]] = {}
    ready: list[tuple[int, str]] = []
    by_name = {op.name: op for op in operations}
    for op in operations:
        sources = {
            x.name for x in inputs_of(op) if x.type not in ("NextIteration", "RefNextIteration")
        }
        waiting[op.name] = len(sources)
        for source in sources:
            consumers.setdefault(source, []).append(op)
        if not sources:
            heapq.heappush(ready, (position[op.name], op.name))
    order = []
    while ready:
        _, name = heapq.heappop(ready)
        order.append(by_name[name])
        for consumer in consumers.get(name, ()):
            waiting[consumer.name] -= 1
            if not waiting[consumer.name]:
                heapq.heappush(ready, (position[consumer.name], consumer.name))
    return order


def prune(nodes: dict[str, Any], outputs: Iterable[str]) -> list[Any]:
    """The nodes that the output tensors need, in their old order."""
    kept: set[str] = set()
    pending = [output.split(":")[0] for output in outputs]
    while pending:
        name = pending.pop()
        if name not in kept:
            kept.add(name)
            pending += [x.lstrip("^").split(":")[0] for x in nodes[name].input]
    return [node for name, node in nodes.items() if name in kept]


def check_pure(nodes: Iterable[Any], allow: frozenset[str]) -> None:
    """Refuses operations that have or read a state.

    Raises:
        ProgramError: names the operation, its type and the remedy.
    """
    for node in nodes:
        definition = op_def_registry.get(node.op)
        random = node.op in RANDOM_OPS
        harmless = node.op in allow or node.op == "Placeholder" or _LOCAL.fullmatch(node.op)
        if definition is None or harmless or not (definition.is_stateful or random):
            continue
        remedy = next((r for kinds, r in _REMEDIES if re.search(kinds, node.op)), "remove it")
        if random:
            remedy = "draw random numbers outside tf.map_fn with a function, or data set functions"
        raise ProgramError(
            "A program's graph must give the same outputs for the same inputs. Received: "
            f"operation {node.name!r} of type {node.op}, which keeps a state. Please {remedy}."
        )


def called_functions(node: Any) -> list[str]:
    """Names of the functions in a node's attributes."""
    names = []
    for attr in node.attr.values():
        if attr.WhichOneof("value") == "func":
            names.append(attr.func.name)
        names += [function.name for function in attr.list.func]
    return names


def full(tensor: str) -> str:
    """A tensor's name with its output index."""
    return tensor if ":" in tensor else f"{tensor}:0"
