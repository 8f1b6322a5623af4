"""Steps without slow ranks, through Spark: counted, said once, and refused where they cannot be."""

import logging
import re

import numpy as np
import pytest
import tensorflow as tf
from training import assert_same_bits, classified

from tfspark import SGD, LeaveOut, MaxIteration, TFDataset, TFOptimizer, TrainSummary
from tfspark.data.order import BatchOrder
from tfspark.errors import InvalidInputError
from tfspark.sync.engine import StepRecord
from tfspark.train.left_out import LeftOutRows

ROWS, STEPS = 64, 24


def training(slow, **settings):
    """Logistic regression whose rows cost `slow` turns of a loop each; and its variables."""
    x, y = classified(ROWS)
    dataset = TFDataset.from_ndarrays((x, y, slow.astype(np.int32)), batch_size=16, seed=4)
    kernel = tf.Variable(tf.zeros([6, 3]))

    def loss_fn(batch):
        x, y, turns = batch
        _, zero = tf.while_loop(
            lambda i, _: i < tf.reduce_max(turns),
            lambda i, value: (i + 1, 0.0 * tf.sin(value + tf.cast(i, tf.float32))),
            [tf.constant(0), tf.constant(0.0)],
        )
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(y, x @ kernel)
        return tf.reduce_mean(loss) + zero

    optimizer = TFOptimizer.from_function(
        loss_fn, [kernel], dataset, SGD(0.5), num_ranks=2, progress=False, **settings
    )
    return optimizer, kernel


def turns(of_rank_1):
    """Of every row, where rank 1 of 2 holds the later half."""
    return np.where(np.arange(ROWS) < ROWS // 2, 0, of_rank_1)


def test_a_slow_rank_is_left_out_and_counted(sc, tmp_path, caplog):
    optimizer, _ = training(turns(20_000), engine="gang", leave_out=LeaveOut(in_a_row=2))
    optimizer.set_train_summary(TrainSummary(tmp_path, "slow"))
    with caplog.at_level(logging.INFO, "tfspark"):
        optimizer.optimize(MaxIteration(STEPS))
    optimizer.close()
    summary = optimizer.train_summary
    steps, counts, _ = summary.read_scalar("LeftOut").T
    np.testing.assert_array_equal(steps, np.arange(1, STEPS + 1))
    assert set(counts) == {0, 1}
    (line,) = (r.getMessage() for r in caplog.records if "left out" in r.getMessage())
    total = int(counts.sum())
    assert f"left out of {total} of {STEPS} steps, {total} in all" in line
    # Both ranks have half of every batch.
    share = float(re.search(r"([\d.]+) % of the rows", line)[1])
    assert share == pytest.approx(100 * total / (2 * STEPS), abs=0.05)
    losses = summary.read_scalar("Loss")[:, 1]
    assert losses[-5:].mean() < losses[:5].mean()


def test_without_slow_ranks_nothing_changes(sc, tmp_path, caplog):
    weights = []
    for leave_out in (None, LeaveOut(factor=1e6)):
        optimizer, kernel = training(turns(0), engine="gang", leave_out=leave_out)
        optimizer.set_train_summary(TrainSummary(tmp_path, str(leave_out)))
        optimizer.optimize(MaxIteration(12))
        optimizer.close()
        weights.append(kernel.numpy())
        assert ("LeftOut" in optimizer.train_summary.tags()) == (leave_out is not None)
    assert_same_bits(weights[:1], weights[1:])
    assert weights[0].any()


@pytest.mark.parametrize("engine", ["local", "shuffle"])
def test_other_engines_refuse_it(sc, engine):
    optimizer, _ = training(turns(0), engine=engine, leave_out=LeaveOut())
    message = rf"leave_out needs the engine 'gang'.*Received: LeaveOut.*engine '{engine}'"
    with pytest.raises(InvalidInputError, match=message):
        optimizer.optimize()


def test_some_rank_has_to_stay(sc):
    optimizer, _ = training(turns(0), engine="gang", leave_out=LeaveOut(most_ranks=2))
    with pytest.raises(InvalidInputError, match=r"not left out\. Received: .*and 2 ranks"):
        optimizer.optimize()


def test_the_setting_is_a_rule():
    with pytest.raises(InvalidInputError, match=r"leave_out is LeaveOut.*Received: True"):
        training(turns(0), engine="gang", leave_out=True)


def test_the_rows_of_ranks_are_counted_by_the_order_of_batches():
    # 16 rows in batches of 6: steps of 6, 6 and 4 rows, a quarter of them on rank 1.
    order = BatchOrder((12, 4), batch_size=6, seed=0, shuffle=True)
    dropped = sum(order.rank_rows(step)[1] for step in (0, 2))
    counted = LeftOutRows(order)
    counted.add([StepRecord(1, 0.5, 4, left_out=(1,)), StepRecord(2, 0.5, 6)])
    counted.add([StepRecord(3, 0.5, 3, left_out=(1,))])
    assert str(counted) == (
        "Ranks were left out of 2 of 3 steps, 2 in all, and with them "
        f"{100 * dropped / 16:.1f} % of the rows."
    )


def test_not_with_steps_that_ranks_take_alone():
    message = r"Received: leave_out=LeaveOut\(.*\) with average_every=4. Use one of them"
    with pytest.raises(InvalidInputError, match=message):
        training(turns(0), engine="gang", leave_out=LeaveOut(), average_every=4)
