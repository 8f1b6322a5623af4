"""Steps without slow ranks, against NumPy over the rows that are left.

Ranks are threads. A slow one waits in its reader until others have gone on, so that who is left out
depends on no clock; that others, too, may be late on a busy machine changes no assertion.
"""

import itertools
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from mesh import mesh, on_all

from tfspark import LeaveOut
from tfspark.data.batches import BatchReader
from tfspark.data.order import BatchOrder
from tfspark.data.spec import Field, RowSpec
from tfspark.data.store import StoreWriter
from tfspark.errors import TrainingError
from tfspark.graph.clipping import Clipping
from tfspark.graph.from_function import program_from_function
from tfspark.graph.update import update_program
from tfspark.sync.engine import RankState, RoundPlan, Run
from tfspark.sync.gang_rank import GangRank, Patience
from tfspark.sync.rank import RankProgram
from tfspark.sync.tolerant_rank import TolerantRank

SPEC = RowSpec.of((Field("x", "float32", (3,)), Field("y", "float32", ())))
RATE, START = 0.1, (0.5, -0.5, 1.0)
OPEN = 2  # the first step that ranks may be left out of: one compiles, one shows what is typical


class Steps:
    """Which step the furthest rank reads."""

    def __init__(self):
        self._changed = threading.Condition()
        self._furthest = -1

    def reached(self, step):
        with self._changed:
            self._furthest = max(step, self._furthest)
            self._changed.notify_all()

    def wait_for(self, step):
        with self._changed:
            assert self._changed.wait_for(lambda: self._furthest >= step, timeout=60)


class SlowReader:
    """A reader that calls `slow[rank, step]()` before it reads."""

    def __init__(self, reader, steps, slow):
        self._reader, self._steps, self._slow = reader, steps, slow

    def read(self, step):
        self._steps.reached(step)
        self._slow.get((self._reader.handle.rank, step), lambda: None)()
        return self._reader.read(step)

    def prefetch(self, step):
        self._reader.prefetch(step)


class Problem:
    """Least squares over rows on several ranks, a moving mean of targets, and a count of steps."""

    def __init__(self, folder, rows_per_rank):
        rng = np.random.default_rng(0)
        self.order = BatchOrder(tuple(rows_per_rank), batch_size=8, seed=3, shuffle=True)
        self.parts, self.handles = [], []
        for rank, count in enumerate(rows_per_rank):
            rows = (rng.normal(size=(count, 3)), rng.normal(size=count))
            self.parts.append(tuple(column.astype("float32") for column in rows))
            with StoreWriter(f"{folder}/rank-{rank}.arrow", SPEC, rank=rank) as writer:
                writer.append_columns(self.parts[-1])
            self.handles.append(writer.handle)
        kernel = tf.Variable(START, name="kernel")
        center = tf.Variable(1.0, trainable=False, name="center")
        count = tf.Variable(np.int64(10), trainable=False, name="count")

        def loss_fn(batch):
            x, y = batch
            center.assign(0.9 * center + 0.1 * tf.reduce_mean(y))
            count.assign_add(1)
            return tf.reduce_mean((tf.linalg.matvec(x, kernel) - y) ** 2)

        self.bound = program_from_function(loss_fn, [kernel], SPEC)
        self.steps, self.slow = Steps(), {}

    def until_others_reach(self, step):
        return lambda: self.steps.wait_for(step)

    def run(self, leave_out):
        return Run(
            run_id="run",
            program=self.bound.program,
            updates=(update_program("sgd"),),
            clippings=(Clipping(),),
            order=self.order,
            mapping=None,
            seed=0,
            state=self.bound.state,
            num_ranks=len(self.parts),
            leave_out=leave_out,
        )

    def train(self, steps, leave_out=None, program_class=RankProgram):
        """The states of all ranks after one round."""
        run = self.run(leave_out)
        rank_class = GangRank if leave_out is None else TolerantRank

        def take_steps(links):
            reader = BatchReader(self.handles[links.rank], run.order)
            reader = SlowReader(reader, self.steps, self.slow)
            rank = rank_class(program_class(run), reader, links, Patience())
            try:
                return rank.take_steps(
                    RankState.initial(run, self.bound.flat, links.rank),
                    RoundPlan(0, ((RATE,),) * steps),
                )
            except BaseException:
                links.close()  # as a process does that ends: the others notice
                raise

        with mesh(len(self.parts)) as all_links:
            return on_all(all_links, take_steps)

    def model(self, states):
        """Weights, moving mean and count."""
        run = self.run(None)
        mean = np.concatenate([state.mean for state in states])
        center, count = run.state_layout.assemble(run.state, mean, states[0].first)
        return run.layout.join([state.shard for state in states]), center, count

    def by_hand(self, records):
        """The same and the losses, after plain SGD on the rows that the records leave."""
        kernel, center, count, losses = np.array(START), 1.0, 10, []
        for step, record in enumerate(records):
            epoch, step_in_epoch = self.order.locate(step)
            left = [
                [column[self.order.row_ids(rank, epoch, step_in_epoch)] for column in part]
                for rank, part in enumerate(self.parts)
                if rank not in record.left_out
            ]
            x, y = (np.concatenate(columns) for columns in zip(*left, strict=True))
            assert record.rows == len(y)
            error = x @ kernel - y
            losses.append(np.mean(error**2))
            kernel = kernel - RATE * 2 * x.T @ error / len(y)
            center = 0.9 * center + 0.1 * np.mean(y)
            count += 1
        return (kernel, center, count), losses

    def assert_is_by_hand(self, states):
        for state in states:
            assert [r.left_out for r in state.records] == [r.left_out for r in states[0].records]
        expected, losses = self.by_hand(states[0].records)
        for got, value in zip(self.model(states), expected, strict=True):
            np.testing.assert_allclose(got, value, rtol=1e-5)
        np.testing.assert_allclose([r.loss for r in states[0].records], losses, rtol=1e-5)


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_the_rows_of_a_slow_rank_are_dropped_for_one_step(tmp_path, slow):
    """Also when it is rank 0, which otherwise hands on what is not averaged."""
    problem = Problem(tmp_path, (13, 7, 9))
    problem.slow[slow, OPEN] = problem.until_others_reach(OPEN + 1)
    states = problem.train(8, LeaveOut(in_a_row=1))
    assert states[0].records[OPEN].left_out == (slow,)
    assert all(slow not in record.left_out for record in states[0].records[OPEN + 1 : OPEN + 2])
    problem.assert_is_by_hand(states)


