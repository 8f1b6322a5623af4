"""Stateless counterparts of TensorFlow's stateful random operations.

A stateful random operation draws other numbers in every run. Its counterpart is a function of a
seed `int64 [2]`, so a step can be repeated bit for bit. Each operation salts the seed with its name
and with the seeds that the user gave it; a loop changes the seed in every iteration. The salted
seed keys TensorFlow's Philox generator, which scrambles it, so that related seeds draw unrelated
numbers (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

# Odd constants of splitmix64 (Steele et al., 2014): their multiples visit all of 2**64.
_STRIDE = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9], np.uint64).view(np.int64)


def _uniform(op: Any) -> Callable[..., Any]:
    dtype = op.get_attr("dtype")
    return lambda shape, seed: tf.random.stateless_uniform(shape, seed, dtype=dtype)


def _uniform_int(op: Any) -> Callable[..., Any]:
    dtype = op.get_attr("Tout")
    return lambda shape, low, high, seed: tf.random.stateless_uniform(shape, seed, low, high, dtype)


def _normal(op: Any) -> Callable[..., Any]:
    dtype = op.get_attr("dtype")
    return lambda shape, seed: tf.random.stateless_normal(shape, seed, dtype=dtype)


def _truncated_normal(op: Any) -> Callable[..., Any]:
    dtype = op.get_attr("dtype")
    return lambda shape, seed: tf.random.stateless_truncated_normal(shape, seed, dtype=dtype)


def _parameterized_truncated_normal(op: Any) -> Callable[..., Any]:
    def draw(shape: Any, means: Any, stddevs: Any, low: Any, high: Any, seed: Any) -> Any:
        # The stateful operation has one parameter per row of its first dimension, or one in all.
        per_row = tf.concat([[-1], tf.ones([tf.size(shape) - 1], tf.int32)], 0)
        parameters = [
            tf.broadcast_to(tf.reshape(parameter, per_row), shape)
            for parameter in (means, stddevs, low, high)
        ]
        return tf.random.stateless_parameterized_truncated_normal(shape, seed, *parameters)

    return draw


def _multinomial(op: Any) -> Callable[..., Any]:
    dtype = op.get_attr("output_dtype")
    return lambda logits, count, seed: tf.random.stateless_categorical(logits, count, seed, dtype)


def _shuffle(op: Any) -> Callable[..., Any]:
    def shuffle(value: Any, seed: Any) -> Any:
        keys = tf.random.stateless_uniform(tf.shape(value)[:1], seed, None, None, dtype=tf.int64)
        return tf.gather(value, tf.argsort(keys, stable=True))

    return shuffle


def _gamma(op: Any) -> Callable[..., Any]:
    def gamma(shape: Any, alpha: Any, seed: Any) -> Any:
        whole = tf.concat([tf.cast(shape, tf.int32), tf.shape(alpha)], 0)
        return tf.random.stateless_gamma(whole, seed, alpha, dtype=alpha.dtype)

    return gamma


def _poisson(op: Any) -> Callable[..., Any]:
    dtype = op.get_attr("dtype")

    def poisson(shape: Any, rate: Any, seed: Any) -> Any:
        whole = tf.concat([tf.cast(shape, tf.int32), tf.shape(rate)], 0)
        return tf.random.stateless_poisson(whole, seed, rate, dtype=dtype)

    return poisson


_COUNTERPARTS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "RandomUniform": _uniform,
    "RandomUniformInt": _uniform_int,
    "RandomStandardNormal": _normal,
    "TruncatedNormal": _truncated_normal,
    "ParameterizedTruncatedNormal": _parameterized_truncated_normal,
    "Multinomial": _multinomial,
    "RandomShuffle": _shuffle,
    "RandomGamma": _gamma,
    "RandomPoissonV2": _poisson,
}

RANDOM_OPS = frozenset(_COUNTERPARTS)
"""The types of stateful random operations that have a counterpart."""


def stateless(op: tf.Operation, salt: str) -> Callable[..., Any]:
    """The counterpart of a random operation.

    Args:
        op: of a type in `RANDOM_OPS`.
        salt: the operation's name, unique in its graph.

    Returns:
        A function of the operation's inputs and a seed, int64 `[2]`.
    """
    own = [op.get_attr(name) for name in ("seed", "seed2")]
    digest = hashlib.sha256(f"{salt} {own}".encode()).digest()
    mask = np.frombuffer(digest[:16], "<i8")
    draw = _COUNTERPARTS[op.type](op)
    return lambda *inputs: draw(*inputs[:-1], tf.bitwise.bitwise_xor(inputs[-1], mask))


def next_iteration(seed: Any) -> Any:
    """The seed of a loop's next iteration."""
    return seed + tf.constant(_STRIDE)
