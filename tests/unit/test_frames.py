import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tfspark.errors import TrainingError
from tfspark.sync.frames import Message, decode, encode

ARRAYS = hnp.arrays(
    dtype=st.sampled_from(["float32", "float64", "int64", "uint8", "bool", "float16"]),
    shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
)


@given(st.dictionaries(st.text(max_size=8), ARRAYS, max_size=4), st.integers(0, 1000))
def test_round_trip(arrays, source):
    message = decode(encode(Message("gradient", source, {"rows": 3, "halt": None}, arrays)))
    assert (message.kind, message.source) == ("gradient", source)
    assert message.meta == {"rows": 3, "halt": None}
    assert list(message.arrays) == list(arrays)
    for name, array in arrays.items():
        assert message.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(message.arrays[name], array)


def test_bfloat16_and_strided_arrays():
    array = np.arange(12, dtype=ml_dtypes.bfloat16).reshape(3, 4)[:, ::2]
    back = decode(encode(Message("shard", 0, {}, {"x": array}))).arrays["x"]
    assert back.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(back, array)


def test_arrays_are_views_of_the_frame():
    frame = encode(Message("shard", 0, {}, {"x": np.arange(1000)}))
    array = decode(frame).arrays["x"]
    assert not array.flags.owndata
    assert not array.flags.writeable


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda frame: frame[:4], "at least 8 bytes"),
        (lambda frame: b"HTTP" + frame[4:], "starts with"),
        (lambda frame: frame[:-8], "ends at byte"),
    ],
)
def test_a_broken_frame_is_refused(damage, says):
    frame = encode(Message("shard", 0, {}, {"x": np.arange(1000)}))
    with pytest.raises(TrainingError, match=says):
        decode(damage(frame))
