"""Stateless counterparts against the distributions that they must have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfspark.errors import ProgramError
from tfspark.graphdef.loader import load
from tfspark.graphdef.variables import trace

SEED = tf.TensorSpec([2], tf.int64)
N = 20_000


def draw(function: Any, seed: tuple[int, int] = (1, 2)) -> list[np.ndarray]:
    graph = trace(lambda _: function(), [SEED], seeded=True).graph
    return [output.numpy() for output in load(graph)(np.array(seed, np.int64))]


# function, mean, standard deviation, smallest, largest; the moments by the textbook
DRAWS = {
    "uniform": (lambda: tf.random.uniform([N], 2, 6), 4, 4 / 12**0.5, 2, 6),
    "integers": (
        lambda: tf.random.uniform([N], 0, 10, tf.int32), 4.5, (99 / 12) ** 0.5, 0, 9,
    ),
    "normal": (lambda: tf.random.normal([N], 3, 2), 3, 2, -np.inf, np.inf),
    "truncated": (lambda: tf.random.truncated_normal([N]), 0, 0.8796, -2, 2),
    "gamma": (lambda: tf.random.gamma([N], 3.0, 2.0), 1.5, 3**0.5 / 2, 0, np.inf),
    "poisson": (lambda: tf.random.poisson([N], 4.0), 4, 2, 0, np.inf),
    "categorical": (
        lambda: tf.random.categorical(tf.math.log([[0.5, 0.0, 0.5]]), N), 1, 1, 0, 2,
    ),
    "shuffled": (lambda: tf.random.shuffle(tf.range(N)), (N - 1) / 2, N / 12**0.5, 0, N - 1),
    "parameterized": (
        lambda: tf.raw_ops.ParameterizedTruncatedNormal(
            shape=[N], means=[1.0], stdevs=[1.0], minvals=[1.0], maxvals=[9.0]
        ),
        1 + (2 / np.pi) ** 0.5, (1 - 2 / np.pi) ** 0.5, 1, 9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWS)
def test_draws_have_their_distribution(name: str) -> None:
    function, mean, deviation, low, high = DRAWS[name]
    (values,) = draw(function)
    values = values.reshape(-1)
    assert values.min() >= low and values.max() <= high
    assert len(values) == N
    error = 5 * deviation / N**0.5  # five standard errors
    assert abs(values.mean() - mean) < error
    assert abs(values.std() - deviation) < 5 * error
    again, other = draw(function)[0].reshape(-1), draw(function, (1, 3))[0].reshape(-1)
    np.testing.assert_array_equal(values, again)
    assert not np.array_equal(values, other)
    if name != "shuffled":  # a permutation's elements are all different
        correlation = np.corrcoef(values, other)[0, 1]
        assert abs(correlation) < 5 / N**0.5
        assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 5 / N**0.5


def test_a_shuffle_is_a_permutation_of_rows() -> None:
    (rows,) = draw(lambda: tf.random.shuffle(tf.reshape(tf.range(30), [10, 3])))
    np.testing.assert_array_equal(np.sort(rows[:, 0]), np.arange(0, 30, 3))
    np.testing.assert_array_equal(rows[:, 1], rows[:, 0] + 1)


def test_every_operation_draws_its_own_numbers() -> None:
    def several() -> Any:
        first, second = tf.random.normal([N]), tf.random.normal([N])

        @tf.function
        def call() -> Any:
            return tf.random.normal([N])

        return first, second, call(), call()

    values = np.stack(draw(several))
    correlations = np.corrcoef(values) - np.eye(4)
    assert np.abs(correlations).max() < 5 / N**0.5


def test_the_users_own_seed_counts() -> None:
    def named(seed: int) -> np.ndarray:
        return draw(lambda: tf.random.normal([4], seed=seed))[0]

    assert not np.array_equal(named(1), named(2))
    np.testing.assert_array_equal(named(1), named(1))


def test_iterations_and_branches_draw_anew() -> None:
    def looped() -> Any:
        def body(i: Any, drawn: Any) -> Any:
            value = tf.cond(i < 5, lambda: tf.random.normal([]), lambda: tf.random.uniform([]))
            return i + 1, drawn.write(i, value)

        array = tf.TensorArray(tf.float32, 10)
        _, array = tf.while_loop(lambda i, _: i < 10, body, [tf.constant(0), array])
        return array.stack()

    (values,) = draw(looped)
    assert len(np.unique(values)) == 10
    np.testing.assert_array_equal(values, draw(looped)[0])
    assert not np.intersect1d(values, draw(looped, (1, 3))[0]).size


def test_truncated_normals_of_several_parameters() -> None:
    (values,) = draw(
        lambda: tf.raw_ops.ParameterizedTruncatedNormal(
            shape=[3, 500], means=[0.0, 5.0, 9.0], stdevs=[1.0], minvals=[-1.0, 4.0, 8.0],
            maxvals=[1.0, 6.0, 10.0],
        )
    )  # fmt: skip
    np.testing.assert_allclose(values.mean(1), [0, 5, 9], atol=0.15)
    assert (abs(values - np.array([[0], [5], [9]])) <= 1).all()


def test_gradients_see_the_same_mask_as_values() -> None:
    def function(x: Any, _: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for _ in range(2):
                y = tf.nn.dropout(y, 0.5)
        return y, tape.gradient(y, x)

    graph = trace(function, [tf.TensorSpec([100]), SEED], seeded=True).graph
    x = np.full(100, 3, "f")
    value, gradient = load(graph)(x, np.array([5, 6]))
    np.testing.assert_allclose(value, x * gradient)
    assert set(np.unique(gradient)) == {0, 4}


def test_refuses_a_generator_by_name() -> None:
    generator = tf.random.Generator.from_seed(1)
    with pytest.raises(ProgramError, match=r"RngReadAndSkip|StatefulRandom"):
        draw(lambda: generator.normal([3]))
