"""The layout against an independent description: a dictionary from element to (rank, place)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfspark.graph.program import StateSlot, Weight
from tfspark.sync.layout import Layout, StateLayout

weights_of = st.lists(
    st.tuples(st.lists(st.integers(0, 4), max_size=3), st.integers(0, 2)), min_size=1, max_size=6
)


def build(shapes, num_ranks):
    groups = sorted({group for _, group in shapes})
    dense = {group: index for index, group in enumerate(groups)}
    weights = [
        Weight(f"w{i}", tuple(shape), dense[group])
        for i, (shape, group) in enumerate(sorted(shapes, key=lambda item: item[1]))
    ]
    return Layout(tuple(weights), num_ranks, "float32")


@given(weights_of, st.integers(1, 5))
def test_split_and_join_are_inverse(shapes, num_ranks):
    layout = build(shapes, num_ranks)
    flat = np.arange(1, layout.size + 1, dtype="float32")
    shards = layout.split(flat)
    assert {shard.shape for shard in shards} == {(layout.shard_size,)}
    assert layout.join(shards).tolist() == flat.tolist()
    # Every element is in exactly one shard; all the rest is zero padding.
    everything = np.concatenate(shards)
    assert sorted(everything[everything != 0].tolist()) == flat.tolist()


@given(weights_of, st.integers(1, 5))
def test_segments_name_the_tensor_of_every_element(shapes, num_ranks):
    layout = build(shapes, num_ranks)
    owner = np.concatenate(
        [np.full(weight.size, i + 1) for i, weight in enumerate(layout.weights)]
    ).astype("float32")
    for rank in range(num_ranks):
        expected = layout.shard(owner, rank)
        found = np.zeros(layout.shard_size)
        for segment in layout.segments(rank):
            found[segment.start : segment.stop] = segment.tensor + 1
        assert found.tolist() == expected.tolist()


def test_a_shard_without_padding_is_a_view():
    layout = Layout((Weight("w", (6,)),), 2, "float32")
    flat = np.zeros(6, "float32")
    assert np.shares_memory(layout.shard(flat, 1), flat)


def test_tensors_have_their_shapes():
    layout = Layout((Weight("a", (2, 3)), Weight("b", ())), 2, "float32")
    a, b = layout.tensors(np.arange(7, dtype="float32"))
    assert a.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert b == 6


def test_state_travels_by_kind():
    slots = (
        StateSlot("mean", "float32", (3,), "mean"),
        StateSlot("seed", "int64", (2,), "seed"),
        StateSlot("frozen", "float32", (2,), "constant"),
        StateSlot("variance", "float16", (), "mean"),
    )
    layout = StateLayout(slots, num_ranks=3)
    state = [
        np.array([1, 2, 3], "float32"),
        np.array([7, 8]),
        np.array([0.5, 0.25], "float32"),
        np.array(4, "float16"),
    ]
    vector = layout.pack(state)
    assert layout.mean_size == 4
    assert vector.shape == (6,)
    parts = [layout.slice_of(vector, rank) for rank in range(3)]
    back = layout.assemble(state, np.concatenate(parts) * 2, [np.array([9, 9])])
    assert [value.dtype.name for value in back] == ["float32", "int64", "float32", "float16"]
    assert [value.tolist() for value in back] == [[2, 4, 6], [9, 9], [0.5, 0.25], 8]


@pytest.mark.parametrize("num_ranks", [1, 2, 7])
def test_more_ranks_than_elements(num_ranks):
    layout = Layout((Weight("w", (3,)),), num_ranks, "float64")
    flat = np.array([1.0, 2.0, 3.0])
    assert layout.join(layout.split(flat)).tolist() == [1, 2, 3]
