"""Programs from functions against a GradientTape on the same batch."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from programs import joined

from tfspark.data.spec import Field, RowSpec
from tfspark.errors import ProgramError
from tfspark.graph.from_function import program_from_function
from tfspark.graphdef.loader import load

SPEC = RowSpec.of({"x": Field("x", "float32", (3,)), "y": Field("y", "float32", (1,))})
ROWS = 6


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(ROWS, 3)).astype("f"),
        "y": rng.normal(size=(ROWS, 1)).astype("f"),
    }


def run(bound: Any, seed: int = 0) -> list[np.ndarray]:
    flat = [batch()[field] for field in ("x", "y")]
    outputs = load(bound.program.graph)(
        bound.flat, *bound.state, *flat, np.int64(ROWS), np.int64(ROWS), np.array([seed, 0])
    )
    return joined(bound.program, outputs)


@pytest.mark.parametrize("wrap", [lambda f: f, tf.function], ids=["plain", "tf.function"])
def test_gradient_and_state_equal_a_tape(wrap: Any) -> None:
    kernel = tf.Variable(np.random.default_rng(1).normal(size=(3, 1)).astype("f"), name="kernel")
    calls = tf.Variable(2, name="calls", trainable=False)

    def loss_fn(rows: Any) -> Any:
        power = rows["x"]
        for _ in tf.range(calls):  # AutoGraph makes a loop of it, which reads a variable
            power = power * tf.reduce_mean(kernel)
        if tf.reduce_sum(power) > 1e9:
            calls.assign_add(10)
        calls.assign_add(1)
        return tf.reduce_mean((power @ kernel - rows["y"]) ** 2)

    bound = program_from_function(wrap(loss_fn), [kernel], SPEC)
    assert [(slot.name, slot.kind) for slot in bound.program.state] == [("calls", "first")]
    loss, gradient, new_calls = run(bound)
    assert calls.numpy() == 2  # tracing ran nothing
    with tf.GradientTape() as tape:
        expected = tf.function(loss_fn)(batch())
    np.testing.assert_allclose(loss / ROWS, expected, rtol=1e-5)
    slope = tape.gradient(expected, kernel)
    np.testing.assert_allclose(gradient / ROWS, slope[:, 0], rtol=1e-4)
    assert new_calls == 3


def test_a_sum_counts_every_row_once() -> None:
    kernel = keras.Variable(np.ones((3, 1), "f"), name="kernel")
    bound = program_from_function(
        lambda rows: tf.reduce_sum(rows["x"] @ kernel), [kernel], SPEC, reduction="sum"
    )
    loss, gradient = run(bound)
    np.testing.assert_allclose(loss / ROWS, batch()["x"].sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient / ROWS, batch()["x"].sum(0), rtol=1e-5)
    bound.assign(np.array([1, 2, 3], "f"), [])
    np.testing.assert_array_equal(kernel.numpy(), [[1], [2], [3]])


def test_dropout_draws_from_the_seed_alone() -> None:
    kernel = tf.Variable(tf.ones([3, 1]))
    bound = program_from_function(
        lambda rows: tf.reduce_mean(tf.nn.dropout(rows["x"], 0.5) @ kernel), [kernel], SPEC
    )
    first, again, other = run(bound, 1)[1], run(bound, 1)[1], run(bound, 2)[1]
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_names_the_unused_variable() -> None:
    kernel, idle = tf.Variable(tf.ones([3, 1]), name="kernel"), tf.Variable(1.0, name="idle")
    with pytest.raises(ProgramError, match="Received: idle, on which"):
        program_from_function(lambda rows: tf.reduce_mean(rows["x"] @ kernel), [kernel, idle], SPEC)


def test_refuses_a_loss_per_row() -> None:
    kernel = tf.Variable(tf.ones([3, 1]))
    with pytest.raises(ProgramError, match=r"scalar float tensor. Received: shape \(None, 1\)"):
        program_from_function(lambda rows: rows["x"] @ kernel, [kernel], SPEC)


def test_refuses_half_precision_and_mixtures() -> None:
    half, single = tf.Variable(tf.ones([3, 1], tf.float16), name="half"), tf.Variable(1.0)
    with pytest.raises(ProgramError, match=r"half \(float16\).*mixed_bfloat16"):
        program_from_function(lambda rows: tf.reduce_mean(half), [half], SPEC)
    double = tf.Variable(tf.ones([], tf.float64))
    with pytest.raises(ProgramError, match="one dtype"):
        program_from_function(lambda rows: single, [single, double], SPEC)
