"""tf.data data sets, TFRecord files and arrays, shared out among ranks."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tfspark.data import chunks
from tfspark.data.dataset import TFDataset
from tfspark.data.failures import driver_errors
from tfspark.data.store import Store
from tfspark.errors import DataError, UserFunctionError


def ids(materialised, field=0):
    return [
        Store.open(handle).read_range(0, handle.rows)[field].tolist()
        for handle in materialised.handles
    ]


def both(dataset, sc, num_ranks):
    """What Spark and this process materialise, which must be the same."""
    spark, local = dataset.materialise(sc, num_ranks), dataset.materialise_local(num_ranks)
    assert [h.digest for h in spark.handles] == [h.digest for h in local.handles]
    return spark


class TestTfData:
    def test_elements_are_dealt_to_ranks(self, sc):
        source = tf.data.Dataset.range(7).map(lambda i: {"i": i, "x": tf.cast(i, tf.float32) / 2})
        dataset = TFDataset.from_tf_data_dataset(source, batch_size=2)
        assert ids(both(dataset, sc, 3)) == [[0, 3, 6], [1, 4], [2, 5]]
        assert ids(dataset.materialise(sc, 2), 1) == [[0, 1, 2, 3], [0.5, 1.5, 2.5]]

    def test_shuffled_elements_are_dealt_once_and_rebuilt_alike(self, sc):
        noise = (
            tf.data.Dataset.range(50)
            .shuffle(50)
            .map(lambda i: (i, tf.random.uniform([2])), num_parallel_calls=2)
        )
        dataset = TFDataset.from_tf_data_dataset(noise, batch_size=2, seed=4)
        first = ids(dataset.materialise(sc, 2))
        assert sorted(first[0] + first[1]) == list(range(50)) and first[0] != sorted(first[0])
        assert ids(dataset.materialise(sc, 2)) == first

    def test_a_function_builds_each_shard(self, sc):
        def build(num_shards, index):
            return tf.data.Dataset.range(6).shard(num_shards, index).map(lambda i: (i, i * i))

        dataset = TFDataset.from_tf_data_dataset(build, batch_size=2)
        assert ids(both(dataset, sc, 2), 1) == [[0, 4, 16], [1, 9, 25]]

    def test_elements_of_open_shape(self, sc):
        source = tf.data.Dataset.from_generator(
            lambda: iter([[1.0, 2.0], [3.0, 4.0]]), output_signature=tf.TensorSpec([None])
        )
        dataset = TFDataset.from_tf_data_dataset(lambda n, i: source.shard(n, i), batch_size=2)
        assert dataset.spec.fields[0].shape == (None,)
        assert ids(dataset.materialise_local(2)) == [[[1.0, 2.0]], [[3.0, 4.0]]]

    def test_files_are_sharded_by_file_where_asked_for(self, sc, tmp_path):
        for number in range(2):
            (tmp_path / f"{number}.txt").write_text(f"{number}a\n{number}b\n")
        files = [str(tmp_path / f"{number}.txt") for number in range(2)]
        source = tf.data.TextLineDataset(files)
        sharded = TFDataset.from_tf_data_dataset(source, batch_size=2, auto_shard_files=True)
        assert ids(both(sharded, sc, 2)) == [[b"0a", b"0b"], [b"1a", b"1b"]]

    def test_data_sets_without_end_are_refused(self):
        with pytest.raises(DataError, match=r"must end.*Remove repeat\(\)"):
            TFDataset.from_tf_data_dataset(tf.data.Dataset.range(3).repeat(), batch_size=2)

    def test_python_functions_are_refused(self):
        source = tf.data.Dataset.range(3).map(
            lambda i: tf.ensure_shape(tf.py_function(lambda v: v, [i], tf.int64), [])
        )
        with pytest.raises(DataError, match=r"EagerPyFunc.*build\(num_shards, index\)"):
            TFDataset.from_tf_data_dataset(source, batch_size=2)

    def test_other_elements_are_refused(self):
        ragged = tf.data.Dataset.from_tensors(tf.ragged.constant([[1], [2, 3]]))
        with pytest.raises(DataError, match=r"dense tensors.*RaggedTensorSpec"):
            TFDataset.from_tf_data_dataset(ragged, batch_size=2)
        with pytest.raises(DataError, match=r"tf.data.Dataset.*Received: list"):
            TFDataset.from_tf_data_dataset([1, 2], batch_size=2)

    @pytest.mark.parametrize("where", ["spark", "local"])
    def test_an_error_names_the_row(self, sc, where):
        source = tf.data.Dataset.range(200).map(lambda i: 100 // (i - 141))
        dataset = TFDataset.from_tf_data_dataset(source, batch_size=2)
        with pytest.raises(UserFunctionError, match="Integer division by zero") as caught:
            dataset.materialise(sc, 2) if where == "spark" else dataset.materialise_local(2)
        # Sharding comes last, so every rank computes the element; it is between rows 70 and 71.
        assert (caught.value.partition, caught.value.row) in [(0, 71), (1, 70)]

    def test_graph_mode_scripts_ship_data_sets_too(self, run_python):
        run_python("""
            import numpy as np
            import tensorflow as tf
            tf.compat.v1.disable_v2_behavior()
            from tfspark import TFDataset
            from tfspark.data.store import Store

            source = tf.compat.v1.data.Dataset.range(4).map(lambda i: i + 1)
            dataset = TFDataset.from_tf_data_dataset(source, batch_size=2)
            first, second = dataset.materialise_local(2).handles
            assert Store.open(second).take(np.arange(2))[0].tolist() == [2, 4]
        """)


class TestTFRecords:
    @pytest.fixture
    def files(self, tmp_path):
        def example(number):
            x = tf.train.Feature(float_list=tf.train.FloatList(value=[number, number / 2]))
            y = tf.train.Feature(int64_list=tf.train.Int64List(value=[number]))
            features = tf.train.Features(feature={"x": x, "y": y})
            return tf.train.Example(features=features).SerializeToString()

        for file, numbers in [("a", [0, 1]), ("b", [2]), ("c", [3, 4, 5])]:
            with tf.io.TFRecordWriter(str(tmp_path / f"{file}.tfrecord")) as writer:
                for number in numbers:
                    writer.write(example(number))
        return tmp_path

    FEATURES = {  # noqa: RUF012
        "x": tf.io.FixedLenFeature([2], tf.float32),
        "y": tf.io.FixedLenFeature([], tf.int64),
    }

    @pytest.mark.parametrize("pattern", ["", "*.tfrecord"])
    def test_files_are_dealt_to_ranks(self, sc, files, pattern):
        path = str(files / pattern) if pattern else str(files)
        dataset = TFDataset.from_tfrecord_file(sc, path, batch_size=2, features=self.FEATURES)
        assert ids(both(dataset, sc, 2), 1) == [[0, 1, 3, 4, 5], [2]]
        assert ids(dataset.materialise(sc, 1), 0)[0][4] == [4.0, 2.0]

    def test_records_are_dealt_where_files_are_few(self, sc, files):
        dataset = TFDataset.from_tfrecord_file(
            sc, [str(files / "c.tfrecord")], batch_size=2, features=self.FEATURES
        )
        assert ids(both(dataset, sc, 2), 1) == [[3, 5], [4]]

    def test_raw_records_are_parsed_in_map(self, sc, files):
        dataset = TFDataset.from_tfrecord_file(sc, str(files / "b.tfrecord"), batch_size=2).map(
            lambda record: tf.io.parse_single_example(record, self.FEATURES)
        )
        assert dataset.spec.fields[0].dtype == "string"
        assert dataset.row_spec.names == ("x", "y")

    def test_other_features_and_files_are_refused(self, sc, files):
        with pytest.raises(DataError, match=r"FixedLenFeature.*VarLenFeature for 'x'"):
            TFDataset.from_tfrecord_file(
                sc, str(files), features={"x": tf.io.VarLenFeature(tf.int64)}
            )
        with pytest.raises(DataError, match=r"no file"):
            TFDataset.from_tfrecord_file(sc, str(files / "*.nothing"))


def test_arrays_are_cut_into_equal_slices(sc):
    x = np.arange(14, dtype=np.float32).reshape(7, 2)
    dataset = TFDataset.from_ndarrays((x, np.arange(7)), batch_size=2)
    assert ids(both(dataset, sc, 3), 1) == [[0, 1], [2, 3], [4, 5, 6]]
    assert ids(dataset.materialise(sc, 3)) == [x[:2].tolist(), x[2:4].tolist(), x[4:].tolist()]


def test_arrays_of_this_host_do_not_travel(sc):
    """The driver writes them once; stores are links to that, and are made anew from it."""
    dataset = TFDataset.from_ndarrays(np.arange(7), batch_size=2)
    materialised = dataset.materialise(sc, 3, shares_files=True)
    rows = [[0, 1], [2, 3], [4, 5, 6]]
    assert ids(materialised) == rows
    paths = [Path(handle.path) for handle in materialised.handles]
    originals = [Path(handle.path) for handle in materialised.originals]
    assert all(map(os.path.samefile, paths, originals))
    assert not set(paths) & set(originals)
    paths[1].unlink()
    materialised.rdd.unpersist(blocking=True)
    again = replace(materialised, handles=tuple(materialised.rdd.collect()))
    assert ids(again) == rows
    assert [h.digest for h in again.handles] == [h.digest for h in materialised.handles]
    originals[1].unlink()
    materialised.rdd.unpersist(blocking=True)
    with (
        pytest.raises(DataError, match=r"in a file of the driver.*Received: no file"),
        driver_errors(),
    ):
        materialised.rdd.collect()
    materialised.release()
    again.release()
    assert not any(path.exists() for path in originals)


def test_arrays_of_this_host_on_another_file_system(sc, tmp_path, monkeypatch):
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system that anybody may write to: /dev/shm of Linux")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        monkeypatch.setattr(chunks, "_process_folder", lambda: folder)
        dataset = TFDataset.from_ndarrays(np.arange(7), batch_size=2)
        materialised = dataset.materialise(sc, 3, shares_files=True)
        assert ids(materialised) == [[0, 1], [2, 3], [4, 5, 6]]
        pairs = zip(materialised.handles, materialised.originals, strict=True)
        assert not any(os.path.samefile(copy.path, original.path) for copy, original in pairs)
        assert {os.stat(h.path).st_mode & 0o777 for h in materialised.handles} == {0o600}
        materialised.release()


def test_fewer_rows_than_ranks(sc):
    dataset = TFDataset.from_ndarrays(np.arange(2), batch_size=2)
    assert sorted(ids(both(dataset, sc, 4))) == [[], [], [0], [1]]
