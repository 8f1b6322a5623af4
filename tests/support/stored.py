"""A small checkpoint's parts, and a small store's rows."""

import numpy as np

from tfspark.data.spec import Field, RowSpec
from tfspark.data.store import StoreWriter
from tfspark.graph.program import StateSlot, UpdateSlot, Weight
from tfspark.train.manifest import GroupEntry, Manifest, tensor_entries

WEIGHTS = (Weight("dense/kernel", (2, 3)), Weight("dense/bias", (3,)), Weight("scale", (), 1))
SLOTS = (
    UpdateSlot("momentum", "vector", "float32", 0.0),
    UpdateSlot("iteration", "scalar", "int64", 0.0),
)
STATE = (StateSlot("seed", "int64", (2,), "seed"), StateSlot("mean", "float64", (), "mean"))
FLAT = (np.arange(9, dtype=np.float32), np.float32([42.5]))


def manifest_of(step, num_ranks, buckets=(9,)):
    share = sum(-(-size // num_ranks) for size in buckets)
    groups = (
        GroupEntry(0, 9, share, "SGD", SLOTS, buckets),
        GroupEntry(9, 1, 1, "Adam", ()),
    )
    return Manifest(
        step=step,
        epoch=1,
        rows=640,
        seed=3,
        batch_size=32,
        num_ranks=num_ranks,
        tensors=tensor_entries(WEIGHTS, "float32"),
        groups=groups,
        state=STATE,
        training={"plateau": {"best": None}},
        metrics={"loss": 0.5},
        versions={"tfspark": "0"},
    )


def shard_arrays(manifest, rank, offset=0.0):
    arrays = {}
    for index, group in enumerate(manifest.groups):
        slices, begin = [], 0
        for size in group.buckets:
            share = -(-size // manifest.num_ranks)
            padded = np.zeros(share * manifest.num_ranks, np.float32)
            padded[:size] = FLAT[index][begin : begin + size] + np.float32(offset)
            slices.append(padded[rank * share : (rank + 1) * share])
            begin += size
        mine = np.concatenate(slices)
        arrays[f"weights/{index}"] = mine
        for slot in group.slots:
            value = -mine if slot.kind == "vector" else np.int64(manifest.step)
            arrays[f"slots/{index}/{slot.name}"] = value
    if rank == 0:
        arrays |= {"state/0": np.int64([7, 8]), "state/1": np.float64(0.25)}
    return arrays


SPEC = RowSpec.of(
    {
        "x": Field("x", "float32", (2, 3)),
        "y": Field("y", "int32", ()),
        "s": Field("s", "string", ()),
        "t": Field("t", "string", (2,)),
    }
)


def columns(count, seed=0):
    rng = np.random.default_rng(seed)
    text = np.empty(count, object)
    pairs = np.empty((count, 2), object)
    for i in range(count):
        text[i] = rng.bytes(int(rng.integers(0, 9)))
        pairs[i] = [b"a\0" * int(rng.integers(0, 3)), f"é{i}".encode()]
    # Flat order of a dict is that of its sorted keys: s, t, x, y.
    return [
        text,
        pairs,
        rng.normal(size=(count, 2, 3)).astype(np.float32),
        rng.integers(-9, 9, count).astype(np.int32),
    ]


def rows_of(arrays):
    for s, t, x, y in zip(*arrays, strict=True):
        yield {"s": s, "t": t, "x": x, "y": y}


def write(path, spec, *, rows=None, arrays=None, **options):
    with StoreWriter(str(path), spec, rank=3, **options) as writer:
        for row in () if rows is None else rows:
            writer.append_row(row)
        if arrays:
            writer.append_columns(arrays)
    return writer.handle
