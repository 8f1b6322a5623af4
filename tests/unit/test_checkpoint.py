"""Checkpoints: atomic, readable without tfspark, honest about damage, free of the rank count."""

import json
import math
import os
import pickle
import resource
import stat
from dataclasses import replace

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from stored import FLAT, WEIGHTS, manifest_of, shard_arrays

from tfspark.errors import CheckpointError, InvalidInputError
from tfspark.graph.program import StateSlot, UpdateSlot, Weight
from tfspark.train.checkpoint import CheckpointStore, Retention
from tfspark.train.manifest import GroupEntry, Manifest, compare_tensors


def save(store, step, num_ranks=2, offset=0.0, buckets=(9,)):
    manifest = manifest_of(step, num_ranks, buckets)
    attempt = pickle.loads(pickle.dumps(store.begin(step)))
    executor_store = pickle.loads(pickle.dumps(store))
    shards = [
        executor_store.write_shard(attempt, rank, shard_arrays(manifest, rank, offset))
        for rank in reversed(range(num_ranks))
    ]
    return store.commit(attempt, manifest, pickle.loads(pickle.dumps(shards)))


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    if request.param == "local":
        yield CheckpointStore(str(tmp_path / "model"))
    else:
        yield CheckpointStore("memory://model")
        MemoryFileSystem().rm("/", recursive=True)


def test_a_checkpoint_comes_back_as_it_was_written(store):
    written = save(store, 120)
    read = store.latest()
    assert read == written
    assert store.list() == (120,)
    assert store.latest_whole().manifest == written
    for rank in range(2):
        expected = shard_arrays(written, rank)
        arrays = store.read_shard(read, rank)
        assert arrays.keys() == expected.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, expected[name], strict=True)
    seed, mean = store.read_state(read)
    np.testing.assert_array_equal(seed, np.int64([7, 8]), strict=True)
    assert mean == 0.25 and mean.shape == ()
    weights = store.read_weights(read)
    np.testing.assert_array_equal(weights["dense/kernel"], FLAT[0][:6].reshape(2, 3), strict=True)
    np.testing.assert_array_equal(weights["dense/bias"], FLAT[0][6:], strict=True)
    np.testing.assert_array_equal(weights["scale"], np.float32(42.5))


