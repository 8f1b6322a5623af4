"""Loading pure graphs."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfspark.graphdef.loader import load
from tfspark.graphdef.variables import call, trace


def squares() -> Any:
    return trace(lambda x: (x**2, tf.reduce_sum(x)), [tf.TensorSpec([None])]).graph


def test_equal_graphs_are_loaded_once() -> None:
    graph = squares()
    copy = pickle.loads(pickle.dumps(graph))
    assert copy == graph and copy.fingerprint == graph.fingerprint
    assert load(graph) is load(copy)
    assert load(graph) is not load(graph, jit_compile=True)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_takes_arrays_and_tensors_of_any_length(jit_compile: bool) -> None:
    run = load(squares(), jit_compile=jit_compile)
    for x in (np.arange(4, dtype="f"), tf.range(7, dtype=tf.float32)):
        square, total = run(x)
        np.testing.assert_array_equal(square, np.asarray(x) ** 2)
        assert float(total) == np.asarray(x).sum()


def test_is_compiled_by_xla() -> None:
    graph = trace(lambda x: tf.strings.length(tf.as_string(x)), [tf.TensorSpec([2])]).graph
    load(graph)(np.zeros(2, "f"))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"AsString|XLA|compil"):
        load(graph, jit_compile=True)(np.zeros(2, "f"))


def test_runs_inside_a_graph_context() -> None:
    run = load(squares())
    with tf.Graph().as_default():
        square, _ = load(squares())(np.ones(2, "f"))
        again, _ = run(np.ones(2, "f"))
    np.testing.assert_array_equal(square.numpy(), again.numpy())


def test_works_without_eager_execution(run_python: Any) -> None:
    source = """
        import numpy as np
        import tensorflow as tf
        tf.compat.v1.disable_v2_behavior()
        from tfspark.graphdef.loader import load
        from tfspark.graphdef.variables import trace
        loop = lambda x: tf.while_loop(lambda v: v < 10, lambda v: v * 2, [x])
        run = load(trace(loop, [tf.TensorSpec([])]).graph)
        print(run(np.float32(3))[0].numpy())
    """
    assert run_python(source).stdout.strip() == "12.0"


def test_graphs_can_be_called_in_graphs() -> None:
    graph = squares()
    twice = trace(lambda x: call(graph, [call(graph, [x])[0]])[0], [tf.TensorSpec([3])]).graph
    (y,) = load(twice)(np.array([1, 2, 3], "f"))
    np.testing.assert_array_equal(y, [1, 16, 81])
