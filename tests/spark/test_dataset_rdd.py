"""RDDs into stores: every row once, in a fixed order, and errors that reach the driver."""

from itertools import pairwise

import numpy as np
import pytest
import tensorflow as tf

from tfspark.data.batches import evaluation_batches
from tfspark.data.dataset import TFDataset
from tfspark.data.failures import driver_errors
from tfspark.data.store import Store
from tfspark.errors import DataError, StoreLostError, UserFunctionError


def rows_rdd(sc, counts):
    """An RDD with these numbers of rows in its partitions; row = ([i, i], i)."""
    starts = np.cumsum([0, *counts])
    ranges = [range(a, b) for a, b in pairwise(starts)]
    rdd = sc.parallelize(range(len(counts)), len(counts)).flatMap(lambda p: ranges[p])
    return rdd.map(lambda i: (np.full(2, i, np.float32), i))


def dataset_of_rows(rdd, **options):
    return TFDataset.from_rdd(
        rdd,
        names=["x", "y"],
        shapes=[[2], []],
        types=[tf.float32, tf.int32],
        **{"batch_size": 4, **options},
    )


def contents(materialised):
    """The ids of every rank's rows."""
    result = []
    for handle in materialised.handles:
        x, y = Store.open(handle).read_range(0, handle.rows)
        assert (x == y[:, None]).all()
        result.append(y.tolist())
    return result


@pytest.mark.parametrize(
    ("counts", "num_ranks", "expected"),
    [
        ((3, 4), 2, [[0, 1, 2], [3, 4, 5, 6]]),
        ((2, 0, 3), 3, [[0, 1], [], [2, 3, 4]]),
        ((2, 1, 3, 1), 2, [[0, 1, 2], [3, 4, 5, 6]]),
        # Row i of partition p goes to rank (p + i) mod 3.
        ((4, 3), 3, [[0, 3, 6], [1, 4], [2, 5]]),
        ((1,), 4, [[0], [], [], []]),
    ],
)
def test_rows_go_to_ranks(sc, counts, num_ranks, expected):
    dataset = dataset_of_rows(rows_rdd(sc, counts))
    materialised = dataset.materialise(sc, num_ranks)
    assert contents(materialised) == expected
    assert [handle.rank for handle in materialised.handles] == list(range(num_ranks))
    local = dataset.materialise_local(num_ranks)
    assert contents(local) == expected
    assert [a.digest for a in materialised.handles] == [b.digest for b in local.handles]


def test_rebuilding_gives_the_same_rows_in_new_files(sc):
    materialised = dataset_of_rows(rows_rdd(sc, (40, 3))).materialise(sc, 3)
    again = materialised.rdd.unpersist().collect()
    assert [h.digest for h in again] == [h.digest for h in materialised.handles]
    assert not {h.path for h in again} & {h.path for h in materialised.handles}


def test_stores_lie_in_the_executors_own_folder(sc):
    (handle,) = dataset_of_rows(rows_rdd(sc, (3,))).materialise(sc, 1).handles
    assert "blockmgr" in handle.path and sc.applicationId in handle.path


def test_rows_are_inferred_from_the_first(sc):
    rdd = rows_rdd(sc, (3, 3))
    dataset = TFDataset.from_rdd(rdd, batch_size=2)
    assert [(f.name, f.dtype, f.shape) for f in dataset.spec.fields] == [
        ("features", "float32", (2,)),
        ("labels", "int64", ()),
    ]
    assert contents(dataset.materialise(sc, 2)) == [[0, 1, 2], [3, 4, 5]]


def test_nested_structures_and_text(sc):
    rdd = sc.parallelize([({"b": [i, i + 1], "a": (f"é{i}", b"\0")}, [i]) for i in range(3)], 1)
    dataset = TFDataset.from_rdd(
        rdd,
        features={"a": [(tf.string, []), (tf.string, [])], "b": (tf.float32, [2])},
        labels=(tf.int64, [1]),
        batch_size=2,
    )
    (handle,) = dataset.materialise(sc, 1).handles
    ((batch, rows),) = evaluation_batches(handle, 8)
    features, labels = dataset.row_spec.unflatten(batch)
    assert rows == 3 and labels.tolist() == [[0], [1], [2]]
    assert features["a"][0].tolist() == ["é0".encode(), "é1".encode(), "é2".encode()]
    assert features["b"].dtype == np.float32 and features["b"][2].tolist() == [2, 3]


