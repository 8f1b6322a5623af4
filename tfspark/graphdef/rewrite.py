"""The walk that turns a graph with variables and randomness into nodes of a pure graph.

Every tensor of the source graph becomes one of three things: a tensor of the new graph, by name, or
a `Handle` or a `Table`, which stand for a variable or a lookup table and have no counterpart in the
new graph. What a table is asked becomes a search among constants (`tables.py`). Reading through a
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

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import node_def_pb2

from tfspark.errors import ProgramError
from tfspark.graphdef.functions import Library, trace_graph
from tfspark.graphdef.nodes import ancestors, inputs_of, prune, topological
from tfspark.graphdef.randomness import RANDOM_OPS, next_iteration, stateless
from tfspark.graphdef.tables import Table

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


Value = str | Handle | Table


class Emitter:
    """One graph under construction: the pure graph itself, or the body of one of its functions.

    Attributes:
        library, variables: shared by all emitters of one rewrite.
        nodes: of the new graph, by name.
        versions: of each variable, oldest first: (mask of the write, tensor).
        seed: the int64 `[2]` tensor that randomness comes from, if there is one.
    """

    def __init__(self, library: Library, variables: Sequence[VariableInput], seed: str | None):
        self.library = library
        self.variables = variables
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
        operations = list(ancestors(roots).values())
        if not prefix:
            self._keeps_control = any(op.type in V1_CONTROL_FLOW for op in operations)
        walk = _Walk(self, dict(known), prefix, mask, anchors)
        for op in topological(operations):
            walk.visit(op)
        return walk

    def _unique(self, name: str) -> str:
        name = _valid(name)
        candidate, count = name, 0
        while candidate in self.nodes:
            count += 1
            candidate = f"{name}_{count}"
        return candidate

    def _node(self, kind: str, name: str, inputs: Sequence[str] = ()) -> node_def_pb2.NodeDef:
        node = node_def_pb2.NodeDef(op=kind, name=name, input=inputs)
        self.nodes[name] = node
        return node


def _valid(name: str) -> str:
    """A name as GraphDef allows it; a variable or a layer may have any, such as `_stem`."""
    name = re.sub(r"[^A-Za-z0-9_.\\/>-]", "_", name)
    return name if re.match(r"[A-Za-z0-9.]", name) else f"node{name}"


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
        self.variables = emitter.variables
        self.values = values
        self.prefix = prefix
        self.mask = mask  # of all writes so far: what follows a call depends on them
        self._base = mask
        self._anchors = anchors
        self._masks: dict[str, int] = {}
        self._controls: dict[str, tuple[str, ...]] = {}

    def visit(self, op: Any) -> None:
        """Emits one operation; its inputs were visited before, except around v1 loops."""
        masks = [self._masks.get(x.name, self._base) for x in inputs_of(op)]
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
        if isinstance(value, Table):
            raise ProgramError(
                "A lookup table must not be used inside control flow, or changed. Received: "
                f"operation {self.prefix}{op.name!r} of type {op.type} on one. Look keys up before "
                "the condition or the loop."
            )
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
        elif inputs and isinstance(inputs[0], Table):
            self._look_up(op, inputs[0], inputs)
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
            if isinstance(value, str):
                controls |= self.emitter.control(value)
        return tuple(sorted(controls))

    def _pass_on(self, op: Any, kind: str, handle: Handle, inputs: Sequence[Value]) -> None:
        """A v1 Switch or Enter of a handle becomes one of the value."""
        node = self._copy(op, [self.read(op, value) for value in inputs], kind=kind)
        dtype = self.variables[handle.variable].dtype
        node.attr["T"].type = dtype.base_dtype.as_datatype_enum
        for tensor in op.outputs:
            self.values[tensor.name] = Handle(handle.variable, str(self.values[tensor.name]))

    def _read(self, op: Any, handle: Handle, inputs: Sequence[Value]) -> None:
        value = self.read(op, handle)
        if op.type == "ReadVariableOp":
            self._alias(op, value)
        elif op.type == "VariableShape":
            node = self._copy(op, [value], kind="Shape")
            dtype = self.variables[handle.variable].dtype
            node.attr["T"].type = dtype.base_dtype.as_datatype_enum
        elif op.type == "ResourceGatherNd":
            self.values[op.outputs[0].name] = self._inline(op, tf.gather_nd, inputs)
        else:
            batch_dims = op.get_attr("batch_dims")
            self.values[op.outputs[0].name] = self._inline(
                op, lambda v, i: tf.gather(v, i, batch_dims=batch_dims), inputs
            )

    def _look_up(self, op: Any, table: Table, inputs: Sequence[Value]) -> None:
        if op.type == "Identity":
            self._alias(op, table)
        elif op.type == "LookupTableFindV2":
            find = table.find(op.get_attr("Tin"), op.get_attr("Tout"))
            self.values[op.outputs[0].name] = self._inline(op, find, inputs)
        else:
            raise ProgramError(
                "A program's graph looks keys up in its tables, and nothing else. "
                f"Received: operation {self.prefix}{op.name!r} of type {op.type}. Make and fill "
                "tables before, outside of the function."
            )

    def _assign(self, op: Any, handle: Handle, inputs: Sequence[Value]) -> None:
        name = self.prefix + op.name
        if op.type in _ASSIGNMENTS:
            combine = _ASSIGNMENTS[op.type]
            new = self.read(op, inputs[1])
            if combine is not None:
                dtype = self.variables[handle.variable].dtype
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
            name = self.variables[handle.variable].name
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
        pairs = [(t, v) for t, v in zip_longest(op.inputs, inputs) if not isinstance(v, Table)]
        tensors = [
            self._versions(v)[-1][1] if newest and isinstance(v, Handle) else self.read(op, v)
            for _, v in pairs
        ]
        specs = []
        for tensor, value in pairs:
            if tensor is None:
                specs.append(tf.TensorSpec([2], tf.int64))  # only a seed has no input of its own
            elif isinstance(value, Handle):
                variable = self.variables[value.variable]
                specs.append(tf.TensorSpec(variable.shape, variable.dtype.base_dtype))
            else:
                specs.append(tf.TensorSpec(tensor.shape, tensor.dtype.base_dtype))
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
        inner = Emitter(self.library, self.variables, None)
        known: dict[str, Value] = {}
        for i, (tensor, value) in enumerate(zip(source.inputs, inputs, strict=True)):
            if isinstance(value, Handle):
                variable = self.variables[value.variable]
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
            inner.final(value.variable) if isinstance(value, Handle) else str(value)
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
        tensors = [self.read(op, value) for value in inputs]
        bodies = [self._function(name, inputs[1:], (), seeded) for name in names]
        written = sorted(set[int]().union(*(body.written for body in bodies)))
        for body in bodies:
            body.outputs += [body.emitter.final(variable) for variable in written]
        functions = [body.finish(self.library) for body in bodies]
        if seeded:
            tensors.append(self._need_seed(op.name))
        kind = op.type if op.type.startswith("Stateless") else f"Stateless{op.type}"
        node = self._copy(op, tensors, kind=kind)
        variables = [self.variables[variable] for variable in written]
        _set_types(node.attr["Tin"], op.inputs[1:], inputs[1:], self.variables, seeded)
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
        tensors = [self.read(op, value) for value in inputs]
        condition = self._function(names[0], inputs, shapes, seeded)
        body = self._function(names[1], inputs, shapes, seeded)
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
        _set_types(node.attr["T"], op.inputs, inputs, self.variables, seeded)
        del node.attr["output_shapes"].list.shape[:]
        for shape, value in zip(shapes, inputs, strict=True):
            handle = isinstance(value, Handle)
            kept = self.variables[value.variable].shape if handle else shape  # type: ignore[union-attr]
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
        name = self.variables[handle.variable].name
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
