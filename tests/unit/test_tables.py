"""Lookups in constants against TensorFlow's own lookup tables."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfspark.errors import ProgramError
from tfspark.graphdef.loader import load
from tfspark.graphdef.variables import trace


def same_as_tensorflow(function, *examples):
    pure = trace(function, [tf.TensorSpec([None, *e.shape[1:]], e.dtype) for e in examples]).graph
    found = load(pure)(*examples)
    expected = tf.nest.flatten(tf.function(function)(*examples))
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy())
    return found


def table(keys, values, default):
    initializer = tf.lookup.KeyValueTensorInitializer(keys, values)
    return tf.lookup.StaticHashTable(initializer, default)


WORDS = np.char.encode(np.array([["b", "nowhere"], ["a", ""], ["ü", "b"]]), "utf-8")


def test_words_to_numbers_and_back():
    numbers = table(["b", "a", "ü"], tf.constant([7, 5, -1], tf.int64), 99)
    words = table(tf.constant([7, 5, 99], tf.int64), ["seven", "five", "?"], "nothing")
    same_as_tensorflow(lambda x: (numbers.lookup(x), words.lookup(numbers.lookup(x))), WORDS)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_numbers(dtype):
    squares = table(tf.constant([3, -2, 10], dtype), tf.constant([9.0, 4.0, 100.0]), -1.0)
    same_as_tensorflow(squares.lookup, np.array([[10, 3], [4, -2], [-3, 11]], dtype))


def test_a_large_vocabulary():
    keys = [f"word{i}" for i in range(20000)]
    numbers = table(keys, tf.range(20000), -1)
    wanted = np.array([b"word19999", b"word", b"word0", b"word777"])
    (found,) = same_as_tensorflow(numbers.lookup, wanted)
    assert found.numpy().tolist() == [19999, -1, 0, 777]


def test_keras_string_lookup():
    layer = keras.layers.StringLookup(vocabulary=["a", "b"], num_oov_indices=2)
    same_as_tensorflow(layer, WORDS)


def test_keras_text_vectorization():
    layer = keras.layers.TextVectorization(output_sequence_length=4)
    layer.adapt(["the cat sat", "the dog ran away"])
    same_as_tensorflow(layer, np.array([b"The cat, the DOG!", b"", b"no dog ran away from me"]))


def test_a_table_inside_control_flow_is_refused():
    numbers = table(["a"], [1], 0)

    def function(x):
        return tf.cond(
            tf.size(x) > 2, lambda: numbers.lookup(x), lambda: tf.zeros_like(x, tf.int32)
        )

    with pytest.raises(ProgramError, match=r"inside control flow.*before the condition"):
        trace(function, [tf.TensorSpec([None], tf.string)])


def test_what_changes_a_table_is_refused():
    numbers = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, 0)

    def function(x):
        numbers.insert(x, tf.ones_like(x, tf.int64))
        return numbers.lookup(x)

    with pytest.raises(ProgramError, match=r"looks keys up.*nothing else.*LookupTableInsertV2"):
        trace(function, [tf.TensorSpec([None], tf.string)])
