"""Turns a graph with variables into a pure one: their values go in, their new values come out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import function_pb2, graph_pb2

from tfspark.graphdef.functions import Library, trace_graph
from tfspark.graphdef.nodes import check_pure, full, prune
from tfspark.graphdef.pure import PureGraph, TensorInfo
from tfspark.graphdef.rewrite import Emitter, Handle, Value, VariableInput
from tfspark.graphdef.tables import Table


@dataclass(frozen=True)
class Purified:
    """A pure graph and what it does with the variables it was made from.

    Attributes:
        graph: inputs: those of the source, then the value of each variable. Outputs: those of the
            source, then the new value of each variable.
        variables: the `tf.Variable`s (or, from `purify`, the `VariableInput`s) in this order.
        written: for each variable, whether the source assigns it.
    """

    graph: PureGraph
    variables: tuple[Any, ...]
    written: tuple[bool, ...]


def trace(
    function: Callable[..., Any],
    signature: Sequence[tf.TensorSpec],
    variables: Sequence[Any] = (),
    *,
    seeded: bool = False,
    allow: frozenset[str] = frozenset(),
) -> Purified:
    """Traces a function of tensors and variables into a pure graph.

    Works in every eager mode. Reads and writes of variables take effect in program order. Stateful
    random operations (`tf.random.uniform`, `tf.nn.dropout` …) become stateless ones.

    Args:
        function: called with one tensor per entry of `signature`; returns a structure of tensors,
            which is flattened.
        signature: dtypes and shapes.
        variables: `tf.Variable` or Keras variables, which become the first variable inputs.
            Others that the function uses follow in the order of their first use.
        seeded: the last input is a seed, int64 `[2]`, from which random operations draw.
        allow: types of stateful operations to let through.

    Raises:
        ProgramError: an operation is neither pure nor a variable's; names it and the remedy.

    Example:
        >>> from tfspark.graphdef.loader import load
        >>> count = tf.Variable(3.0)
        >>> pure = trace(lambda x: x * count.assign_add(1.0), [tf.TensorSpec([])], [count]).graph
        >>> [float(y) for y in load(pure)(np.float32(2.0), np.float32(3.0))]
        [8.0, 4.0]
    """
    graph = trace_graph(function, signature)
    return purify_function(graph, variables, seeded=seeded, allow=allow)


def purify_function(
    graph: Any,
    variables: Sequence[Any] = (),
    *,
    seeded: bool = False,
    allow: frozenset[str] = frozenset(),
) -> Purified:
    """Like `trace`, for a FuncGraph traced with automatic control dependencies."""
    listed = [tensorflow_variable(variable) for variable in variables]
    found = {id(v.handle): v for v in [*listed, *graph.variables]}
    order = list(dict.fromkeys(id(variable.handle) for variable in listed))
    handles: dict[int, list[Any]] = {key: [] for key in found}
    constants: dict[str, Any] = {}
    tables: dict[str, Table] = {}
    captured = set()
    for external, internal in graph.captures:
        captured.add(internal.name)
        if internal.dtype != tf.resource:
            constants[internal.name] = external
        elif id(external) not in found:
            tables[internal.name] = Table(external)
        else:
            handles[id(external)].append(internal)
            if id(external) not in order:
                order.append(id(external))
    slots = [
        VariableInput(
            found[key].name.split(":")[0], found[key].dtype, found[key].shape, tuple(handles[key])
        )
        for key in order
    ]
    inputs = [tensor for tensor in graph.inputs if tensor.name not in captured]
    purified = purify(
        graph,
        inputs,
        [tensor for tensor in graph.outputs if tensor is not None],
        slots,
        updates=graph.control_outputs,
        seed=inputs[-1] if seeded else None,
        constants=constants,
        tables=tables,
        allow=allow,
    )
    return Purified(purified.graph, tuple(found[key] for key in order), purified.written)


def purify(
    graph: tf.Graph,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    variables: Sequence[VariableInput],
    *,
    updates: Sequence[Any] = (),
    seed: Any = None,
    constants: Mapping[str, Any] | None = None,
    tables: Mapping[str, Table] | None = None,
    allow: frozenset[str] = frozenset(),
) -> Purified:
    """Makes a pure graph of a part of a graph with variables.

    Args:
        graph: a graph or FuncGraph; it stays as it is.
        inputs: tensors of the graph that become the first inputs; need not be placeholders.
        outputs: tensors of the graph that become the first outputs.
        variables: become the other inputs, and, with their new values, the other outputs.
        updates: operations that take effect even where no output depends on them.
        seed: one of `inputs`, an int64 `[2]`, from which random operations draw; None: none may.
        constants: values (arrays or eager tensors) for tensors of the graph, by name.
        tables: the lookup tables that tensors of the graph refer to, by name.
        allow: types of stateful operations to let through.

    Raises:
        ProgramError: an operation is neither pure nor a variable's; names it and the remedy.
    """
    library = Library(graph)
    emitter = Emitter(library, variables, None)
    known: dict[str, Value] = dict(tables or {})
    names = []
    for tensor in inputs:
        stem = tensor.name.split(":")[0]
        names.append(emitter.placeholder(stem, tensor.dtype, tensor.shape))
        known[tensor.name] = names[-1]
    if seed is not None:
        emitter.seed = str(known[seed.name])
    for name, value in (constants or {}).items():
        tensor = graph.get_tensor_by_name(name)
        known[name] = emitter.constant(name.split(":")[0], value, tensor.dtype.base_dtype)
    for index, variable in enumerate(variables):
        names.append(emitter.variable(index, variable))
        for handle in variable.handles:
            known[handle.name] = Handle(index)
    walk = emitter.walk([tensor.op for tensor in outputs] + list(updates), known)
    results = [walk.read(tensor.op, walk.value(tensor)) for tensor in outputs]
    results += [emitter.final(index) for index in range(len(variables))]
    nodes = prune(emitter.nodes, [*results, *names])
    functions = library.closure(nodes)
    check_pure([*nodes, *(node for f in functions for node in f.node_def)], allow)
    definition = graph_pb2.GraphDef(node=nodes, versions=graph.graph_def_versions)
    definition.library.function.extend(functions)
    return Purified(
        pure_graph(definition, names, results),
        tuple(variables),
        tuple(len(emitter.versions[index]) > 1 for index in range(len(variables))),
    )


def pure_graph(definition: Any, inputs: Sequence[str], outputs: Sequence[str]) -> PureGraph:
    """A PureGraph of a GraphDef, with dtypes and shapes as TensorFlow infers them."""
    definition = _with_own_functions(definition)
    with tf.Graph().as_default() as graph:
        tf.graph_util.import_graph_def(definition, name="")

    def info(name: str, tensor: Any) -> TensorInfo:
        shape = None if tensor.shape.rank is None else tuple(tensor.shape.as_list())
        return TensorInfo(name, tensor.dtype.base_dtype.name, shape)

    return PureGraph(
        definition.SerializeToString(deterministic=True),
        tuple(info(name, graph.get_tensor_by_name(full(name))) for name in inputs),
        tuple(info(full(name), graph.get_tensor_by_name(full(name))) for name in outputs),
    )


def _with_own_functions(definition: Any) -> Any:
    """A copy whose functions are called by what they do.

    TensorFlow knows functions by name, process-wide, and forgets those that it traced itself when
    their graphs are gone. So a pure graph must not share a name with a traced function, and equal
    names must mean equal functions.
    """
    source = {function.signature.name: function for function in definition.library.function}
    renamed: dict[str, Any] = {}

    def rename(nodes: Any) -> None:
        for node in nodes:
            for attr in node.attr.values():
                called = [attr.func] if attr.WhichOneof("value") == "func" else attr.list.func
                for function in called:
                    if function.name in source:
                        function.name = own(function.name)

    def own(name: str) -> str:
        if name not in renamed:
            function = renamed[name] = function_pb2.FunctionDef()
            function.CopyFrom(source[name])
            rename(function.node_def)
            function.signature.name = ""
            digest = hashlib.sha256(function.SerializeToString(deterministic=True)).hexdigest()
            function.signature.name = f"{name[:80]}_{digest[:16]}"
        return renamed[name].signature.name

    result = graph_pb2.GraphDef()
    result.CopyFrom(definition)
    rename(result.node)
    del result.library.function[:]
    result.library.function.extend(renamed.values())
    return result


def call(pure: PureGraph, tensors: Sequence[Any]) -> list[Any]:
    """Adds a pure graph to the graph that is being built, and returns its outputs.

    Args:
        pure: the graph.
        tensors: of the current graph, one per input.
    """
    definition = graph_pb2.GraphDef.FromString(pure.graph_def)
    # XLA compiles no placeholder, not even one that nothing reads any more.
    names = {info.name for info in pure.inputs}
    nodes = [node for node in definition.node if node.name not in names]
    del definition.node[:]
    definition.node.extend(nodes)
    read = {full(x) for node in nodes for x in node.input} | {o.name for o in pure.outputs}
    return tf.graph_util.import_graph_def(
        definition,
        input_map={
            full(info.name): tf.convert_to_tensor(tensor, info.dtype)
            for info, tensor in zip(pure.inputs, tensors, strict=True)
            if full(info.name) in read
        },
        return_elements=[info.name for info in pure.outputs],
        name="pure",
    )


def tensorflow_variable(variable: Any) -> Any:
    """The `tf.Variable` behind a Keras variable, or the `tf.Variable` itself."""
    return variable if isinstance(variable, tf.Variable) else variable.value