def test_strings_and_bytes(sc):
    text = TFDataset.from_string_rdd(sc.parallelize(["a", "é"], 1), batch_per_thread=2)
    raw = TFDataset.from_bytes_rdd(sc.parallelize([b"\xff\0", bytearray(b"x")], 1))
    for dataset, expected in [(text, [b"a", "é".encode()]), (raw, [b"\xff\0", b"x"])]:
        (handle,) = dataset.materialise(sc, 1).handles
        assert Store.open(handle).read_range(0, 2)[0].tolist() == expected


class TestBadInput:
    """One clear error on the driver, with partition, row and field."""

    def test_an_empty_rdd(self, sc):
        empty = sc.parallelize([], 2)
        with pytest.raises(DataError, match=r"at least one row\. Received: an empty RDD"):
            TFDataset.from_rdd(empty, batch_size=2)
        with pytest.raises(DataError, match=r"at least one row.*none in 2 partitions"):
            dataset_of_rows(empty).materialise(sc, 2)
        with pytest.raises(DataError, match="at least one row"):
            dataset_of_rows(empty).materialise_local(2)

    @pytest.mark.parametrize("num_ranks", [1, 2, 3])
    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ((np.zeros(3), 1), r"'x' is float32 \[2\]\. Received: float64 \[3\]\. Convert"),
            ((np.zeros(2), 1.5), r"'y' is int32 \[\]\. Received: float64 \[\]"),
            ((np.zeros(2), None), "'y' is int32.*Received: null.*Fill or drop"),
            (([[1.0], [2.0, 3.0]], 1), "'x' is float32.*Received: a ragged value.*Pad"),
            (np.zeros(2), "declared structure.*fields are x, y"),
        ],
    )
    def test_a_row_that_breaks_its_declaration(self, sc, bad, message, num_ranks):
        rdd = rows_rdd(sc, (2, 5)).map(lambda row: bad if row[1] == 4 else row)
        with pytest.raises(DataError, match="(?s)" + message) as caught:
            dataset_of_rows(rdd).materialise(sc, num_ranks)
        assert (caught.value.partition, caught.value.row) == (1, 2)

    @pytest.mark.parametrize("num_ranks", [1, 2, 3])
    def test_a_user_function_that_raises(self, sc, num_ranks):
        rdd = rows_rdd(sc, (2, 5)).map(lambda row: 1 // (row[1] - 5) and row)
        with pytest.raises(UserFunctionError, match=r"(?s)ZeroDivisionError") as caught:
            dataset_of_rows(rdd).materialise(sc, num_ranks)
        assert (caught.value.partition, caught.value.row) == (1, 3)
        assert "test_dataset_rdd.py" in str(caught.value)
        assert "pyspark/worker" not in str(caught.value)

    def test_a_user_function_in_another_stage(self, sc):
        rdd = rows_rdd(sc, (2, 5)).map(lambda row: (1 // (row[1] - 5), row))
        shuffled = rdd.partitionBy(2, int).values()
        with pytest.raises(UserFunctionError, match=r"(?s)ZeroDivisionError"):
            dataset_of_rows(shuffled).materialise(sc, 2)

    def test_first_rows_of_different_shapes(self, sc):
        rdd = sc.parallelize([np.zeros(2), np.zeros(3)], 2)
        dataset = TFDataset.from_rdd(rdd, names=["x"], shapes=[[None]], types=["float32"])
        with pytest.raises(DataError, match="declared structure"):
            dataset.materialise(sc, 2)
        dataset = TFDataset.from_rdd(rdd, features=("float32", [None]))
        with pytest.raises(DataError, match=r"one shape.*'features': \[2\] and \[3\]"):
            dataset.materialise(sc, 2)

    def test_a_lost_store_is_told_from_other_errors(self, sc):
        import os

        materialised = dataset_of_rows(rows_rdd(sc, (2, 2))).materialise(sc, 2)
        os.unlink(materialised.handles[1].path)
        from tfspark.data.failures import reporting

        def read(handles):
            for handle in handles:
                with reporting(rank=handle.rank, phase="gradient"):
                    Store.open(handle)
            return []

        with pytest.raises(StoreLostError) as caught, driver_errors():
            materialised.rdd.mapPartitions(read).collect()
        assert caught.value.rank == 1 and caught.value.phase == "gradient"

    def test_what_spark_itself_says_stays(self, sc):
        with pytest.raises(Exception, match=r"(?i)input path does not exist"), driver_errors():
            sc.textFile("/no/such/file").collect()
