"""Readers of files that something has damaged: one clear error or a result, never a crash."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from stored import SPEC, columns, manifest_of, rows_of, shard_arrays, write

from tfspark.data.store import Store
from tfspark.errors import CheckpointError, DataError
from tfspark.train.checkpoint import CheckpointStore
from tfspark.train.manifest import Manifest

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
TWISTED = settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A store with a checkpoint, and its manifest's text."""
    store = CheckpointStore(str(tmp_path_factory.mktemp("model")))
    manifest = manifest_of(5, 2)
    attempt = store.begin(5)
    shards = [store.write_shard(attempt, r, shard_arrays(manifest, r)) for r in range(2)]
    store.commit(attempt, manifest, shards)
    path = store.model_dir.removeprefix("file://") + "/step-00000005.json"
    with open(path) as file:
        return store, path, file.read()


def places(document, path=()):
    """The paths of all values of a JSON document."""
    yield path
    inner = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in inner:
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))
        else:
            yield (*path, key)


def replaced(document, path, value):
    if not path:
        return value
    changed = dict(document) if isinstance(document, dict) else list(document)
    changed[path[0]] = replaced(document[path[0]], path[1:], value)
    return changed


def read_everything(store):
    """What a resume reads, of whatever is there."""
    found = store.latest_whole()
    if found.manifest is None:
        return found.skipped
    store.read_weights(found.manifest)
    store.read_state(found.manifest)
    for rank in range(found.manifest.num_ranks):
        store.read_shard(found.manifest, rank)
    return None


class TestManifests:
    @TWISTED
    @given(st.data())
    def test_another_value_somewhere(self, checkpoint, data):
        store, path, text = checkpoint
        document = json.loads(text)
        where = data.draw(st.sampled_from(sorted(places(document), key=str)))
        changed = json.dumps(replaced(document, where, data.draw(VALUES)))
        self.read(store, path, changed.encode())

    @TWISTED
    @given(st.integers(0, 10**6), st.binary(max_size=6), st.integers(0, 40))
    def test_other_bytes_somewhere(self, checkpoint, start, new, length):
        store, path, text = checkpoint
        content = text.encode()
        start %= len(content)
        self.read(store, path, content[:start] + new + content[start + length :])

    @TWISTED
    @given(st.text() | st.binary().map(lambda b: b.decode("latin-1")))
    @example("[" * 100_000)
    @example('{"format": ' * 100_000)
    def test_any_text(self, text):
        with pytest.raises(CheckpointError):
            Manifest.from_json(text)

    @pytest.mark.parametrize(
        "change",
        [
            {"folder": "../elsewhere"},
            {"folder": "/etc"},
            {"folder": "step-00000005-00000000/../.."},
            {"shards": [{"rank": 0, "file": "../../x", "bytes": 1, "crc32": 0, "arrays": {}}]},
        ],
    )
    def test_no_file_outside_of_the_folder_is_named(self, checkpoint, change):
        document = {**json.loads(checkpoint[2]), **change}
        with pytest.raises(CheckpointError, match="own data folder only"):
            Manifest.from_json(json.dumps(document))

    @staticmethod
    def read(store, path, content):
        with open(path, "wb") as file:
            file.write(
                content if isinstance(content, bytes) else content.encode("utf-8", "replace")
            )
        before = sorted(os.listdir(os.path.dirname(path)))
        try:
            read_everything(store)
        except CheckpointError as error:
            assert str(error)
        assert sorted(os.listdir(os.path.dirname(path))) == before


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A store's handle and bytes."""
    path = tmp_path_factory.mktemp("store") / "a.arrow"
    handle = write(path, SPEC, rows=rows_of(columns(20)), chunk_bytes=300)
    return handle, path.read_bytes()


class TestStores:
    @TWISTED
    @given(
        st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
        st.booleans(),
    )
    def test_other_bytes_of_the_same_length(self, tmp_path, written, changes, in_metadata):
        handle, content = written
        damaged = bytearray(content)
        for place, byte in changes:
            # Three quarters of the file are numbers, where a change is just another number.
            places = min(600, len(content)) if in_metadata else len(content)
            damaged[-1 - place % places] = byte
        self.read(tmp_path, handle, bytes(damaged))

    @TWISTED
    @given(st.integers(0, 10**6), st.binary(max_size=64), st.integers(0, 64))
    def test_other_bytes_of_another_length(self, tmp_path, written, start, new, length):
        handle, content = written
        start %= len(content)
        damaged = content[:start] + new + content[start + length :]
        self.read(tmp_path, replace(handle, bytes=len(damaged)), damaged)

    @staticmethod
    def read(folder, handle, content):
        path = folder / "damaged.arrow"
        path.write_bytes(content)
        try:
            store = Store.open(replace(handle, path=str(path)))
            taken = store.take(np.arange(store.rows)[::-1])
            assert [len(column) for column in taken] == [store.rows] * 4
        except DataError as error:
            assert str(error)
        assert os.listdir(folder) == ["damaged.arrow"]
