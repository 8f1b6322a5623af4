"""The layout against an independent description: a dictionary from element to (rank, place)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfspark.errors import InvalidInputError
from tfspark.graph.program import StateSlot, Weight
from tfspark.sync.layout import Layout, StateLayout, bucket_cuts

weights_of = st.lists(
    st.tuples(st.lists(st.integers(0, 4), max_size=3), st.integers(0, 2)), min_size=1, max_size=6
)


def build(shapes, num_ranks, buckets=1):
    groups = sorted({group for _, group in shapes})
    dense = {group: index for index, group in enumerate(groups)}
    weights = [
        Weight(f"w{i}", tuple(shape), dense[group])
        for i, (shape, group) in enumerate(sorted(shapes, key=lambda item: item[1]))
    ]
    cuts = bucket_cuts(weights, num_ranks, buckets)
    return Layout(tuple(weights), num_ranks, "float32", cuts)


@given(weights_of, st.integers(1, 5), st.integers(1, 4))
def test_split_and_join_are_inverse(shapes, num_ranks, buckets):
    layout = build(shapes, num_ranks, buckets)
    flat = np.arange(1, layout.size + 1, dtype="float32")
    shards = layout.split(flat)
    assert {shard.shape for shard in shards} == {(layout.shard_size,)}
    assert layout.join(shards).tolist() == flat.tolist()
    # Every element is in exactly one shard; all the rest is zero padding.
    everything = np.concatenate(shards)
    assert sorted(everything[everything != 0].tolist()) == flat.tolist()


@given(weights_of, st.integers(1, 5), st.integers(1, 4))
def test_segments_name_the_tensor_of_every_element(shapes, num_ranks, buckets):
    layout = build(shapes, num_ranks, buckets)
    within = np.concatenate([np.arange(weight.size) for weight in layout.weights]).astype("float32")
    owner = np.concatenate(
        [np.full(weight.size, i + 1) for i, weight in enumerate(layout.weights)]
    ).astype("float32")
    for rank in range(num_ranks):
        expected = layout.shard(owner, rank)
        found = np.zeros(layout.shard_size)
        for segment in layout.segments(rank):
            found[segment.start : segment.stop] = segment.tensor + 1
            length = segment.stop - segment.start
            assert (
                layout.shard(within, rank)[segment.start : segment.stop].tolist()
                == np.arange(segment.offset, segment.offset + length).tolist()
            )
        assert found.tolist() == expected.tolist()


sizes = st.lists(st.integers(0, 40), min_size=1, max_size=9)


@given(sizes, st.integers(1, 5), st.integers(2, 5))
def test_slices_of_buckets_are_the_padded_flat_vector(sizes, num_ranks, count):
    layout = build([((size,), 0) for size in sizes], num_ranks, count)
    flat = np.arange(1, layout.size + 1, dtype="float32")
    whole = np.full(num_ranks * layout.shard_size, -1, "float32")
    for rank, shard in enumerate(layout.split(flat)):
        for bucket in layout.buckets:
            whole[bucket.place(rank)] = shard[bucket.part]
    assert layout.pads_at_end
    assert whole.tolist() == flat.tolist() + [0] * (len(whole) - layout.size)


@given(sizes, st.integers(1, 5), st.integers(2, 5))
def test_a_bucket_is_there_with_its_tensors_and_those_behind_it(sizes, num_ranks, count):
    layout = build([((size,), 0) for size in sizes], num_ranks, count)
    bounds = np.cumsum([0, *sizes])
    tensors = layout.bucket_tensors()
    assert [index for each in tensors for index in each] == list(range(len(sizes)))
    for bucket, own in zip(layout.buckets, tensors, strict=True):
        assert layout.size == 0 or bucket.start < bucket.stop
        assert bounds[own.start] <= bucket.start + num_ranks - 1 or not own
        behind = range(own.start, len(sizes))
        assert set(np.flatnonzero(bounds[1:] > bucket.start)) <= set(behind) | {
            index for index in range(len(sizes)) if not sizes[index]
        }


def test_buckets_are_of_whole_tensors_and_about_equal():
    weights = [Weight(f"w{i}", (size,)) for i, size in enumerate((100, 100, 100, 100, 5))]
    assert bucket_cuts(weights, 1, 4) == (100, 200, 300)
    assert bucket_cuts(weights, 7, 2) == (203,)
    assert bucket_cuts(weights, 1, 1) == ()
    # One tensor is nearly all there is: what lies before it is a bucket, it is the other.
    assert bucket_cuts([Weight("a", (5,)), Weight("b", (999,)), Weight("c", (5,))], 2, 4) == (6,)
    assert bucket_cuts([Weight("a", (5,)), Weight("b", (999,), group=1)], 2, 4) == ()


@pytest.mark.parametrize("cuts", [(3,), (4, 4), (0,), (8,)])
def test_cuts_are_multiples_of_the_number_of_ranks_inside_the_vector(cuts):
    with pytest.raises(InvalidInputError, match=r"ascending multiples.*Received: cuts="):
        Layout((Weight("w", (8,)),), 2, "float32", cuts)


def test_groups_are_not_cut():
    with pytest.raises(InvalidInputError, match="inside the only group"):
        Layout((Weight("a", (4,)), Weight("b", (4,), group=1)), 2, "float32", (2,))


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