@pytest.mark.parametrize("buckets", [(9,), (4, 5), (2, 6, 1)])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 12])
def test_any_range_can_be_read_for_another_number_of_ranks(store, num_ranks, buckets):
    manifest = save(store, 5, num_ranks, buckets=buckets)
    for readers in (1, 2, 4):
        size = -(-9 // readers)
        for rank in range(readers):
            start, stop = rank * size, (rank + 1) * size
            expected = np.pad(FLAT[0], (0, readers * size - 9))[start:stop]
            np.testing.assert_array_equal(store.read_flat_range(manifest, 0, start, stop), expected)
            np.testing.assert_array_equal(
                store.read_slot_range(manifest, 0, "momentum", start, stop), -expected
            )
    np.testing.assert_array_equal(store.read_flat_range(manifest, 1, 0, 1), FLAT[1])
    assert store.read_slot_range(manifest, 0, "iteration", 0, 9) == 5
    assert store.read_flat_range(manifest, 0, 4, 4).shape == (0,)
    with pytest.raises(CheckpointError, match=r"momentum.*Received: 'velocity'"):
        store.read_slot_range(manifest, 0, "velocity", 0, 1)


def test_slots_beyond_the_group_have_their_initial_value(store):
    attempt = store.begin(1)
    slot = UpdateSlot("accumulator", "vector", "float32", 0.1)
    manifest = replace(manifest_of(1, 1), groups=(GroupEntry(0, 2, 2, "Adagrad", (slot,)),))
    arrays = {
        "weights/0": np.float32([1, 2]),
        "slots/0/accumulator": np.float32([3, 4]),
        "state/0": np.int64([0, 0]),
        "state/1": np.float64(0),
    }
    manifest = store.commit(attempt, manifest, [store.write_shard(attempt, 0, arrays)])
    read = store.read_slot_range(manifest, 0, "accumulator", 0, 3)
    np.testing.assert_array_equal(read, np.float32([3, 4, 0.1]))


@pytest.mark.parametrize("buckets", [(9,), (4, 5)])
def test_weights_can_be_read_with_json_and_numpy_alone(tmp_path, buckets):
    save(CheckpointStore(str(tmp_path)), 120, num_ranks=3, buckets=buckets)

    # The code of the module's docstring, word for word but for the folder.
    manifest = json.load(open(tmp_path / "step-00000120.json"))  # noqa: SIM115
    shards = [
        (shard, np.fromfile(tmp_path / manifest["folder"] / shard["file"], dtype=np.uint8))
        for shard in manifest["shards"]
    ]

    def array(shard, content, name):
        entry = shard["arrays"][name]
        dtype = np.dtype(entry["dtype"]).newbyteorder("<")
        count = int(np.prod(entry["shape"], dtype=int))
        return np.frombuffer(content, dtype, count, entry["offset"]).reshape(entry["shape"])

    weights = {}
    for index, group in enumerate(manifest["groups"]):
        parts = [array(shard, content, f"weights/{index}") for shard, content in shards]
        buckets, offset = [], 0
        for size in group["buckets"]:
            share = -(-size // len(parts))
            bucket = np.concatenate([part[offset : offset + share] for part in parts])
            buckets.append(bucket[:size])
            offset += share
        vector = np.concatenate(buckets)
        for tensor in manifest["tensors"]:
            if tensor["group"] == index:
                start = tensor["offset"] - group["offset"]
                size = int(np.prod(tensor["shape"], dtype=int))
                weights[tensor["name"]] = vector[start : start + size].reshape(tensor["shape"])

    np.testing.assert_array_equal(weights["dense/kernel"], FLAT[0][:6].reshape(2, 3))
    np.testing.assert_array_equal(weights["dense/bias"], FLAT[0][6:])
    np.testing.assert_array_equal(weights["scale"], np.float32(42.5))
    assert all(a["offset"] % 64 == 0 for s in manifest["shards"] for a in s["arrays"].values())


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "float16", "bfloat16", "complex64"])
def test_every_numeric_dtype_survives(store, dtype):
    import ml_dtypes  # noqa: F401  (makes NumPy know bfloat16)

    values = np.asarray([[0, 1], [1, 0]]).astype(dtype)
    attempt = store.begin(1)
    arrays = {"weights/0": np.zeros(0, np.float32), "state/0": values}
    manifest = replace(
        manifest_of(1, 1),
        groups=(GroupEntry(0, 0, 0, "SGD", ()),),
        state=(StateSlot("s", dtype, (2, 2), "first"),),
    )
    manifest = store.commit(attempt, manifest, [store.write_shard(attempt, 0, arrays)])
    np.testing.assert_array_equal(store.read_state(manifest)[0], values, strict=True)


def test_python_objects_are_refused(store):
    with pytest.raises(CheckpointError, match=r"rank 3.*'state/0' with dtype object"):
        store.write_shard(store.begin(1), 3, {"state/0": np.array([b"a"], object)})


def test_local_files_are_private(tmp_path):
    store = CheckpointStore(str(tmp_path / "a" / "model"))
    save(store, 1)
    for folder, _, files in os.walk(tmp_path / "a" / "model"):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        for file in files:
            assert stat.S_IMODE(os.stat(f"{folder}/{file}").st_mode) == 0o600


def test_a_relative_folder_means_the_drivers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = CheckpointStore("model")
    monkeypatch.chdir("/")
    save(store, 1)
    assert (tmp_path / "model" / "step-00000001.json").exists()


