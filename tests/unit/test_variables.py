"""Purified graphs against TensorFlow's own execution with variables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.framework import graph_pb2

from tfspark.errors import ProgramError
from tfspark.graphdef.loader import load
from tfspark.graphdef.pure import PureGraph
from tfspark.graphdef.rewrite import VariableInput
from tfspark.graphdef.variables import purify, trace

VECTOR = tf.TensorSpec([3])
X = np.array([1, 2, 3], "f")


def same_as_tensorflow(function: Any, *variables: tf.Variable) -> PureGraph:
    """Runs a function pure and as a tf.function, and compares results and variables."""
    traced = trace(function, [VECTOR], variables)
    assert traced.variables == variables
    values = [variable.numpy() for variable in variables]
    pure = [output.numpy() for output in load(traced.graph)(X, *values)]
    for variable, value in zip(variables, values, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)  # nothing ran so far
    expected = [y.numpy() for y in tf.nest.flatten(tf.function(function)(X))]
    expected += [variable.numpy() for variable in variables]
    assert len(pure) == len(expected)
    for mine, theirs in zip(pure, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    changed = [not np.array_equal(a, v.numpy()) for a, v in zip(values, variables, strict=True)]
    assert list(traced.written) == changed
    return traced.graph


def kinds(graph: PureGraph) -> set[str]:
    definition = graph_pb2.GraphDef.FromString(graph.graph_def)
    bodies = [node for function in definition.library.function for node in function.node_def]
    return {node.op for node in [*definition.node, *bodies]}


def vector(name: str = "v") -> tf.Variable:
    return tf.Variable([1.0, 2.0, 3.0], name=name)


def test_reads_see_the_writes_before_them() -> None:
    v = vector()

    def function(x: Any) -> Any:
        before = v.read_value()
        v.assign_add(x)
        between = v * 2
        v.assign(v - 0.5)
        v.assign_sub(x * x)
        return before, between, v.read_value()

    same_as_tensorflow(function, v)


def test_scatters_and_gathers() -> None:
    table = tf.Variable(np.arange(12, dtype="f").reshape(4, 3))

    def function(x: Any) -> Any:
        table.scatter_add(tf.IndexedSlices(tf.stack([x, x, x]), tf.constant([1, 1, 3])))
        rows = tf.gather(table, [3, 1])
        table.scatter_update(tf.IndexedSlices(x[None], tf.constant([0])))
        table.scatter_nd_sub([[2, 1]], x[:1])
        table.scatter_max(tf.IndexedSlices(x[None], tf.constant([2])))
        table[:, 2].assign(x[0] * tf.ones([4]))
        return rows, tf.gather_nd(table, [[0, 1], [1, 0]]), tf.shape(table)

    same_as_tensorflow(function, table)


def test_branches_write() -> None:
    v, w = vector(), vector("w")

    def function(x: Any) -> Any:
        result = tf.cond(
            tf.reduce_sum(v) > 0, lambda: v.assign_add(x) * w, lambda: w.assign_add(x) - v
        )
        chosen = tf.switch_case(
            tf.constant(1), [lambda: v * 1.0, lambda: v.assign(v * 3), lambda: v * 5]
        )
        return result, chosen, w.read_value()

    traced = trace(function, [VECTOR], [v, w])
    positive = [y.numpy() for y in load(traced.graph)(X, v.numpy(), w.numpy())]
    negative = [y.numpy() for y in load(traced.graph)(X, -v.numpy(), w.numpy())]
    np.testing.assert_allclose(positive[0], (v + X) * w)
    np.testing.assert_allclose(positive[3], (v + X) * 3)
    np.testing.assert_allclose(positive[4], w)
    np.testing.assert_allclose(negative[0], w + X + v)
    np.testing.assert_allclose(negative[3], -v * 3)
    np.testing.assert_allclose(negative[4], w + X)


def test_loops_read_and_write_and_have_gradients() -> None:
    kernel, total = tf.Variable(np.eye(3, dtype="f") * 0.7), tf.Variable(0.0)

    def function(x: Any) -> Any:
        with tf.GradientTape() as tape:
            state = x[None]
            for _ in tf.range(4):
                state = tf.tanh(state @ kernel)
                total.assign_add(tf.reduce_sum(state))
            loss = tf.reduce_sum(state**2)
        return loss, tape.gradient(loss, kernel), total.read_value()

    converted = tf.autograph.to_graph(function)
    same_as_tensorflow(converted, kernel, total)


def test_nested_functions_are_inlined() -> None:
    v = vector()

    @tf.function
    def inner(x: Any) -> Any:
        v.assign_add(x)
        return tf.cond(x[0] > 0, lambda: v + x, lambda: v - x)

    @tf.function
    def outer(x: Any) -> Any:
        return inner(x) * inner(x * 2)

    graph = same_as_tensorflow(lambda x: outer(x) + v, v)
    assert not {kind for kind in kinds(graph) if "PartitionedCall" in kind}


def test_assertions_and_prints_do_not_stay() -> None:
    v = vector()

    def function(x: Any) -> Any:
        tf.debugging.assert_greater(x, -1.0)
        tf.print("x", x)
        return x + v

    graph = same_as_tensorflow(function, v)
    assert not kinds(graph) & {"Assert", "Print", "PrintV2"}


def test_variables_that_are_not_listed_follow() -> None:
    listed, other = vector("listed"), vector("other")
    traced = trace(lambda x: x * other + listed, [VECTOR], [listed])
    assert [variable.name for variable in traced.variables] == ["listed:0", "other:0"]
    assert [info.name for info in traced.graph.inputs[1:]] == ["listed.value", "other.value"]


def test_values_that_a_function_closes_over_become_constants() -> None:
    big = tf.constant(np.arange(3000, dtype="f"))
    (y,) = load(trace(lambda x: x[0] * big, [VECTOR]).graph)(X)
    np.testing.assert_array_equal(y, big)


def tables(x: Any) -> Any:
    table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(["a"], [1.0]), default_value=0.0
    )
    return table.lookup(tf.as_string(x))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (tables, "tables before, outside of the function"),
        (lambda x: tf.numpy_function(lambda a: a, [x], tf.float32), "PyFunc"),
        (lambda x: x + tf.random.uniform([3]), "no seed"),
        (lambda x: next(iter(tf.data.Dataset.from_tensors(x))), "TFDataset"),
    ],
)
def test_refuses_other_state(function: Any, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        trace(function, [VECTOR])


@pytest.mark.parametrize("resource", [True, False], ids=["resource", "reference"])
def test_a_tf1_read_without_a_dependency_sees_the_old_value(resource: bool) -> None:
    v1 = tf.compat.v1
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, [3], "x")
        v = v1.get_variable("v", [3], use_resource=resource)
        first, second = v1.assign_add(v, x), v1.assign_sub(v, 2 * x)
        old = v + 0.0
        with tf.control_dependencies([first]):
            new = v.read_value() + 0.0
        scattered = v1.scatter_add(v, [0], [10.0])
    handle = graph.get_tensor_by_name("v:0")
    slot = VariableInput("v", tf.float32, tf.TensorShape([3]), (handle,))
    result = purify(
        graph, [x], [old, new], [slot], updates=[first.op, second.op, scattered.op]
    ).graph
    outputs = [y.numpy() for y in load(result)(X, np.zeros(3, "f"))]
    np.testing.assert_array_equal(outputs[0], np.zeros(3))
    np.testing.assert_array_equal(outputs[1], X)
    np.testing.assert_array_equal(outputs[2], [10 - 1, -2, -3])  # all three count


def test_refuses_a_write_in_v1_control_flow(run_python: Any) -> None:
    source = """
        import tensorflow.compat.v1 as tf
        tf.disable_control_flow_v2()
        from tfspark.graphdef.rewrite import VariableInput
        from tfspark.graphdef.variables import purify
        with tf.Graph().as_default() as graph:
            x = tf.placeholder(tf.float32, [])
            v = tf.get_variable("v", [], use_resource=True)
            y = tf.cond(x > 0, lambda: v.assign_add(x), lambda: x)
        slot = VariableInput("v", tf.float32, tf.TensorShape([]), (v.handle,))
        try:
            purify(graph, [x], [y], [slot])
        except ValueError as error:
            print(error)
    """
    output = run_python(source).stdout
    assert "inside tf.compat.v1.cond" in output and "'v' there" in output
