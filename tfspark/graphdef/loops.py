"""What loops of a graph would do less of if shapes were known."""

from __future__ import annotations

from tensorflow.core.framework import graph_pb2

from tfspark.graphdef.nodes import called_functions
from tfspark.graphdef.pure import PureGraph

_LOOPS = ("While", "StatelessWhile")


def adapts_shapes_in_loops(pure: PureGraph) -> bool:
    """Whether a loop asks in every iteration how shapes are to be broadcast.

    The gradient of an operation whose operands have an unknown dimension finds out at run time
    which sums undo the broadcasting, and a loop keeps the shapes of every iteration for it. Outside
    of loops that is once a step, and cheap; in the body of one it is a good part of the work.
    """
    graph = graph_pb2.GraphDef.FromString(pure.graph_def)
    functions = {each.signature.name: each.node_def for each in graph.library.function}
    nodes = [*graph.node, *(node for body in functions.values() for node in body)]
    pending = [node.attr["body"].func.name for node in nodes if node.op in _LOOPS]
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            for node in functions[name]:
                if node.op == "BroadcastGradientArgs":
                    return True
                pending += called_functions(node)
    return False
