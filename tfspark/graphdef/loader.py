"""Loads pure graphs as functions that can be called."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2, graph_pb2
from tensorflow.python.eager import context
from tensorflow.python.eager.polymorphic_function import atomic_function
from tensorflow.python.framework import ops

from tfspark.graphdef.functions import trace_graph
from tfspark.graphdef.pure import PureGraph
from tfspark.graphdef.variables import call

Loaded = Callable[..., list[tf.Tensor]]
HandOver = Callable[[int, "list[np.ndarray]"], None]

_numbers = itertools.count()  # TensorFlow's functions need names of their own


def configure_threads(cores: int, hands_over: bool = False) -> None:
    """Gives TensorFlow in this process as many threads as its task has cores.

    Without it each task of an executor would start a pool over all cores of the machine. It does
    nothing once TensorFlow has run an operation in this process, and what the user set in
    `TF_NUM_INTRAOP_THREADS` or `TF_NUM_INTEROP_THREADS` stays.

    Args:
        cores: of one task.
        hands_over: whether it calls graphs of `load_in_parts`, which need a thread to hand over a
            part in while others compute.
    """
    # TensorFlow reads these when it creates its devices, not when it is imported.
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(cores))
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", str(cores + hands_over))


def load(pure: PureGraph, jit_compile: bool = False) -> Loaded:
    """A pure graph as a function; the same one for equal graphs.

    Args:
        pure: the graph.
        jit_compile: compile it with XLA at its first call, and anew for every new shape.

    Returns:
        A function of one array or tensor per input, positional, which returns a list of eager
        tensors. Arrays must have the dtypes of `pure.inputs`; where their memory is aligned
        (`aligned_empty`) TensorFlow reads it in place, so an output may share memory with an
        input. It works in every eager mode, and a process keeps the 32 graphs it used last.
    """
    return _load(_Key(pure, jit_compile))


class _Key:
    """Compares by fingerprint, so that the cache does not hash and compare whole graphs."""

    def __init__(self, pure: PureGraph, jit_compile: bool):
        self.pure = pure
        self.jit_compile = jit_compile
        self._key = (pure.fingerprint, jit_compile)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._key == other._key


def load_in_parts(pure: PureGraph, parts: Sequence[range]) -> Loaded:
    """A pure graph as a function that hands over some outputs as soon as they are computed.

    Args:
        pure: the graph.
        parts: outputs of the graph that are handed over together, by index.

    Returns:
        A function `run(hand_over, *inputs)`, see `load`, which returns the outputs that are in no
        part, in their order. Meanwhile `hand_over(part, arrays)` is called once for every part, in
        threads of TensorFlow: it must not raise, and the arrays are good until it returns. Not for
        two threads at once.
    """
    if len(parts) == 1:  # nothing is computed meanwhile that one could be ahead of
        (part,) = parts
        whole = load(pure)

        def run_whole(hand_over: HandOver, *inputs: Any) -> list[tf.Tensor]:
            outputs = whole(*inputs)
            hand_over(0, [array_of(each) for each in outputs[part.start : part.stop]])
            return outputs[: part.start] + outputs[part.stop :]

        return run_whole

    receiver: list[HandOver] = []
    rest = sorted(set(range(len(pure.outputs))).difference(*parts))

    def build(*tensors: tf.Tensor) -> list[Any]:
        outputs = call(pure, tensors)
        return [outputs[index] for index in rest] + [
            # What it returns is an output too: nothing else keeps it in the graph.
            tf.numpy_function(
                partial(_hand_over, receiver, index), outputs[part.start : part.stop], tf.bool
            )
            for index, part in enumerate(parts)
        ]

    function = _function(pure, build)

    def run(hand_over: HandOver, *inputs: Any) -> list[tf.Tensor]:
        receiver[:] = [hand_over]
        try:
            return function(*inputs)[: len(rest)]
        finally:
            receiver.clear()  # it holds the arrays of its caller

    return run


def _hand_over(receiver: list[HandOver], part: int, *arrays: np.ndarray) -> bool:
    receiver[0](part, list(arrays))
    return True


@lru_cache(maxsize=32)
def _load(key: _Key) -> Loaded:
    return _function(key.pure, lambda *tensors: call(key.pure, tensors), key.jit_compile)


def _function(
    pure: PureGraph, build: Callable[..., list[Any]], jit_compile: bool = False
) -> Loaded:
    """What `build` makes of a pure graph's inputs, as a function that can be called."""
    dtypes = [tf.as_dtype(info.dtype) for info in pure.inputs]
    with context.eager_mode():
        _register_functions(pure)
        graph = trace_graph(
            build,
            [
                tf.TensorSpec(info.shape, dtype)
                for info, dtype in zip(pure.inputs, dtypes, strict=True)
            ],
            ordered=False,
        )
        attributes = {}
        if jit_compile:
            attributes["_XlaMustCompile"] = attr_value_pb2.AttrValue(b=True)
        # Binding arguments by name costs a ConcreteFunction as much as running a small graph.
        function = atomic_function.from_func_graph(
            f"tfspark_{next(_numbers)}_{pure.fingerprint[:16]}", graph, attributes
        )

    def run(*inputs: Any) -> list[tf.Tensor]:
        if context.executing_eagerly():
            return list(function.call_flat(*map(_tensor, inputs, dtypes)))
        with context.eager_mode():
            return list(function.call_flat(*map(_tensor, inputs, dtypes)))

    run.graph = graph  # type: ignore[attr-defined]  # Python functions that it calls live in it
    return run


def _tensor(value: Any, dtype: tf.DType) -> tf.Tensor:
    if not isinstance(value, np.ndarray):
        return tf.convert_to_tensor(value, dtype)
    # tf.convert_to_tensor copies arrays, in case they change: here none does during a call.
    runtime = context.context()
    runtime.ensure_initialized()
    return ops.EagerTensor(value, runtime.device_name, dtype.as_datatype_enum)


def array_of(tensor: tf.Tensor) -> np.ndarray:
    """The memory of an eager tensor of numbers as an array that cannot be written to.

    `Tensor.numpy()` copies it.
    """
    return np.asarray(memoryview(tensor))


def _register_functions(pure: PureGraph) -> None:
    """Makes the bodies of control flow known: importing a graph does so for that graph only."""
    runtime = context.context()
    for function in graph_pb2.GraphDef.FromString(pure.graph_def).library.function:
        if not runtime.has_function(function.signature.name):
            runtime.add_function_def(function)


def op_error(error: tf.errors.OpError) -> str:
    """What an operation complained of, without the frame that every error in a graph has."""
    essence = error.message.split("<stack traces unavailable>\n")[-1].split("\n\t [[")[0]
    return f"{type(error).__name__}: {essence.strip()}"
