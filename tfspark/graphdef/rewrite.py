"""The walk that turns a graph with variables and randomness into nodes of a pure graph.

Every tensor of the source graph becomes one of two things: a tensor of the new graph, by name, or a
`Handle`, which stands for a variable and has no counterpart in the new graph. Reading through a
handle gives a *version* of the variable: the input it starts from, or what an assignment wrote.

Which version a read sees follows from the graph's edges alone: the newest one among those written
by the read's ancestors, over data and control edges. In a function, TensorFlow's automatic control
dependencies have already put reads and writes in program order, so the rule gives program order
there. In a TF1 graph, a read that does not depend on a write sees the value before it.
Assignments themselves follow one another in topological order, so that two unordered
`assign_add` both count.

Calls are inlined. Bodies of `If`, `Case` and `While` are rewritten as functions whose resource
arguments have become values; what they write comes back as an output. A seed, where a body draws
random numbers, is one more argument, and a loop changes it in every iteration.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import function_pb2, graph_pb2, node_def_pb2
from tensorflow.python.framework import func_graph as func_graph_lib
from tensorflow.python.framework import (
    function_def_to_graph,
    graph_to_function_def,
    importer,
    op_def_registry,
)

from tfspark.errors import ProgramError
from tfspark.graphdef.randomness import RANDOM_OPS, next_iteration, stateless

CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
CONDITIONALS = frozenset({"If", "StatelessIf", "Case", "StatelessCase"})
LOOPS = frozenset({"While", "StatelessWhile"})
V1_CONTROL_FLOW = frozenset({"Switch", "Merge", "Enter", "Exit", "NextIteration", "LoopCond"})
PASSED_ON = frozenset({"Enter", "Switch", "Exit", "NextIteration"})
READS = frozenset({"ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableShape"})

_ASSIGNMENTS = {
    "AssignVariableOp": None,
    "AssignAddVariableOp": "AddV2",
    "AssignSubVariableOp": "Sub",
    "Assign": None,
    "AssignAdd": "AddV2",
    "AssignSub": "Sub",
}
_SCATTERS = {
    "ScatterUpdate": tf.tensor_scatter_nd_update,
    "ScatterAdd": tf.tensor_scatter_nd_add,
    "ScatterSub": tf.tensor_scatter_nd_sub,
    "ScatterMin": tf.tensor_scatter_nd_min,
    "ScatterMax": tf.tensor_scatter_nd_max,
}
_SCATTERS |= {f"Resource{name}": function for name, function in _SCATTERS.items()}
_ND_SCATTERS = {name.replace("Scatter", "ScatterNd"): f for name, f in _SCATTERS.items()}

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


@dataclass(frozen=True)
class Handle:
    """A variable, as a tensor of the source graph refers to it.

    Attributes:
        variable: its index among the variables of the rewrite.
        value: the tensor that holds its value where a Switch or Enter has fixed it, else None.
    """

    variable: int
    value: str | None = None


@dataclass(frozen=True)
class VariableInput:
    """A variable that becomes an input.

    Attributes:
        name: for messages, and for the input.
        dtype: of its value.
        shape: of its value.
        handles: the tensors of the source graph that refer to it: handles, or references.
    """

    name: str
    dtype: tf.DType
    shape: tf.TensorShape
    handles: tuple[Any, ...]


Value = str | Handle


class Library:
    """The functions of a source graph, and those written anew for the pure one."""

    def __init__(self, graph: tf.Graph, variables: Sequence[VariableInput]):
        self.graph = graph
        self.variables = variables
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


class Emitter:
    """One graph under construction: the pure graph itself, or the body of one of its functions.

    Attributes:
        library: shared by all emitters of one rewrite.
        nodes: of the new graph, by name.
        versions: of each variable, oldest first: (mask of the write, tensor).
        seed: the int64 `[2]` tensor that randomness comes from, if there is one.
    """

    def __init__(self, library: Library, seed: str | None):
        self.library = library
        self.nodes: dict[str, node_def_pb2.NodeDef] = {}
        self.versions: dict[int, list[tuple[int, str]]] = {}
        self.seed = seed
        self._writes = 0
        self._keeps_control = False

    def placeholder(self, name: str, dtype: tf.DType, shape: tf.TensorShape) -> str:
        """Adds an input and returns its tensor."""
        node = self._node("Placeholder", self._unique(name))
        node.attr["dtype"].type = dtype.base_dtype.as_datatype_enum
        node.attr["shape"].shape.CopyFrom(shape.as_proto())
        return node.name

    def variable(self, index: int, variable: VariableInput) -> str:
        """Adds the input of a variable, its first version."""
        name = self.placeholder(f"{variable.name}.value", variable.dtype, variable.shape)
        self.versions[index] = [(0, name)]
        return name

    def constant(self, name: str, value: Any, dtype: tf.DType) -> str:
        """Adds a constant and returns its tensor."""
        value = value.numpy() if hasattr(value, "numpy") else value
        node = self._node("Const", self._unique(name))
        node.attr["dtype"].type = dtype.as_datatype_enum
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value, dtype))
        return node.name

    def control(self, tensor: str) -> set[str]:
        """A control input that waits for a tensor; none for an input, which is always there."""
        name = tensor.split(":")[0]
        waits = name not in self.nodes or self.nodes[name].op != "Placeholder"
        return {f"^{name}"} if waits else set()

    def final(self, variable: int) -> str:
        """The newest version of a variable."""
        return self.versions[variable][-1][1]

    def walk(
        self,
        roots: Iterable[Any],
        known: dict[str, Value],
        prefix: str = "",
        mask: int = 0,
        anchors: tuple[str, ...] = (),
    ) -> _Walk:
        """Emits what the root operations need.

        Args:
            roots: operations of one source graph.
            known: what some of its tensors have become already, by name.
            prefix: of the new nodes' names.
            mask: the writes that precede the whole walk.
            anchors: control inputs of operations without inputs, where v1 control flow needs them.
        """
        operations = _needed(roots)
        if not prefix:
            self._keeps_control = any(op.type in V1_CONTROL_FLOW for op in operations)
        walk = _Walk(self, dict(known), prefix, mask, anchors)
        for op in _topological(operations):
            walk.visit(op)
        return walk

    def _unique(self, name: str) -> str:
        candidate, count = name, 0
        while candidate in self.nodes:
            count += 1
            candidate = f"{name}_{count}"
        return candidate

    def _node(self, kind: str, name: str, inputs: Sequence[str] = ()) -> node_def_pb2.NodeDef:
        node = node_def_pb2.NodeDef(op=kind, name=name, input=inputs)
        self.nodes[name] = node
        return node


class _Walk:
    """The state of walking one source graph: the graph itself, or one call of a function."""

    def __init__(
        self,
        emitter: Emitter,
        values: dict[str, Value],
        prefix: str,
        mask: int,
        anchors: tuple[str, ...],
    ):
        self.emitter = emitter
        self.library = emitter.library
        self.values = values
        self.prefix = prefix
        self.mask = mask  # of all writes so far: what follows a call depends on them
        self._base = mask
        self._anchors = anchors
        self._masks: dict[str, int] = {}
        self._controls: dict[str, tuple[str, ...]] = {}

    def visit(self, op: Any) -> None:
        """Emits one operation; its inputs were visited before, except around v1 loops."""
        masks = [self._masks.get(x.name, self._base) for x in _inputs(op)]
        before = self._base
        for mask in masks:
            before |= mask
        self._masks[op.name] = before
        if all(tensor.name in self.values for tensor in op.outputs) and op.outputs:
            self._controls[op.name] = ()  # an input of the rewrite is always there
            return
        self._dispatch(op)
        self.mask |= self._masks[op.name]
        if self.emitter._keeps_control:
            self._controls[op.name] = self._control_of(op)

    def read(self, op: Any, value: Value) -> str:
        """The tensor behind a value, as `op` sees it."""
        if isinstance(value, str):
            return value
        if value.value is not None:
            return value.value
        mask = self._masks[op.name]
        return next(t for bits, t in reversed(self._versions(value)) if bits & mask == bits)

    def _versions(self, handle: Handle) -> list[tuple[int, str]]:
        return self.emitter.versions[handle.variable]

    def _dispatch(self, op: Any) -> None:
        kind = op.type
        plain = kind.removeprefix("Ref") if kind.startswith("Ref") else kind
        inputs = [self.value(tensor) for tensor in op.inputs]
        handle = inputs[0] if inputs and isinstance(inputs[0], Handle) else None
        if kind in CALLS:
            self._inline_call(op, inputs)
        elif kind in CONDITIONALS:
            self._conditional(op, inputs)
        elif kind in LOOPS:
            self._loop(op, inputs)
        elif kind in RANDOM_OPS:
            self._random(op, inputs)
        elif kind == "Print":
            self._alias(op, inputs[0])
        elif handle is None:
            self._copy(op, [self.read(op, value) for value in inputs])
        elif plain in PASSED_ON:
            self._pass_on(op, plain, handle, inputs)
        elif kind in READS:
            self._read(op, handle, inputs)
        elif kind in _ASSIGNMENTS or kind in _SCATTERS or kind in _ND_SCATTERS:
            self._assign(op, handle, inputs)
        elif kind == "ResourceStridedSliceAssign":
            raw = _raw(
                op,
                "TensorStridedSliceUpdate",
                "begin_mask end_mask ellipsis_mask new_axis_mask shrink_axis_mask",
            )
            names = ("input", "begin", "end", "strides", "value")
            self._write(
                op,
                handle,
                self._inline(op, lambda *x: raw(**dict(zip(names, x, strict=True))), inputs),
            )
        elif kind in ("VarIsInitializedOp", "IsVariableInitialized"):
            self.values[op.outputs[0].name] = self._inline(op, lambda _: tf.constant(True), inputs)
        elif kind == "Identity" and op.inputs[0].dtype == tf.resource:
            self._alias(op, handle)
        elif op.inputs[0].dtype == tf.resource:
            self._refuse(op, handle)
        else:
            self._copy(op, [self.read(op, value) for value in inputs], kind=plain)

    def value(self, tensor: Any) -> Value:
        """What a tensor of the source graph has become."""
        if tensor.name in self.values:
            return self.values[tensor.name]
        # Only the back edge of a v1 loop is not known yet; its node will have this name.
        index = f":{tensor.value_index}" if tensor.value_index else ""
        return f"{self.prefix}{tensor.op.name}{index}"

    def _alias(self, op: Any, value: Value) -> None:
        self.values[op.outputs[0].name] = value

    def _copy(self, op: Any, inputs: Sequence[str], kind: str | None = None) -> Any:
        node = self.emitter._node(kind or op.type, self.prefix + op.name, inputs)
        for name, attr in op.node_def.attr.items():
            if not name.startswith("_") or name == "_lower_using_switch_merge":
                node.attr[name].CopyFrom(attr)
        if self.emitter._keeps_control:
            controls = {c for x in op.control_inputs for c in self._controls[x.name]}
            if not controls and not inputs:
                controls = set(self._anchors)
            node.input.extend(sorted(controls))
        self._define(op, node)
        return node

    def _define(self, op: Any, node: Any) -> None:
        for tensor in op.outputs:
            index = f":{tensor.value_index}" if tensor.value_index else ""
            self.values.setdefault(tensor.name, node.name + index)

    def _control_of(self, op: Any) -> tuple[str, ...]:
        """What to depend on instead of `op`: what is left of it in the new graph."""
        name = self.prefix + op.name
        if name in self.emitter.nodes and op.outputs:
            return (f"^{name}",)
        self.emitter.nodes.pop(name, None)  # an operation without outputs: only its effect counted
        controls = {c for x in op.control_inputs for c in self._controls[x.name]}
        for tensor in op.inputs:
            value = self.values.get(tensor.name)
            value = value.value if isinstance(value, Handle) else value
            if value is not None:
                controls |= self.emitter.control(value)
        return tuple(sorted(controls))

    def _pass_on(self, op: Any, kind: str, handle: Handle, inputs: Sequence[Value]) -> None:
        """A v1 Switch or Enter of a handle becomes one of the value."""
        node = self._copy(op, [self.read(op, value) for value in inputs], kind=kind)
        dtype = self.library.variables[handle.variable].dtype
        node.attr["T"].type = dtype.base_dtype.as_datatype_enum
        for tensor in op.outputs:
            self.values[tensor.name] = Handle(handle.variable, str(self.values[tensor.name]))

    def _read(self, op: Any, handle: Handle, inputs: Sequence[Value]) -> None:
        value = self.read(op, handle)
        if op.type == "ReadVariableOp":
            self._alias(op, value)
        elif op.type == "VariableShape":
            node = self._copy(op, [value], kind="Shape")
            dtype = self.library.variables[handle.variable].dtype
            node.attr["T"].type = dtype.base_dtype.as_datatype_enum
        elif op.type == "ResourceGatherNd":
            self.values[op.outputs[0].name] = self._inline(op, tf.gather_nd, inputs)
        else:
            batch_dims = op.get_attr("batch_dims")
            self.values[op.outputs[0].name] = self._inline(
                op, lambda v, i: tf.gather(v, i, batch_dims=batch_dims), inputs
            )

    def _assign(self, op: Any, handle: Handle, inputs: Sequence[Value]) -> None:
        name = self.prefix + op.name
        if op.type in _ASSIGNMENTS:
            combine = _ASSIGNMENTS[op.type]
            new = self.read(op, inputs[1])
            if combine is not None:
                dtype = self.library.variables[handle.variable].dtype
                base = self._versions(handle)[-1][1]
                node = self.emitter._node(combine, self.emitter._unique(name), [base, new])
                node.attr["T"].type = dtype.base_dtype.as_datatype_enum
                new = node.name
        elif op.type in _SCATTERS:
            scatter = _SCATTERS[op.type]

            def rows(value: Any, indices: Any, updates: Any) -> Any:
                shape = tf.concat([tf.shape(indices), tf.shape(value)[1:]], 0)
                return scatter(value, indices[..., None], tf.broadcast_to(updates, shape))

            new = self._inline(op, rows, [Handle(handle.variable), *inputs[1:]], newest=True)
        else:
            new = self._inline(
                op, _ND_SCATTERS[op.type], [Handle(handle.variable), *inputs[1:]], newest=True
            )
        self._write(op, handle, new)
        for tensor in op.outputs:  # a reference variable's assignment returns the reference
            self.values[tensor.name] = Handle(handle.variable)

    def _write(self, op: Any, handle: Handle, new: str) -> None:
        if handle.value is not None:
            name = self.library.variables[handle.variable].name
            raise ProgramError(
                "A variable must not be assigned inside tf.compat.v1.cond or while_loop. "
                f"Received: operation {op.name!r} ({op.type}) assigns {name!r} there. Assign it "
                "outside, or call tf.compat.v1.enable_control_flow_v2() before building the graph."
            )
        bit = 1 << self.emitter._writes
        self.emitter._writes += 1
        self._masks[op.name] |= bit
        self._versions(handle).append((bit, new))

    def _inline_call(self, op: Any, inputs: Sequence[Value]) -> None:
        body = self.library.body(op.get_attr("f").name)
        self._splice(op, body, inputs)

    def _splice(self, op: Any, body: Any, inputs: Sequence[Value]) -> list[Value]:
        """Walks a function's graph in place of `op`."""
        known = {t.name: value for t, value in zip(body.inputs, inputs, strict=True)}
        roots = [t.op for t in body.outputs] + list(body.control_outputs)
        anchors = tuple(self._control_inputs(op, inputs)) if self.emitter._keeps_control else ()
        prefix = f"{self.prefix}{op.name}.inlined/"
        inner = self.emitter.walk(roots, known, prefix, self._masks[op.name], anchors)
        self._masks[op.name] |= inner.mask
        results = [inner.value(t) for t in body.outputs]
        for tensor, value in zip(op.outputs, results, strict=False):
            self.values[tensor.name] = value
        return results

    def _control_inputs(self, op: Any, inputs: Sequence[Value]) -> set[str]:
        controls = {c for x in op.control_inputs for c in self._controls[x.name]}
        return controls.union(*(self.emitter.control(self.read(op, value)) for value in inputs))

    def _inline(
        self, op: Any, function: Callable[..., Any], inputs: Sequence[Value], newest: bool = False
    ) -> str:
        """Traces a small function of tensors and walks it in place of `op`."""
        tensors = [
            self._versions(v)[-1][1] if newest and isinstance(v, Handle) else self.read(op, v)
            for v in inputs
        ]
        specs = []
        for tensor, value in zip(op.inputs, inputs, strict=False):
            if isinstance(value, Handle):
                variable = self.library.variables[value.variable]
                specs.append(tf.TensorSpec(variable.shape, variable.dtype.base_dtype))
            else:
                specs.append(tf.TensorSpec(tensor.shape, tensor.dtype.base_dtype))
        for _ in inputs[len(specs) :]:
            specs.append(tf.TensorSpec([2], tf.int64))  # only a seed has no input of its own
        body = trace_graph(function, specs)
        return str(self._splice(op, body, tensors)[0])

    def _random(self, op: Any, inputs: Sequence[Value]) -> None:
        seed = self._need_seed(op.name)
        function = stateless(op, salt=self.prefix + op.name)
        self.values[op.outputs[0].name] = self._inline(op, function, [*inputs, seed])

    def _need_seed(self, what: str) -> str:
        if self.emitter.seed is None:
            raise ProgramError(
                "This graph has no seed to draw random numbers from. "
                f"Received: {self.prefix}{what}, which draws some. Remove it."
            )
        return self.emitter.seed

    def _function(
        self, name: str, inputs: Sequence[Value], types: Sequence[Any], seeded: bool
    ) -> _Body:
        """Walks a body of control flow as a function of its own."""
        source = self.library.body(name)
        inner = Emitter(self.library, None)
        known: dict[str, Value] = {}
        for i, (tensor, value) in enumerate(zip(source.inputs, inputs, strict=True)):
            if isinstance(value, Handle):
                variable = self.library.variables[value.variable]
                argument = inner.placeholder(f"arg{i}", variable.dtype, variable.shape)
                inner.versions.setdefault(value.variable, [(0, argument)])
                known[tensor.name] = Handle(value.variable)
            else:
                shape = types[i] if types else tensor.shape
                known[tensor.name] = inner.placeholder(f"arg{i}", tensor.dtype, shape)
        if seeded:
            inner.seed = inner.placeholder(f"arg{len(inputs)}", tf.int64, tf.TensorShape([2]))
        roots = [t.op for t in source.outputs] + list(source.control_outputs)
        walk = inner.walk(roots, known, prefix="body/")
        outputs = [
            inner.final(value.variable) if isinstance(value, Handle) else value
            for value in map(walk.value, source.outputs)
        ]
        written = {v for v, versions in inner.versions.items() if len(versions) > 1}
        return _Body(name, inner, outputs, written)

    def _conditional(self, op: Any, inputs: Sequence[Value]) -> None:
        names = (
            [op.get_attr("then_branch").name, op.get_attr("else_branch").name]
            if op.type.endswith("If")
            else [branch.name for branch in op.get_attr("branches")]
        )
        seeded = any(map(self.library.is_random, names))
        bodies = [self._function(name, inputs[1:], (), seeded) for name in names]
        written = sorted(set[int]().union(*(body.written for body in bodies)))
        for body in bodies:
            body.outputs += [body.emitter.final(variable) for variable in written]
        functions = [body.finish(self.library) for body in bodies]
        tensors = [self.read(op, value) for value in inputs]
        if seeded:
            tensors.append(self._need_seed(op.name))
        kind = op.type if op.type.startswith("Stateless") else f"Stateless{op.type}"
        node = self._copy(op, tensors, kind=kind)
        variables = [self.library.variables[variable] for variable in written]
        _set_types(node.attr["Tin"], op.inputs[1:], inputs[1:], self.library.variables, seeded)
        node.attr["Tout"].list.type.extend(v.dtype.base_dtype.as_datatype_enum for v in variables)
        if node.attr["output_shapes"].list.shape:
            node.attr["output_shapes"].list.shape.extend(v.shape.as_proto() for v in variables)
        if kind == "StatelessIf":
            node.attr["then_branch"].func.name, node.attr["else_branch"].func.name = functions
        else:
            for branch, function in zip(node.attr["branches"].list.func, functions, strict=True):
                branch.name = function
        for i, variable in enumerate(written):
            self._write(op, Handle(variable), f"{node.name}:{len(op.outputs) + i}")

    def _loop(self, op: Any, inputs: Sequence[Value]) -> None:
        names = [op.get_attr("cond").name, op.get_attr("body").name]
        seeded = any(map(self.library.is_random, names))
        shapes = [tensor.shape for tensor in op.outputs]  # the loop's invariants
        condition = self._function(names[0], inputs, shapes, seeded)
        body = self._function(names[1], inputs, shapes, seeded)
        tensors = [self.read(op, value) for value in inputs]
        if seeded:
            assert body.emitter.seed is not None
            tensors.append(self._need_seed(op.name))
            graph = trace_graph(next_iteration, [tf.TensorSpec([2], tf.int64)])
            walk = body.emitter.walk(
                [graph.outputs[0].op], {graph.inputs[0].name: body.emitter.seed}, "seed/"
            )
            body.outputs.append(str(walk.value(graph.outputs[0])))
        node = self._copy(op, tensors, kind="StatelessWhile")
        node.attr["cond"].func.name = condition.finish(self.library)
        node.attr["body"].func.name = body.finish(self.library)
        _set_types(node.attr["T"], op.inputs, inputs, self.library.variables, seeded)
        del node.attr["output_shapes"].list.shape[:]
        for shape, value in zip(shapes, inputs, strict=True):
            handle = isinstance(value, Handle)
            kept = self.library.variables[value.variable].shape if handle else shape  # type: ignore[union-attr]
            node.attr["output_shapes"].list.shape.append(kept.as_proto())
        if seeded:
            node.attr["output_shapes"].list.shape.append(tf.TensorShape([2]).as_proto())
        written = set[int]()
        for i, value in enumerate(inputs):
            if isinstance(value, Handle):
                self.values[op.outputs[i].name] = Handle(value.variable)
                if value.variable in body.written and value.variable not in written:
                    written.add(value.variable)
                    self._write(op, value, f"{node.name}:{i}" if i else node.name)

    def _refuse(self, op: Any, handle: Handle) -> None:
        name = self.library.variables[handle.variable].name
        raise ProgramError(
            "A program's graph reads its variables and assigns, adds to or scatters into them. "
            f"Received: operation {self.prefix}{op.name!r} of type {op.type} on variable {name!r}."
        )


