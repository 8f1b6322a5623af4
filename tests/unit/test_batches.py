"""Batches against the arrays that went into the store."""

from queue import SimpleQueue

import numpy as np
import pytest

from tfspark.data.batches import BatchReader, evaluation_batches, one_ahead
from tfspark.data.mapping import RowMapping
from tfspark.data.order import BatchOrder
from tfspark.data.spec import Field, RowSpec
from tfspark.data.store import StoreWriter
from tfspark.errors import UserFunctionError

SPEC = RowSpec.of((Field("x", "float32", (2,)), Field("id", "int64", ())))


@pytest.fixture
def handle(tmp_path):
    count = 11
    x = np.arange(2 * count, dtype=np.float32).reshape(count, 2)
    with StoreWriter(str(tmp_path / "a"), SPEC, rank=1, chunk_bytes=64) as writer:
        writer.append_columns([x, np.arange(count)])
    return writer.handle


@pytest.fixture
def order():
    return BatchOrder((4, 11), 5, seed=3, shuffle=True)


def test_steps_read_the_rows_of_the_order(handle, order):
    reader = BatchReader(handle, order)
    for step in (0, 2, 4, 7):
        (x, ids), rows = reader.read(step)
        epoch, step_in_epoch = order.locate(step)
        assert ids.tolist() == order.row_ids(1, epoch, step_in_epoch).tolist()
        assert rows == len(ids) == order.rank_rows(step_in_epoch)[1]
        assert (x[:, 0] == 2 * ids).all()


def test_reading_ahead_gives_the_same_batches(handle, order):
    plain = [BatchReader(handle, order).read(step)[0][1].tolist() for step in range(9)]
    reader, ahead = BatchReader(handle, order), []
    for step in range(9):
        reader.prefetch(step)
        ahead.append(reader.read(step)[0][1].tolist())
    assert ahead == plain
    reader.prefetch(3)
    assert reader.read(5)[0][1].tolist() == plain[5]


def test_the_next_item_is_computed_while_one_is_used():
    begun = SimpleQueue()

    def items():
        for item in range(4):
            begun.put(item)
            yield item

    ahead = one_ahead(items())
    assert next(ahead) == 0
    assert [begun.get(timeout=10), begun.get(timeout=10)] == [0, 1]  # nobody asked for 1 yet
    assert begun.empty()
    assert list(ahead) == [1, 2, 3]


def test_a_rank_without_rows_reads_nothing(tmp_path):
    with StoreWriter(str(tmp_path / "a"), SPEC, rank=0) as writer:
        pass
    order = BatchOrder((0, 5), 2, 0, True)
    assert BatchReader(writer.handle, order).read(1) == ([], 0)
    assert list(evaluation_batches(writer.handle, 3)) == []


def test_evaluation_reads_every_row_once_in_order(handle):
    batches = list(evaluation_batches(handle, 4))
    assert [rows for _, rows in batches] == [4, 4, 3]
    assert np.concatenate([batch[1] for batch, _ in batches]).tolist() == list(range(11))


def test_an_error_in_the_background_comes_with_its_batch(handle, order):
    import tensorflow as tf

    def fail(x, i):
        index = tf.where(i == 7, 5, 0)
        return tf.gather(x, index), i

    mapping = RowMapping.identity(SPEC).then(fail).batch
    bad = next(s for s in range(3) if 7 in order.row_ids(1, 0, s))
    seen = 0
    with pytest.raises(UserFunctionError, match=r"\[rank 1, row 7\].*map\(\).*indices"):
        reader = BatchReader(handle, order, mapping)
        for step in range(3):
            reader.read(step)
            reader.prefetch(step + 1)
            seen += 1
    assert seen == bad
