"""Sums over a whole tensor inside an optimizer's rule, so that ranks can make them together.

LAMB and LARS scale by norms, which are roots of sums over all elements of a tensor; a rank holds a
slice. So a traced rule is cut at its sums. What goes into a sum, its *terms*, is elementwise: each
rank adds up its own, tensor by tensor, and the engine adds these over ranks. In what is left of the
rule each sum is an input, one value per element: the sum over the tensor that the element belongs
to. That is elementwise again. The two parts are all of the rule's own operations and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2, graph_pb2, node_def_pb2

from tfspark.errors import UnsupportedRuleError
from tfspark.graph.clipping import Segment
from tfspark.graphdef.nodes import ancestors, prune
from tfspark.graphdef.pure import PureGraph, TensorInfo


@dataclass(frozen=True)
class CutRule:
    """A rule in two elementwise parts.

    Attributes:
        terms: the rule's inputs → the terms of each sum; None where the rule has no sums.
        rest: the rule's inputs, then the sums → the rule's outputs.
    """

    terms: PureGraph | None
    rest: PureGraph

    @property
    def sum_dtypes(self) -> tuple[str, ...]:
        """Of the sums, as the rule computes them."""
        return () if self.terms is None else tuple(info.dtype for info in self.terms.outputs)


def cut_at_sums(rule: PureGraph, name: str, size: int) -> CutRule:
    """Cuts a rule at its sums over all elements.

    Args:
        rule: traced on vectors.
        name: of the rule, for messages.
        size: the length of these vectors.

    Raises:
        UnsupportedRuleError: a sum depends on another one.
    """
    definition = graph_pb2.GraphDef.FromString(rule.graph_def)
    with tf.Graph().as_default() as graph:
        tf.graph_util.import_graph_def(definition, name="")
    sums = [op for op in graph.get_operations() if _is_sum_of_all(op, size)]
    if not sums:
        return CutRule(None, rule)
    names = {op.name for op in sums}
    if any(names & set(ancestors([op.inputs[0].op])) for op in sums):
        raise UnsupportedRuleError(
            "An optimizer's rule may sum over whole tensors, but not what depends on such a sum. "
            f"Received: {name}, which does. Use a rule with norms of weights, gradients or "
            "elementwise updates, such as Lamb or LARS."
        )
    nodes = {node.name: node for node in definition.node}
    terms = _part(definition, nodes, rule.inputs, tuple(_info(op.inputs[0]) for op in sums))
    placeholders = {op.name: _placeholder(op) for op in sums}
    taken = tuple(TensorInfo(op.name, op.outputs[0].dtype.name, (size,)) for op in sums)
    rest = _part(definition, nodes | placeholders, (*rule.inputs, *taken), rule.outputs)
    return CutRule(terms, rest)


def _is_sum_of_all(op: Any, size: int) -> bool:
    return (
        op.type == "Sum"
        and op.inputs[0].shape.as_list() == [size]
        and op.outputs[0].shape.num_elements() == 1
    )


def _info(tensor: Any) -> TensorInfo:
    return TensorInfo(tensor.name, tensor.dtype.name, tuple(tensor.shape.as_list()))


def _placeholder(op: Any) -> Any:
    return node_def_pb2.NodeDef(
        name=op.name,
        op="Placeholder",
        attr={"dtype": attr_value_pb2.AttrValue(type=op.outputs[0].dtype.as_datatype_enum)},
    )


def _part(
    definition: Any,
    nodes: dict[str, Any],
    inputs: tuple[TensorInfo, ...],
    outputs: tuple[TensorInfo, ...],
) -> PureGraph:
    part = graph_pb2.GraphDef(versions=definition.versions, library=definition.library)
    part.node.extend(prune(nodes, [info.name for info in (*inputs, *outputs)]))
    return PureGraph(part.SerializeToString(deterministic=True), inputs, outputs)


def tensor_sums(
    terms: Sequence[np.ndarray], segments: Sequence[Segment], num_tensors: int
) -> np.ndarray:
    """This slice's part of every sum over every tensor: float64 `[sums, num_tensors]`.

    Args:
        terms: of each sum, `[size]`.
        segments: the parts of tensors in the slice; padding belongs to none.
        num_tensors: of the whole model.
    """
    sums = np.zeros((len(terms), num_tensors), np.float64)
    for segment in segments:
        for row, values in enumerate(terms):
            sums[row, segment.tensor] += values[segment.start : segment.stop].sum(dtype=np.float64)
    return sums


def at_elements(
    sums: np.ndarray, segments: Sequence[Segment], size: int, dtype: str
) -> list[np.ndarray]:
    """The sums over its tensor for each element of a slice: `[size]` per row of `sums`.

    Padding gets ones: no rule divides by zero there.
    """
    result = np.ones((len(sums), size), dtype)
    for segment in segments:
        result[:, segment.start : segment.stop] = sums[:, segment.tensor, None]
    return list(result)
