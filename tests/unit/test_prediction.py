"""Models as predictions, and their way to a worker, without Spark."""

import os
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfspark.data.spec import Field, RowSpec
from tfspark.errors import DataError, ProgramError, UserFunctionError
from tfspark.graph.prediction import prediction_from_function, prediction_from_keras
from tfspark.inference import shipping
from tfspark.inference.models import prediction_of
from tfspark.inference.rows import predict_arrays, stacked
from tfspark.inference.shipping import MOST_KEPT, _Content

DENSE = keras.layers.Dense
SPEC = RowSpec.of(Field("x", "float32", (3,)))


def rows(number=5):
    return np.random.default_rng(0).normal(size=(number, 3)).astype(np.float32)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden, self.drop = DENSE(4, "relu"), keras.layers.Dropout(0.5)
        self.norm = keras.layers.BatchNormalization()

    def call(self, x, training=False):
        return {"out": self.norm(self.drop(self.hidden(x), training=training), training=training)}


def test_a_subclassed_model_is_told_what_it_sees():
    model = Subclassed()
    with pytest.raises(ProgramError, match="no Input"):
        prediction_from_keras(model)
    prediction = prediction_of(model, inputs=("float32", [3]))
    assert prediction.outputs.names == ("out",)
    found = predict_arrays(prediction, rows(), 2)
    np.testing.assert_allclose(found["out"], model.predict(rows(), verbose=0)["out"], rtol=1e-5)


@pytest.mark.parametrize("structure", [dict, list, tuple])
def test_structures_go_in_and_come_out(structure):
    left, right = keras.Input([3], name="left"), keras.Input([], dtype="int32", name="right")
    table = keras.layers.Embedding(4, 2)(right)
    tensors = {"left": left, "right": right}
    results = {"sum": DENSE(1, name="sum")(left), "table": table}
    if structure is not dict:
        tensors, results = structure(tensors.values()), structure(results.values())
    model = keras.Model(tensors, results)
    given = {"left": rows(), "right": np.array([0, 1, 2, 3, 1], np.int32)}
    if structure is not dict:
        given = structure(given.values())
    prediction = prediction_from_keras(model)
    assert prediction.inputs.names == ("left", "right")
    found, expected = predict_arrays(prediction, given, 3), model.predict(given, verbose=0)
    for one, other in zip(tf.nest.flatten(found), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    if structure is dict:
        assert prediction.outputs.names == ("sum", "table")


def test_what_a_function_returns_has_rows():
    with pytest.raises(ProgramError, match=r"'prediction' of shape \[\]"):
        prediction_from_function(tf.reduce_sum, SPEC)
    with pytest.raises(ProgramError, match="'a' of an unknown shape"):
        prediction_from_function(
            lambda x: {"a": tf.reshape(x, tf.concat([tf.shape(x), [1]], 0)[: tf.shape(x)[0]])}, SPEC
        )
    totals = prediction_from_function(lambda x: tf.reduce_sum(x, axis=0), SPEC)
    with pytest.raises(UserFunctionError, match=r"'prediction' of shape \(3,\) for 5 rows"):
        predict_arrays(totals, rows(), 5)


def test_random_numbers_repeat():
    noisy = prediction_from_function(lambda x: x + tf.random.normal(tf.shape(x)), SPEC)
    first, second = (predict_arrays(noisy, rows(), 5) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - rows()).max() > 0.1


def test_a_later_change_of_the_model_is_not_seen():
    model = keras.Sequential([keras.Input([3]), DENSE(2)])
    prediction, before = prediction_from_keras(model), model.predict(rows(), verbose=0)
    model.set_weights([np.zeros_like(weight) for weight in model.get_weights()])
    np.testing.assert_allclose(predict_arrays(prediction, rows(), 5), before, rtol=1e-5)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": rows()}, "same number of rows"),
        (rows()[:, :2], r"float32 \[2\]"),
        (rows().astype(str), "x"),
        (np.float32(1), "same number of rows"),
    ],
)
def test_arrays_that_do_not_fit(arrays, said):
    prediction = prediction_from_function(lambda x: x, SPEC)
    with pytest.raises(DataError, match=said):
        predict_arrays(prediction, arrays, 5)


def test_rows_of_several_lengths_are_padded():
    field = Field("x", "int64", (None, 2))
    batch = stacked([[[1, 2]], np.zeros((0, 2), int), [[3, 4], [5, 6]]], field, 0, 0)
    np.testing.assert_array_equal(batch, [[[1, 2], [0, 0]], [[0, 0], [0, 0]], [[3, 4], [5, 6]]])
    words = stacked([["a"], ["b", "c"]], Field("x", "string", (None,)), 0, 0)
    assert words.tolist() == [[b"a", b""], [b"b", b"c"]]
    with pytest.raises(DataError, match="null") as caught:
        stacked([1.0, None], Field("x", "float32", ()), partition=3, first=10)
    assert (caught.value.partition, caught.value.row) == (3, 11)


class TestShipping:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(shipping, "store_folder", lambda rank: str(tmp_path / "executor"))
        return tmp_path / "executor"

    def content(self, *weights, name="f"):
        graph = prediction_from_function(lambda x: x, SPEC).graph
        return _Content.of(graph, weights, name)

    def sent(self, *weights, name):
        # Spark's protocol, which packs arrays where they lie.
        return pickle.loads(pickle.dumps(self.content(*weights, name=name), protocol=5))

    def test_weights_arrive_in_a_file_and_are_mapped(self, folder):
        weights = (
            np.arange(6, dtype=np.float32).reshape(2, 3),
            np.float64(7.5),
            np.array([], np.int32),
            np.arange(20, dtype=np.int64)[::2],
            np.ones((3, 1), np.float16),
        )
        made = self.content(*(np.asarray(weight) for weight in weights))
        packed = pickle.dumps(made, protocol=5)
        for _ in range(2):  # the second worker finds the file
            arrived = pickle.loads(packed)
            assert arrived.graph == made.graph and arrived.parts == ()
            for one, other in zip(arrived.weights(), weights, strict=True):
                np.testing.assert_array_equal(one, other)
                assert one.dtype == np.asarray(other).dtype and not one.flags.writeable
        (file,) = folder.iterdir()
        assert os.stat(file).st_mode & 0o777 == 0o600 and os.stat(folder).st_mode & 0o777 == 0o700
        assert all(one.ctypes.data % 64 == 0 for one in arrived.weights() if one.size)
        for one, other in zip(made.weights(), weights, strict=True):
            np.testing.assert_array_equal(one, other)  # the driver has its own

    def test_a_model_without_weights(self, folder):
        assert pickle.loads(pickle.dumps(self.content(), protocol=5)).weights() == []

    def test_the_oldest_files_go_and_stay_with_who_has_them(self, folder):
        first = self.sent(np.ones(3), name="first")
        (held,) = first.weights()
        os.utime(first.path, (0, 0))
        for number in range(MOST_KEPT):
            self.sent(np.zeros(3), name=f"n{number}")
        assert len(list(folder.iterdir())) == MOST_KEPT and not os.path.exists(first.path)
        np.testing.assert_array_equal(held, np.ones(3))
