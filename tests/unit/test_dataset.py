"""TFDataset without Spark: declarations, batching, placeholders, map."""

import numpy as np
import pytest
import tensorflow as tf

from tfspark.data.batches import BatchReader
from tfspark.data.dataset import Batching, TFDataset, dataset_of
from tfspark.data.order import BatchOrder
from tfspark.data.store import Store
from tfspark.errors import DataError, InvalidInputError

X = np.arange(12, dtype=np.float32).reshape(6, 2)
Y = np.arange(6, dtype=np.int32)


def test_arrays_reach_a_rank_in_their_structure():
    source = ({"a": X, "b": Y}, [Y, X.astype(np.float64)])
    dataset = TFDataset.from_ndarrays(source, batch_size=4)
    handles = dataset.materialise_local(2).handles
    (features, labels) = dataset.row_spec.unflatten(Store.open(handles[1]).take(np.array([2, 0])))
    assert (features["a"] == X[[5, 3]]).all() and labels[0].tolist() == [5, 3]
    assert labels[1].dtype == np.float64 and dataset.labelled


def test_text_in_arrays():
    dataset = TFDataset.from_ndarrays(np.array(["a", "é"]), batch_size=1)
    (handle,) = dataset.materialise_local(1).handles
    assert Store.open(handle).read_range(0, 2)[0].tolist() == [b"a", "é".encode()]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((X, Y[:3]), r"one first dimension.*shapes \[6, 2\], \[3\]"),
        (np.float32(1), r"one first dimension.*shapes \[\]"),
        (X[:0], "at least one row"),
    ],
)
def test_arrays_that_are_no_rows(tensors, message):
    with pytest.raises(DataError, match=message):
        TFDataset.from_ndarrays(tensors, batch_size=1)


def test_validation_must_have_the_same_structure():
    dataset = TFDataset.from_ndarrays((X, Y), batch_size=2, val_tensors=(X[:2], Y[:2]))
    assert dataset.validation.materialise_local(1).rows_per_rank == (2,)
    with pytest.raises(DataError, match="structure of tensors"):
        TFDataset.from_ndarrays((X, Y), batch_size=2, val_tensors=X)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0, "batch_per_thread": -1}, "at least one row.*batch_size=0"),
        ({"batch_size": -1, "batch_per_thread": -2}, "batch_per_thread=-2"),
        ({"batch_size": 2.0, "batch_per_thread": -1}, "batch_size=2.0"),
        ({"batch_size": 2, "batch_per_thread": 3}, "Received: both, 2 and 3"),
        ({"batch_size": 2, "batch_per_thread": -1, "seed": "a"}, "integer.*'a'"),
    ],
)
def test_batch_sizes_that_are_refused(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        Batching.of(**arguments)


def test_order_of_rows():
    assert Batching.of(2, -1).shuffle
    assert not Batching.of(2, -1, sequential_order=True).shuffle
    assert not Batching.of(2, -1, shuffle=False).shuffle


def test_other_things_than_rdds_are_refused():
    with pytest.raises(InvalidInputError, match=r"rdd must be of type RDD\. Received: list"):
        TFDataset.from_rdd([1, 2], batch_size=2)


class TestTensors:
    def test_placeholders_in_the_structure_of_a_row(self):
        dataset = TFDataset.from_ndarrays(({"a": X, "b": Y}, Y), batch_size=4)
        with tf.Graph().as_default() as graph:
            features, labels = dataset.tensors
            assert dataset.tensors[1] is labels and dataset.feature_tensors["a"] is features["a"]
            assert dataset.label_tensors is labels
            assert features["a"].shape.as_list() == [None, 2] and features["a"].graph is graph
            assert features["b"].dtype == tf.int32
            assert dataset_of(features["b"]) == (dataset, 1)
            assert dataset_of(labels) == (dataset, 2)
            assert dataset_of(labels + 1) is None
        with tf.Graph().as_default():
            assert dataset.tensors[1] is not labels

    def test_the_batch_size_may_be_the_first_dimension(self):
        dataset = TFDataset.from_ndarrays(X, batch_size=4, hard_code_batch_size=True)
        with tf.Graph().as_default():
            assert dataset.tensors.shape.as_list() == [4, 2]
            assert dataset.label_tensors is None

    def test_eager_execution_is_told_what_to_do(self):
        with pytest.raises(InvalidInputError, match=r"with tf.Graph\(\).as_default\(\):"):
            _ = TFDataset.from_ndarrays(X, batch_size=4).tensors

    def test_saving_a_graph_with_placeholders_warns_of_nothing(self, caplog):
        with tf.Graph().as_default() as graph:
            _ = TFDataset.from_ndarrays(X, batch_size=4).tensors
            tf.compat.v1.train.export_meta_graph(graph=graph)
        assert not caplog.records


def test_map_applies_to_rows_and_validation_and_leaves_the_original():
    dataset = TFDataset.from_ndarrays((X, Y), batch_size=4, val_tensors=(X, Y), shuffle=False)
    mapped = dataset.map(lambda x, y: ({"sum": tf.reduce_sum(x)}, y))
    assert dataset.mapping is None and dataset.row_spec == dataset.spec
    assert mapped.row_spec.fields[0].shape == () == mapped.validation.row_spec.fields[0].shape
    (handle,) = mapped.materialise_local(1).handles
    reader = BatchReader(handle, BatchOrder((6,), 4, 0, False), mapped.mapping)
    (sums, labels), rows = reader.read(1)
    assert rows == 2 and sums.numpy().tolist() == X[4:].sum(1).tolist()
    assert labels.numpy().tolist() == [4, 5]
