"""Loading pure graphs."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfspark.graphdef.loader import load, load_in_parts
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


def chain() -> Any:
    """The outputs are computed in the reverse of their order, and the second takes long."""

    def compute(x: tf.Tensor) -> list[tf.Tensor]:
        last = x + 1.0
        middle = tf.while_loop(
            lambda i, _: i < 2000, lambda i, v: (i + 1, tf.sin(v @ v)), [0, last]
        )
        return [tf.reduce_sum(x), middle[1], last, last * 2.0]

    return trace(compute, [tf.TensorSpec([64, 64])]).graph


@pytest.mark.parametrize("parts", [[range(1, 2), range(2, 4)], [range(1, 4)]])
def test_parts_are_handed_over(parts: list[range]) -> None:
    graph, x = chain(), np.full((64, 64), 0.5, "f")
    expected = [each.numpy() for each in load(graph)(x)]
    run = load_in_parts(graph, parts)
    for _ in range(2):
        found: dict[int, list[np.ndarray]] = {}

        def hand_over(part: int, arrays: list[np.ndarray], found: Any = found) -> None:
            found[part] = [array.copy() for array in arrays]

        (total,) = run(hand_over, x)
        assert float(total) == expected[0]
        arrays = [array for _, part in sorted(found.items()) for array in part]
        for array, other in zip(arrays, expected[1:], strict=True):
            np.testing.assert_array_equal(array, other)


def test_a_part_is_handed_over_while_others_are_computed(run_python: Any) -> None:
    """In a process of its own: the number of threads is settled with the first operation."""
    folder = str(Path(__file__).parent)
    source = f"""
        import sys, time
        sys.path.insert(0, {folder!r})
        import numpy as np
        from tfspark.graphdef.loader import configure_threads, load_in_parts
        configure_threads(1, hands_over=True)
        from test_loader import chain
        run, x = load_in_parts(chain(), [range(1, 2), range(2, 4)]), np.full((64, 64), 0.5, "f")
        is_early = []
        for _ in range(5):
            came, started = dict(), time.perf_counter()
            run(lambda part, arrays: came.setdefault(part, time.perf_counter() - started), x)
            is_early.append(came[1] < came[0] / 2)
        print(any(is_early))
    """
    unset = dict.fromkeys(("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"))
    assert run_python(source, **unset).stdout == "True\n"
