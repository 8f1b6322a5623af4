"""The user's map over rows against tf.data's own, and its randomness."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfspark.data.mapping import RowMapping
from tfspark.data.order import row_seeds
from tfspark.data.spec import Field, RowSpec
from tfspark.errors import DataError
from tfspark.graphdef.loader import load

SPEC = RowSpec.of((Field("x", "float32", (3,)), Field("s", "string", ())))
X = np.arange(12, dtype=np.float32).reshape(4, 3)
S = np.array([b"1", b"22", b"", b"4"], object)


def seeds(ids, epoch=0):
    return row_seeds(9, 0, epoch, np.asarray(ids))


def test_a_map_equals_that_of_tf_data():
    def function(x, s):
        if tf.reduce_sum(x) > 20.0:  # AutoGraph, as in tf.data
            x = -x
        return {"b": x[:2] * 2.0, "a": (tf.strings.length(s), s)}

    mapping = RowMapping.identity(SPEC).then(function)
    expected = list(tf.data.Dataset.from_tensor_slices((X, S)).map(function).as_numpy_iterator())
    rows = zip(*(v.numpy() for v in load(mapping.batch)(X, S, seeds(range(4)))), strict=True)
    for row, other in zip(map(mapping.target.unflatten, rows), expected, strict=True):
        assert row["a"] == other["a"]
        assert (row["b"] == other["b"]).all()
    assert [(f.dtype, f.shape) for f in mapping.target.fields] == [
        ("int32", ()),
        ("string", ()),
        ("float32", (2,)),
    ]


def test_words_become_numbers_by_a_lookup_table():
    layer = keras.layers.StringLookup(vocabulary=["1", "22"])
    mapping = RowMapping.identity(SPEC).then(lambda x, s: (x, layer(s)))
    _, numbers = load(mapping.batch)(X, S, seeds(range(4)))
    assert numbers.numpy().tolist() == [1, 2, 0, 0]


def test_maps_compose_and_keep_names():
    mapping = RowMapping.identity(SPEC).then(lambda x, s: (x + 1, s)).then(lambda x, s: (x * 2, s))
    x, s = load(mapping.batch)(X, S, seeds(range(4)))
    assert (x.numpy() == (X + 1) * 2).all() and s.numpy().tolist() == S.tolist()
    assert mapping.target.names == ("x", "s")


def test_a_row_that_is_one_tensor_or_a_dict_is_one_argument():
    one = RowMapping.identity(RowSpec.of(Field("x", "float32", (3,)))).then(lambda x: x + 1)
    assert (load(one.batch)(X, seeds(range(4)))[0].numpy() == X + 1).all()
    spec = RowSpec.of({"x": Field("x", "float32", (3,))})
    keyed = RowMapping.identity(spec).then(lambda row: {"x": row["x"] + 1})
    assert (load(keyed.batch)(X, seeds(range(4)))[0].numpy() == X + 1).all()


def test_randomness_is_a_function_of_the_row_seed():
    def noise(x, s):
        return x + tf.random.normal([3]), s

    mapping = RowMapping.identity(SPEC).then(noise)
    run = load(mapping.batch)
    whole = run(X, S, seeds(range(4)))[0].numpy()
    part = run(X[2:], S[2:], seeds([2, 3]))[0].numpy()
    assert (whole[2:] == part).all()
    assert (run(X, S, seeds(range(4), epoch=1))[0].numpy() != whole).all()
    assert np.unique(whole - X).size > 6
    twice = load(mapping.then(noise).batch)(X, S, seeds(range(4)))[0].numpy()
    first, second = whole - X, twice - whole
    assert (np.abs(first - second) > 1e-4).all()  # one function's numbers are not the other's


def test_random_numbers_have_their_distribution():
    spec = RowSpec.of(Field("x", "float32", ()))
    run = load(RowMapping.identity(spec).then(lambda x: x + tf.random.uniform([])).batch)
    count = 4000
    (values,) = run(np.zeros(count, np.float32), seeds(range(count)))
    histogram, _ = np.histogram(values.numpy(), 10, (0, 1))
    chi2 = ((histogram - count / 10) ** 2 / (count / 10)).sum()
    assert chi2 < 30  # 9 degrees of freedom
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 5 / np.sqrt(count)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, s: tf.py_function(lambda v: v, [x], tf.float32), "EagerPyFunc.*RDD"),
        (lambda x, s: tf.numpy_function(np.sin, [x], tf.float32), "PyFunc.*RDD"),
        (lambda x, s: tf.strings.to_number(tf.strings.split([s])), "known|dense"),
        (lambda x, s: tf.strings.split(s), r"known shapes.*set_shape"),
        (lambda x, s: (x, None), "dense tensors.*NoneType"),
    ],
)
def test_functions_that_cannot_be_shipped_are_refused(function, message):
    with pytest.raises(DataError, match="(?s)" + message):
        RowMapping.identity(SPEC).then(function)


def test_mapping_works_without_eager_execution(run_python):
    run_python("""
        import tensorflow as tf
        tf.compat.v1.disable_v2_behavior()
        import numpy as np
        from tfspark.data.mapping import RowMapping
        from tfspark.data.spec import Field, RowSpec
        from tfspark.graphdef.loader import load

        spec = RowSpec.of(Field("x", "float32", (2,)))
        graph = RowMapping.identity(spec).then(lambda x: x + 1).batch
        (y,) = load(graph)(np.zeros((3, 2), np.float32), np.zeros((3, 2), np.int64))
        assert (y.numpy() == 1).all()
    """)