@dataclass
class _Body:
    """A rewritten body of control flow, before it is made a function."""

    name: str
    emitter: Emitter
    outputs: list[str]
    written: set[int]

    def finish(self, library: Library) -> str:
        """Adds it to the library and returns its name."""
        nodes = self.emitter.nodes
        arguments = [name for name, node in nodes.items() if node.op == "Placeholder"]
        return library.add(self.name, prune(nodes, [*arguments, *self.outputs]), self.outputs)


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


def _raw(op: Any, name: str, attributes: str) -> Callable[..., Any]:
    keywords = {attribute: op.get_attr(attribute) for attribute in attributes.split()}
    return lambda **tensors: getattr(tf.raw_ops, name)(**tensors, **keywords)


def _set_types(
    attr: Any,
    tensors: Sequence[Any],
    values: Sequence[Value],
    variables: Sequence[VariableInput],
    seeded: bool,
) -> None:
    dtypes = [
        variables[value.variable].dtype if isinstance(value, Handle) else tensor.dtype
        for tensor, value in zip(tensors, values, strict=True)
    ]
    del attr.list.type[:]
    attr.list.type.extend(dtype.base_dtype.as_datatype_enum for dtype in dtypes)
    if seeded:
        attr.list.type.append(tf.int64.as_datatype_enum)


def _inputs(op: Any) -> list[Any]:
    return [tensor.op for tensor in op.inputs] + list(op.control_inputs)


def _needed(roots: Iterable[Any]) -> list[Any]:
    seen: dict[str, Any] = {}
    pending = list(roots)
    while pending:
        op = pending.pop()
        if op.name not in seen:
            seen[op.name] = op
            pending += _inputs(op)
    return list(seen.values())


def _topological(operations: Sequence[Any]) -> list[Any]:
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
            x.name for x in _inputs(op) if x.type not in ("NextIteration", "RefNextIteration")
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
