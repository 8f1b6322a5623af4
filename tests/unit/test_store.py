"""Stores against the arrays that went in."""

import os
import pickle
import stat

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import SPEC, columns, rows_of, write

from tfspark.data.spec import NUMERIC_DTYPES, Field, RowSpec
from tfspark.data.store import Store, StoreWriter, check_agreement
from tfspark.errors import DataError, StoreLostError


def assert_same(taken, expected):
    for a, b in zip(taken, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a == b).all()


@given(
    st.integers(0, 40),
    st.integers(1, 600),
    st.booleans(),
    st.lists(st.integers(0, 10**6), max_size=30),
    st.data(),
)
@settings(deadline=None, max_examples=60)
def test_rows_come_back(tmp_path_factory, count, chunk_bytes, by_row, picks, data):
    arrays = columns(count)
    path = tmp_path_factory.mktemp("store") / "a.arrow"
    source = {"rows": rows_of(arrays)} if by_row else {"arrays": arrays if count else None}
    store = Store.open(write(path, SPEC, chunk_bytes=chunk_bytes, **source))
    assert store.rows == count
    ids = np.array([pick % count for pick in picks] if count else [], np.int64)
    assert_same(store.take(ids), [array[ids] for array in arrays])
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    assert_same(store.read_range(start, stop), [array[start:stop] for array in arrays])


@pytest.mark.parametrize("name", sorted(NUMERIC_DTYPES))
def test_every_dtype(tmp_path, name):
    dtype = np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
    array = np.arange(24).reshape(4, 3, 2).astype(dtype)
    handle = write(tmp_path / "a", RowSpec.of(Field("x", name, (3, 2))), rows=array)
    (taken,) = Store.open(handle).take(np.array([2, 0]))
    assert taken.dtype == dtype and (taken == array[[2, 0]]).all()


@pytest.mark.parametrize("dtype", ["float32", "string"])
def test_fields_without_elements(tmp_path, dtype):
    spec = RowSpec.of(Field("x", dtype, (2, 0)))
    handle = write(tmp_path / "a", spec, rows=[np.zeros((2, 0), spec.fields[0].numpy_dtype)] * 3)
    (taken,) = Store.open(handle).take(np.array([2, 0]))
    assert taken.shape == (2, 2, 0)


def test_a_range_of_one_chunk_is_not_copied(tmp_path):
    spec = RowSpec.of(Field("x", "float32", (4,)))
    array = np.arange(40, dtype=np.float32).reshape(10, 4)
    (view,) = Store.open(write(tmp_path / "a", spec, arrays=[array])).take(np.arange(3, 7))
    assert not view.flags.owndata and not view.flags.writeable
    assert (view == array[3:7]).all()


def test_the_digest_depends_on_rows_and_not_on_chunks(tmp_path):
    arrays = columns(30)
    digests = {
        write(tmp_path / f"{size}{by}", SPEC, chunk_bytes=size, **source).digest
        for size in (1, 100, 10_000)
        for by, source in enumerate(({"rows": rows_of(arrays)}, {"arrays": arrays}))
    }
    assert len(digests) == 1
    swapped = [np.concatenate([a[1:2], a[:1], a[2:]]) for a in arrays]
    assert write(tmp_path / "b", SPEC, arrays=swapped).digest not in digests


def test_the_first_row_decides_open_dimensions(tmp_path):
    spec = RowSpec.of((Field("x", "float32", (None, 2)),))
    handle = write(tmp_path / "a", spec, rows=[(np.ones((3, 2)),)])
    assert handle.spec.fields[0].shape == (3, 2)
    other = write(tmp_path / "b", spec, rows=[(np.ones((4, 2)),)])
    empty = write(tmp_path / "c", spec)
    assert check_agreement([empty, handle, handle]) == handle.spec
    with pytest.raises(DataError, match=r"one shape.*'x': \[3, 2\] and \[4, 2\]"):
        check_agreement([handle, other])
    with pytest.raises(DataError, match=r"row 1.*\[None, 2\]|row 1.*\[3, 2\]"):
        write(tmp_path / "d", spec, rows=[(np.ones((3, 2)),), (np.ones((4, 2)),)])


def test_files_are_private_and_appear_when_whole(tmp_path):
    path = tmp_path / "folder" / "a.arrow"
    with StoreWriter(str(path), SPEC, rank=0) as writer:
        writer.append_columns(columns(3))
        assert not path.exists()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["a.arrow"]
    with pytest.raises(DataError):
        write(path.parent / "b", SPEC, rows=[None])
    assert os.listdir(path.parent) == ["a.arrow"]


def test_a_lost_store_names_rank_and_host(tmp_path):
    handle = write(tmp_path / "a", SPEC, arrays=columns(3))
    os.unlink(tmp_path / "a")
    with pytest.raises(StoreLostError, match=rf"\[rank 3, host {handle.host}\]"):
        Store.open(pickle.loads(pickle.dumps(handle)))


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
def test_truncated_stores_are_refused(tmp_path, keep):
    handle = write(tmp_path / "a", SPEC, arrays=columns(100))
    size = int(handle.bytes * keep) if keep < 1 else keep
    os.truncate(tmp_path / "a", size)
    with pytest.raises(DataError, match="whole file"):
        Store.open(handle)


def test_foreign_stores_are_refused(tmp_path):
    handle = write(tmp_path / "a", SPEC, arrays=columns(3))
    write(tmp_path / "b", RowSpec.of(Field("x", "int8", ())), rows=[1, 2, 3])
    os.replace(tmp_path / "b", tmp_path / "a")
    with pytest.raises(DataError, match="whole file"):
        Store.open(handle)


def test_numbers_of_missing_rows_are_refused(tmp_path):
    store = Store.open(write(tmp_path / "a", SPEC, arrays=columns(3)))
    for ids in ([-1], [3]):
        with pytest.raises(IndexError):
            store.take(np.array(ids))


def test_memory_does_not_grow_with_the_store(tmp_path, run_python):
    # Anonymous memory is what a process cannot give back; mapped pages of a file it can.
    run_python(f"""
        import numpy as np
        from tfspark.data.spec import Field, RowSpec
        from tfspark.data.store import Store, StoreWriter

        def anonymous_mb():
            with open("/proc/self/status") as status:
                (line,) = [line for line in status if line.startswith("RssAnon")]
            return int(line.split()[1]) / 1024

        spec = RowSpec.of(Field("x", "float32", (1024,)))
        def run(megabytes):
            with StoreWriter({str(tmp_path)!r} + "/a", spec, rank=0) as writer:
                for i in range(256 * megabytes):
                    writer.append_row(np.full(1024, i, np.float32))
            store = Store.open(writer.handle)
            ids = np.random.default_rng(0).permutation(store.rows)
            for start in range(0, len(ids), 64):
                (batch,) = store.take(ids[start : start + 64])
                assert (batch[:, 7] == ids[start : start + 64]).all()

        run(8)
        before = anonymous_mb()
        run(200)
        assert anonymous_mb() - before < 20, (before, anonymous_mb())
    """)
