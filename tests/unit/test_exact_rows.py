"""Graphs of a program for an exact number of rows: when there are any, and that they agree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_fits import on_ranks, plainly, same

from tfspark import TFDataset, TFOptimizer
from tfspark.data.batches import BatchReader
from tfspark.data.order import BatchOrder
from tfspark.data.spec import Field, RowSpec
from tfspark.data.store import StoreWriter
from tfspark.errors import ProgramError
from tfspark.graph.clipping import Clipping
from tfspark.graph.from_function import program_from_function
from tfspark.graph.from_keras import program_from_keras
from tfspark.graph.update import update_program
from tfspark.graphdef.loader import load
from tfspark.graphdef.loops import adapts_shapes_in_loops
from tfspark.sync.engine import Run
from tfspark.sync.rank import RankProgram, Replica, common_rows

tf_keras = pytest.importorskip("tf_keras", reason="tf-keras is not installed")

STEPS, UNITS, ROWS = 5, 4, 8
SPEC = RowSpec.of((Field("x", "float32", (STEPS, UNITS)), Field("y", "float32", (1,))))
PAIRS = RowSpec.of((Field("x", "float32", (3,)), Field("y", "float32", (3,))))


def compiled(package: Any, *inner: Any, **settings: Any) -> Any:
    package.utils.set_random_seed(1)
    layers = package.layers
    model = package.Sequential([layers.Input((STEPS, UNITS)), *inner, layers.Dense(1)])
    model.compile(**{"loss": "mse", "optimizer": "sgd", **settings})
    return model


def powers(batch: Any) -> Any:
    """A loop of a user, whose body broadcasts what has a row each with what has none."""
    x, y = batch
    power = x
    for _ in tf.range(3):
        power = tf.tanh(power * KERNEL + x)
    return tf.reduce_mean((power - y) ** 2)


KERNEL = tf.Variable([0.1, 0.2, 0.3], name="kernel")
LOOPS = {
    "lstm": lambda: program_from_keras(compiled(keras, keras.layers.LSTM(3)), SPEC),
    "masked gru": lambda: program_from_keras(
        compiled(keras, keras.layers.Masking(), keras.layers.GRU(3)), SPEC
    ),
    "two ways, two layers": lambda: program_from_keras(
        compiled(
            keras,
            keras.layers.Bidirectional(keras.layers.LSTM(3, return_sequences=True)),
            keras.layers.LSTM(2),
        ),
        SPEC,
    ),
    "dropout": lambda: program_from_keras(
        compiled(keras, keras.layers.LSTM(3, dropout=0.5, recurrent_dropout=0.5)), SPEC
    ),
    "counted metrics": lambda: program_from_keras(
        compiled(keras, keras.layers.LSTM(3), metrics=["mae"]), SPEC, tracks_metrics=True
    ),
    "lstm of tf-keras": lambda: program_from_keras(
        compiled(tf_keras, tf_keras.layers.LSTM(3)), SPEC
    ),
    "function": lambda: program_from_function(powers, [KERNEL], PAIRS),
}


def batch(spec: RowSpec, rows: int) -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    return [rng.normal(size=(rows, *field.shape)).astype(field.dtype) for field in spec.fields]


@pytest.mark.parametrize("make", LOOPS.values(), ids=LOOPS.keys())
def test_a_loop_of_exact_rows_computes_the_same_and_asks_for_no_shape(make: Any) -> None:
    bound = make().expecting([ROWS])
    program = bound.program
    assert list(program.exact_graphs) == [ROWS]
    exact, spec = program.exact_graphs[ROWS], PAIRS if make is LOOPS["function"] else SPEC
    assert program.graph_for(ROWS) is exact
    assert program.graph_for(ROWS - 1) is program.graph
    assert adapts_shapes_in_loops(program.graph)
    assert not adapts_shapes_in_loops(exact)
    count = 1 + len(program.state)
    assert [info.shape for info in exact.inputs[count : count + 2]] == [
        (ROWS, *field.shape) for field in spec.fields
    ]
    inputs = [
        *(bound.flat, *bound.state, *batch(spec, ROWS)),
        *(np.int64(ROWS), np.int64(2 * ROWS), np.array([3, 1])),
    ]
    for one, other in zip(load(exact)(*inputs), load(program.graph)(*inputs), strict=True):
        # Constants are multiplied beforehand where shapes are known: the last bit may differ.
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-5, atol=1e-6)


def test_a_training_that_starts_again_has_the_graphs_of_the_first() -> None:
    factor = 1.0

    def loss_fn(batch: Any) -> Any:
        return factor * powers(batch)

    bound = program_from_function(loss_fn, [KERNEL], PAIRS)
    first = bound.expecting([ROWS]).program
    factor = 2.0  # such as a callback between epochs changes
    assert bound.expecting([ROWS]).program.exact_graphs[ROWS] is first.exact_graphs[ROWS]


@pytest.mark.parametrize("unroll", [None, True], ids=["dense", "unrolled"])
def test_without_such_a_loop_nothing_is_traced_twice(unroll: bool | None) -> None:
    traced = []

    class Counting(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            traced.append(x.shape[0])
            return x

    inner = keras.layers.Flatten() if unroll is None else keras.layers.LSTM(3, unroll=True)
    model = compiled(keras, Counting(), inner)
    del traced[:]  # that Keras calls it to find out shapes is none of ours
    bound = program_from_keras(model, SPEC)
    assert bound.expecting([ROWS]) is bound
    assert traced == [None]


def test_a_function_that_becomes_another_model_for_its_rows_keeps_one_graph() -> None:
    odd = tf.Variable(1.0, name="odd")

    def loss_fn(batch: Any) -> Any:
        extra = odd if batch[0].shape[0] == 3 else 0.0
        return powers(batch) + extra

    bound = program_from_function(loss_fn, [KERNEL], PAIRS).expecting([3, 4])
    assert list(bound.program.exact_graphs) == [4]


@pytest.mark.parametrize(
    ("rows_per_rank", "batch_size", "accumulation_steps", "expected"),
    [
        ((500, 500), 128, 1, [64]),
        ((667, 333), 96, 1, [64, 32]),  # three partitions on two ranks
        ((500, 500), 127, 1, [63, 64]),
        ((900, 300, 600, 600), 24, 1, [9, 3, 6]),
        ((500, 500), 128, 5, [12, 13]),
        ((50, 0), 32, 1, [32, 18]),  # of two steps an epoch, one is smaller
        ((1000,), 300, 1, [300]),
        ((3, 2), 4, 8, [1]),
    ],
)
def test_rows_that_calls_have_most_often(
    rows_per_rank: tuple[int, ...],
    batch_size: int,
    accumulation_steps: int,
    expected: list[int],
) -> None:
    order = BatchOrder(rows_per_rank, batch_size, seed=0, shuffle=True)
    assert set(common_rows(order, accumulation_steps)) == set(expected)


def test_a_training_knows_the_rows_of_its_ranks(sc: Any) -> None:
    model = compiled(keras, keras.layers.LSTM(3))
    dataset = TFDataset.from_ndarrays(tuple(batch(SPEC, 60)), batch_size=20)
    optimizer = TFOptimizer.from_keras(model, dataset, engine="local", num_ranks=3)
    program = optimizer.start()._training.loop.run.program
    assert set(program.exact_graphs) == {6, 7}
    optimizer.close()


def test_a_model_for_other_rows_than_those_of_its_ranks_is_refused(sc: Any) -> None:
    model = keras.Sequential(
        [keras.Input(batch_shape=(8, STEPS, UNITS)), keras.layers.LSTM(3, stateful=True)]
    )
    model.compile(loss="mse", optimizer="sgd")
    spec = RowSpec.of((SPEC.fields[0], Field("y", "float32", (3,))))
    dataset = TFDataset.from_ndarrays(tuple(batch(spec, 60)), batch_size=20)
    optimizer = TFOptimizer.from_keras(model, dataset, engine="local", num_ranks=2)
    with pytest.raises(
        ProgramError, match=r"compute 10 rows .*Received batch size: 10\). Give its"
    ):
        optimizer.start()


def test_a_rank_calls_the_graph_of_its_rows(tmp_path: Any) -> None:
    """Shown by a graph for four rows whose loss is another one."""

    def twice(batch: Any) -> Any:
        return 2.0 * powers(batch)

    bound = program_from_function(powers, [KERNEL], PAIRS)
    other = program_from_function(twice, [KERNEL], PAIRS).program.graph
    with StoreWriter(str(tmp_path / "rank-0.arrow"), PAIRS, rank=0) as writer:
        writer.append_columns(tuple(batch(PAIRS, 9)))
    losses = {}
    for name, exact in (("any", {}), ("four", {4: other})):
        for parts in (1, 2):
            run = Run(
                run_id=f"{name}{parts}",
                program=replace(bound.program, exact_graphs=exact),
                updates=(update_program(keras.optimizers.SGD()),),
                clippings=(Clipping(),),
                order=BatchOrder((9,), 4 * parts, seed=0, shuffle=False),
                mapping=None,
                seed=0,
                state=(),
                num_ranks=1,
                accumulation_steps=parts,
            )
            reader = BatchReader(writer.handle, run.order)
            program, replica = RankProgram(run), Replica(bound.flat, [])
            losses[name, parts] = [
                program.contribute(0, step, replica, reader).loss_sum
                for step in range(run.order.steps_per_epoch)
            ]
    np.testing.assert_allclose(np.divide(losses["four", 1], losses["any", 1]), [2, 2, 1], rtol=1e-6)
    np.testing.assert_allclose(np.divide(losses["four", 2], losses["any", 2]), [2, 1], rtol=1e-6)


@pytest.mark.parametrize("package", [keras, tf_keras], ids=["keras", "tf-keras"])
def test_a_model_with_a_loop_learns_as_in_keras_also_from_part_of_a_batch(
    sc: Any, package: Any
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, STEPS, UNITS)).astype("float32")
    y = x[:, :, 0].sum(axis=1, keepdims=True)
    model, plain = (
        compiled(package, package.layers.LSTM(3), metrics=["mae"], optimizer="adam")
        for _ in range(2)
    )
    plain.set_weights(model.get_weights())
    history = on_ranks(model, x, y, engine="local", num_ranks=1, epochs=2)
    same(model, history, plain, plainly(plain, x, y, epochs=2))
