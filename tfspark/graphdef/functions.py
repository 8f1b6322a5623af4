"""The functions of a graph: those that it came with, and those that a rewrite makes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import function_pb2, graph_pb2, node_def_pb2
from tensorflow.python.framework import func_graph as func_graph_lib
from tensorflow.python.framework import (
    function_def_to_graph,
    graph_to_function_def,
    importer,
)

from tfspark.graphdef.nodes import called_functions, full
from tfspark.graphdef.randomness import RANDOM_OPS


class Library:
    """The functions of a source graph, and those written anew for the pure one."""

    def __init__(self, graph: tf.Graph):
        self.graph = graph
        self.source = {f.signature.name: f for f in graph.as_graph_def().library.function}
        self.new: dict[str, function_pb2.FunctionDef] = {}
        self._graphs: dict[str, func_graph_lib.FuncGraph] = {}
        self._random: dict[str, bool] = {}

    def body(self, name: str) -> func_graph_lib.FuncGraph:
        """A function of the source as a graph."""
        if name not in self._graphs:
            with self.graph.as_default():
                self._graphs[name] = function_def_to_graph.function_def_to_graph(self.source[name])
        return self._graphs[name]

    def is_random(self, name: str) -> bool:
        """Whether a function of the source, or one that it calls, draws random numbers."""
        if name not in self._random:
            self._random[name] = False
            self._random[name] = any(
                node.op in RANDOM_OPS or any(self.is_random(f) for f in called_functions(node))
                for node in self.source[name].node_def
            )
        return self._random[name]

    def closure(self, nodes: Iterable[node_def_pb2.NodeDef]) -> list[function_pb2.FunctionDef]:
        """The functions that nodes call, and those that these call."""
        found: dict[str, function_pb2.FunctionDef] = {}
        pending = [name for node in nodes for name in called_functions(node)]
        while pending:
            name = pending.pop()
            if name not in found:
                found[name] = self.new.get(name) or self.source[name]
                pending += [f for node in found[name].node_def for f in called_functions(node)]
        return list(found.values())

    def add(self, stem: str, nodes: list[node_def_pb2.NodeDef], outputs: Sequence[str]) -> str:
        """Makes a function of nodes, whose placeholders `arg0`, `arg1`… are the arguments."""
        definition = graph_pb2.GraphDef(node=nodes)
        definition.versions.CopyFrom(self.graph.graph_def_versions)
        definition.library.function.extend(self.closure(nodes))
        with tf.Graph().as_default() as graph:
            importer.import_graph_def(definition, name="")
            arguments = [
                graph.get_tensor_by_name(f"{node.name}:0")
                for node in nodes
                if node.op == "Placeholder"
            ]
            results = [tf.identity(graph.get_tensor_by_name(full(o))) for o in outputs]
        function = graph_to_function_def.graph_to_function_def(
            graph, graph.get_operations(), arguments, results
        )
        # TensorFlow knows functions by name, process-wide: equal names must mean equal functions.
        digest = hashlib.sha256(function.SerializeToString(deterministic=True)).hexdigest()
        name = f"{stem[:80]}_{digest[:16]}"
        function.signature.name = name
        self.new[name] = function
        return name


def trace_graph(
    function: Callable[..., Any], signature: Sequence[tf.TensorSpec], ordered: bool = True
) -> Any:
    """A FuncGraph of a function of tensors, in whatever eager mode the process is.

    Args:
        function: called with one symbolic tensor per entry of `signature`.
        signature: dtypes and shapes.
        ordered: put the effects of stateful operations in program order; not for a function that
            only calls pure graphs, whose v1 loops must not get more control edges.
    """
    return func_graph_lib.func_graph_from_py_func(
        "traced", function, args=tuple(signature), kwargs={}, add_control_dependencies=ordered
    )