def test_every_cut_of_every_file_is_noticed(tmp_path):
    store = CheckpointStore(str(tmp_path))
    old = save(store, 1)
    new = save(store, 2, offset=1.0)
    paths = [tmp_path / "step-00000002.json"]
    paths += [tmp_path / new.folder / shard.file for shard in new.shards]
    for path in paths:
        content = path.read_bytes()
        for length in {0, 1, len(content) // 2, len(content) - 1}:
            path.write_bytes(content[:length])
            found = store.latest_whole()
            assert found.manifest == old
            ((step, reason),) = found.skipped
            assert step == 2 and ("truncated" in reason or "cannot be read" in reason)
        path.write_bytes(content)
        assert store.latest_whole() == type(found)(new, ())


def test_a_flipped_bit_and_a_missing_file_are_noticed(tmp_path):
    store = CheckpointStore(str(tmp_path))
    save(store, 1)
    new = save(store, 2)
    path = tmp_path / new.folder / "rank-00001.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    found = store.latest_whole()
    assert found.manifest.step == 1
    assert "rank-00001.bin is damaged: its CRC-32" in found.skipped[0][1]
    with pytest.raises(CheckpointError, match=r"rank 1, step 2.*damaged"):
        store.read_shard(new, 1)
    path.unlink()
    assert "rank-00001.bin is missing" in store.latest_whole().skipped[0][1]
    with pytest.raises(CheckpointError, match="missing"):
        store.read_flat_range(new, 0, 0, 9)
    assert store.read_flat_range(new, 0, 0, 5).tolist() == [0, 1, 2, 3, 4]


def test_nothing_whole_is_said_so(tmp_path):
    store = CheckpointStore(str(tmp_path / "none"))
    assert store.list() == () and store.latest() is None
    assert store.latest_whole().manifest is None
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        store.read(7)


class Flaky(MemoryFileSystem):
    """A store that fails at its n-th write; the class attributes are shared by all instances."""

    protocol = ("flaky",)
    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    writes_left = math.inf

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def unstrip_protocol(self, name):
        return "flaky://" + name

    def _count(self):
        type(self).writes_left -= 1
        if type(self).writes_left < 0:
            raise OSError("disk full")

    def pipe_file(self, path, value, **kwargs):
        self._count()
        super().pipe_file(path, value, **kwargs)


class FlakyRenaming(Flaky):
    """The same, of the kind that is written by rename; fails half-way through a file."""

    protocol = ("flaky-hdfs", "hdfs")
    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky-hdfs://", "memory://"))

    def unstrip_protocol(self, name):
        return "flaky-hdfs://" + name

    def mv(self, path1, path2, **kwargs):
        self._count()
        super().mv(path1, path2, **kwargs)


@pytest.mark.parametrize("filesystem", [Flaky, FlakyRenaming])
@pytest.mark.parametrize("writes", [0, 1, 2])  # two shards and a manifest
def test_a_failure_at_any_write_leaves_the_last_checkpoint(filesystem, writes):
    protocol = filesystem.protocol[0]
    fsspec.register_implementation(protocol, filesystem, clobber=True)
    filesystem.store.clear()
    filesystem.writes_left = math.inf
    store = CheckpointStore(f"{protocol}://model")
    first = save(store, 1)
    filesystem.writes_left = writes
    with pytest.raises(CheckpointError, match="disk full") as failure:
        save(store, 2)
    assert failure.value.where == ({"step": 2} if writes == 2 else {"rank": 1 - writes})
    filesystem.writes_left = math.inf
    assert store.list() == (1,)
    assert store.latest_whole().manifest == first
    second = save(store, 2)
    assert store.latest_whole().manifest == second
    files = {path.split("/")[2] for path in filesystem.store if path.count("/") >= 2}
    assert files == {"step-00000001.json", "step-00000002.json", first.folder, second.folder}
    filesystem.writes_left = 0
    with pytest.raises(CheckpointError, match="model_dir must be a folder that can be written"):
        store.check_writable()


@pytest.mark.parametrize(("limit_bytes", "where"), [(16, {"rank": 1}), (1024, {"step": 2})])
def test_a_full_local_disk_leaves_the_last_checkpoint(tmp_path, limit_bytes, where):
    store = CheckpointStore(str(tmp_path))
    first = save(store, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large") as failure:
            save(store, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failure.value.where == where
    assert store.list() == (1,)
    assert store.latest_whole().manifest == first
    second = save(store, 2)
    assert store.latest_whole().manifest == second
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-00000001.json",
        "step-00000002.json",
        first.folder,
        second.folder,
    }


def test_leftovers_go_and_strangers_stay(tmp_path):
    store = CheckpointStore(str(tmp_path))
    kept = save(store, 1)
    unfinished = store.begin(2)
    (tmp_path / ".step-00000002.json.0123abcd.part").write_text("{")
    (tmp_path / "notes.json").write_text("mine")
    (tmp_path / "step-by-step").mkdir()
    attempt = store.begin(2)
    assert unfinished.folder != attempt.folder
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-00000001.json",
        kept.folder,
        attempt.folder,
        "notes.json",
        "step-by-step",
    }


def test_the_data_of_an_unreadable_manifest_stays(tmp_path):
    store = CheckpointStore(str(tmp_path))
    damaged = save(store, 1)
    (tmp_path / "step-00000001.json").write_text("{")
    store.begin(2)
    assert (tmp_path / damaged.folder / "rank-00000.bin").exists()


def test_a_step_committed_again_replaces_itself(store):
    save(store, 1)
    again = save(store, 1, offset=2.0)
    assert store.list() == (1,)
    assert store.read_weights(store.latest_whole().manifest)["scale"] == 44.5
    assert store.latest() == again


def test_commit_wants_every_rank_and_every_array(store):
    attempt = store.begin(4)
    manifest = manifest_of(4, 2)
    shards = [store.write_shard(attempt, r, shard_arrays(manifest, r)) for r in range(2)]
    with pytest.raises(CheckpointError, match=r"ranks \[0\] of 2"):
        store.commit(attempt, manifest, shards[:1])
    with pytest.raises(CheckpointError, match="step 3"):
        store.commit(attempt, replace(manifest, step=3), shards)
    arrays = shard_arrays(manifest, 1)
    del arrays["slots/0/momentum"]
    broken = [shards[0], store.write_shard(attempt, 1, arrays)]
    with pytest.raises(CheckpointError, match=r"rank 1.*slots/0/momentum: None instead of \(5,\)"):
        store.commit(attempt, manifest, broken)
    assert store.list() == ()


def test_commit_notices_files_the_driver_cannot_see(tmp_path):
    attempt = CheckpointStore(str(tmp_path / "driver")).begin(1)
    manifest = manifest_of(1, 1)
    elsewhere = CheckpointStore(str(tmp_path / "executor"))
    os.makedirs(tmp_path / "executor" / attempt.folder)
    shard = elsewhere.write_shard(attempt, 0, shard_arrays(manifest, 0))
    with pytest.raises(CheckpointError, match=r"rank 0.*missing.*all machines share"):
        CheckpointStore(str(tmp_path / "driver")).commit(attempt, manifest, [shard])


def test_retention(store):
    for step in (10, 20, 30, 40, 50):
        save(store, step)
    assert store.retain(Retention(keep_last=2, keep_every=20)) == (10, 30)
    assert store.list() == (20, 40, 50)
    assert store.latest_whole().skipped == ()
    fs, root = fsspec.core.url_to_fs(store.model_dir)
    assert len(fs.ls(root)) == 6
    assert store.retain(Retention(keep_last=2, keep_every=20)) == ()
    with pytest.raises(InvalidInputError, match="keep_last=0"):
        Retention(keep_last=0)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for model_dir in (str(tmp_path / "file"), str(tmp_path / "file" / "below")):
        with pytest.raises(CheckpointError, match=r"can be written.*Received: model_dir='file://"):
            CheckpointStore(model_dir).check_writable()
    CheckpointStore(str(tmp_path / "new")).check_writable()
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(InvalidInputError, match="nowhere"):
        CheckpointStore("nowhere://model")


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path):
    store = CheckpointStore(str(tmp_path))
    manifest = save(store, 1)
    for evil in (
        replace(manifest, folder="../step-00000001-00000000"),
        replace(manifest, shards=(replace(manifest.shards[0], file="../../etc/passwd"),)),
    ):
        with pytest.raises(CheckpointError, match="own data folder only"):
            Manifest.from_json(evil.to_json())


def test_a_later_format_is_refused(tmp_path):
    document = json.loads(save(CheckpointStore(str(tmp_path)), 1).to_json())
    with pytest.raises(CheckpointError, match="format 99"):
        Manifest.from_json(json.dumps(document | {"format": 99}))


def test_compare_tensors_names_every_difference():
    manifest = manifest_of(1, 1)
    compare_tensors(manifest, WEIGHTS)
    compare_tensors(manifest, WEIGHTS[::-1])
    with pytest.raises(CheckpointError) as error:
        compare_tensors(manifest, (Weight("dense/kernel", (3, 2)), WEIGHTS[1], Weight("new", ())))
    message = str(error.value)
    assert "new: only in the model" in message
    assert "scale: only in the checkpoint" in message
    assert "dense/kernel: float32 (3, 2) in the model, float32 (2, 3) in the che" in message
    assert "dense/bias" not in message
    with pytest.raises(CheckpointError, match="scale: float64"):
        compare_tensors(manifest, WEIGHTS, "float64")