def test_a_rank_is_left_out_a_few_times_in_a_row_then_all_wait_for_it(tmp_path):
    problem = Problem(tmp_path, (13, 7, 9))
    problem.slow[1, OPEN] = problem.until_others_reach(OPEN + 3)
    states = problem.train(8, LeaveOut(in_a_row=3))
    left_out = [record.left_out for record in states[0].records]
    assert left_out[OPEN : OPEN + 3] == [(1,)] * 3
    assert 1 not in left_out[OPEN + 3]
    problem.assert_is_by_hand(states)


def test_no_more_ranks_than_allowed(tmp_path):
    problem = Problem(tmp_path, (13, 7, 9))
    problem.slow[1, OPEN] = problem.until_others_reach(OPEN + 1)
    problem.slow[2, OPEN] = lambda: time.sleep(0.5)
    states = problem.train(6, LeaveOut(most_ranks=1))
    assert states[0].records[OPEN].left_out == (1,)
    problem.assert_is_by_hand(states)


def test_several_ranks_where_that_is_allowed(tmp_path):
    problem = Problem(tmp_path, (13, 7, 9))
    for rank in (0, 2):
        problem.slow[rank, OPEN] = problem.until_others_reach(OPEN + 1)
    states = problem.train(6, LeaveOut(most_ranks=2))
    assert states[0].records[OPEN].left_out == (0, 2)
    problem.assert_is_by_hand(states)


def test_the_first_and_the_last_step_of_a_round_wait_for_all(tmp_path):
    problem = Problem(tmp_path, (13, 7))
    for step in (0, 1, OPEN):
        problem.slow[1, step] = lambda: time.sleep(0.5)
    states = problem.train(OPEN + 1, LeaveOut())
    assert [record.left_out for record in states[0].records] == [()] * (OPEN + 1)
    problem.assert_is_by_hand(states)


def test_a_rank_without_rows_is_waited_for_by_nobody(tmp_path):
    # Rank 0 has one row, in some step of the epoch; the others are never without.
    problem = Problem(tmp_path, (1, 13, 7))
    states = problem.train(7, LeaveOut(factor=1e6))
    assert any(not problem.order.rank_rows(step)[0] for step in range(3))
    problem.assert_is_by_hand(states)


def test_where_nobody_is_late_the_bits_are_those_without_tolerance(tmp_path):
    problem = Problem(tmp_path, (13, 7, 9))
    plain, tolerant = problem.train(9), problem.train(9, LeaveOut(factor=1e6))
    assert not any(record.left_out for record in tolerant[0].records)
    for left, right in itertools.zip_longest(problem.model(plain), problem.model(tolerant)):
        np.testing.assert_array_equal(left, right)


def test_weights_that_a_dropped_gradient_reads_are_not_overwritten(tmp_path):
    seen = []

    class Looking(RankProgram):
        def contribute(self, rank, step, replica, reader, next_step=None):
            before = [replica.flat.copy(), *map(np.array, replica.state)]
            contribution = super().contribute(rank, step, replica, reader, next_step)
            after = [replica.flat, *replica.state]
            same = all(map(np.array_equal, before, after))
            seen.append((rank, step, same))
            return contribution

    problem = Problem(tmp_path, (13, 7, 9))
    problem.slow[0, OPEN] = problem.until_others_reach(OPEN + 2)
    problem.slow[0, OPEN + 4] = problem.until_others_reach(OPEN + 5)
    states = problem.train(9, LeaveOut(in_a_row=2), Looking)
    assert {(0, OPEN, True), (0, OPEN + 4, True)} <= set(seen)
    assert all(same for _, _, same in seen)
    problem.assert_is_by_hand(states)


def test_what_is_wrong_with_rows_that_were_dropped_is_said(tmp_path):
    problem = Problem(tmp_path, (13, 7))

    def fail():
        problem.steps.wait_for(OPEN + 1)
        raise TrainingError("A row must be good.")

    problem.slow[0, OPEN] = fail
    with pytest.raises(TrainingError, match="A row must be good"):
        problem.train(8, LeaveOut())
