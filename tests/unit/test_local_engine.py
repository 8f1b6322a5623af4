"""The arithmetic of a step, against NumPy written out by hand."""

import numpy as np
import pytest
import tensorflow as tf

from tfspark.data.batches import BatchReader
from tfspark.data.order import BatchOrder
from tfspark.data.spec import Field, RowSpec
from tfspark.data.store import StoreWriter
from tfspark.graph.clipping import Clipping
from tfspark.graph.from_function import program_from_function
from tfspark.graph.update import update_program
from tfspark.sync.engine import Halt, RankState, RoundPlan, Run, merge_outcomes
from tfspark.sync.local import LocalEngine
from tfspark.sync.messages import state_from_message, state_to_message
from tfspark.train.saving import WEIGHTS, FromValues, Here, InFile, Trained

SPEC = RowSpec.of((Field("x", "float32", (3,)), Field("y", "float32", ())))
RATE = 0.1


class Problem:
    """Least squares over rows that lie on several ranks, and a moving mean of the targets."""

    def __init__(self, folder, rows_per_rank, **run):
        rng = np.random.default_rng(0)
        self.parts = [
            (rng.normal(size=(n, 3)).astype("float32"), rng.normal(size=n).astype("float32"))
            for n in rows_per_rank
        ]
        self.order = BatchOrder(tuple(rows_per_rank), batch_size=8, seed=3, shuffle=True)
        self.handles = []
        for rank, columns in enumerate(self.parts):
            with StoreWriter(f"{folder}/rank-{rank}.arrow", SPEC, rank=rank) as writer:
                writer.append_columns(columns)
            self.handles.append(writer.handle)
        kernel = tf.Variable([0.5, -0.5, 1.0], name="kernel")
        center = tf.Variable(1.0, trainable=False, name="center")

        def loss_fn(batch):
            x, y = batch
            center.assign(0.9 * center + 0.1 * tf.reduce_mean(y))
            return tf.reduce_mean((tf.linalg.matvec(x, kernel) - y) ** 2)

        bound = program_from_function(loss_fn, [kernel], SPEC)
        options = {
            "clippings": (Clipping(),),
            "accumulation_steps": 1,
            "clip_norm": None,
            **run,
        }
        self.run = Run(
            run_id=f"{folder}",
            program=bound.program,
            updates=(update_program("sgd"),),
            order=self.order,
            mapping=None,
            seed=0,
            state=bound.state,
            num_ranks=len(rows_per_rank),
            **options,
        )
        self.flat = bound.flat

    def batches(self, steps):
        for step in range(steps):
            epoch, step_in_epoch = self.order.locate(step)
            yield [
                tuple(a[self.order.row_ids(rank, epoch, step_in_epoch)] for a in arrays)
                for rank, arrays in enumerate(self.parts)
            ]

    def train(self, steps, stop=None):
        engine = LocalEngine(self.handles)
        commit = engine.start(self.run, FromValues(Here({WEIGHTS: self.flat})))
        result = engine.round(commit, RoundPlan(0, ((RATE,),) * steps, stop))
        states = (
            []
            if result.commit is None
            else list(engine.collect(result.commit, Trained(frozenset())))
        )
        return result, states

    def weights(self, states):
        return self.run.layout.join([state.shard for state in states])


def gradient(kernel, x, y):
    return 2 * x.T @ (x @ kernel - y) / len(y)


@pytest.mark.parametrize("rows", [(20,), (13, 7), (1, 0, 18), (5, 5, 5, 4)])
def test_steps_are_those_of_plain_sgd(tmp_path, rows):
    problem = Problem(tmp_path, rows)
    result, states = problem.train(7)
    kernel, center, losses = np.array([0.5, -0.5, 1.0]), 1.0, []
    for batch in problem.batches(7):
        x, y = (np.concatenate(columns) for columns in zip(*batch, strict=True))
        losses.append(np.mean((x @ kernel - y) ** 2))
        kernel = kernel - RATE * gradient(kernel, x, y)
        center = 0.9 * center + 0.1 * np.mean(y)
    np.testing.assert_allclose(problem.weights(states), kernel, rtol=1e-5)
    np.testing.assert_allclose([record.loss for record in result.records], losses, rtol=1e-5)
    state = problem.run.state_layout.assemble(
        problem.run.state, np.concatenate([s.mean for s in states]), states[0].first
    )
    np.testing.assert_allclose(state, [center], rtol=1e-5)


def test_parts_of_a_batch_give_the_same_gradient(tmp_path):
    whole = Problem(tmp_path / "whole", (13, 7))
    parts = Problem(tmp_path / "parts", (13, 7), accumulation_steps=3)
    np.testing.assert_allclose(
        parts.weights(parts.train(5)[1]), whole.weights(whole.train(5)[1]), rtol=1e-5
    )


@pytest.mark.parametrize("ranks", [(20,), (13, 7)])
@pytest.mark.parametrize("by", ["clip_norm", "norm", "global_norm"])
def test_clipping_by_norm_needs_the_whole_gradient(tmp_path, ranks, by):
    limit = 0.3
    options = (
        {"clip_norm": limit} if by == "clip_norm" else {"clippings": (Clipping(**{by: limit}),)}
    )
    problem = Problem(tmp_path, ranks, **options)
    _, states = problem.train(4)
    kernel, clipped = np.array([0.5, -0.5, 1.0]), 0
    for batch in problem.batches(4):
        x, y = (np.concatenate(columns) for columns in zip(*batch, strict=True))
        step = gradient(kernel, x, y)
        clipped += np.linalg.norm(step) > limit
        kernel = kernel - RATE * step * limit / max(np.linalg.norm(step), limit)
    assert clipped, "the limit is too high to test anything"
    np.testing.assert_allclose(problem.weights(states), kernel, rtol=1e-5)


def test_a_stop_ends_the_round_after_its_step(tmp_path):
    problem = Problem(tmp_path, (13, 7))
    result, states = problem.train(9, stop=lambda step, loss: step == 4)
    assert result.halt == Halt("stop", 4)
    assert [record.step for record in result.records] == [1, 2, 3, 4]
    np.testing.assert_array_equal(problem.weights(states), problem.weights(problem.train(4)[1]))


def test_a_loss_that_is_not_finite_keeps_the_state_before_it(tmp_path):
    problem = Problem(tmp_path, (13, 7))
    # The first row of rank 1 that is drawn in the third step.
    row = problem.order.row_ids(1, 0, 2)[0]
    x, y = problem.parts[1]
    x = np.array(x)
    x[row] = np.nan
    with StoreWriter(f"{tmp_path}/nan.arrow", SPEC, rank=1) as writer:
        writer.append_columns((x, y))
    problem.handles[1] = writer.handle
    result, states = problem.train(5)
    assert result.halt == Halt("non_finite", 3, 1, "loss")
    assert [state.step for state in states] == [2, 2]
    clean = Problem(tmp_path / "clean", (13, 7))
    np.testing.assert_array_equal(problem.weights(states), clean.weights(clean.train(2)[1]))


def test_ranks_that_disagree_have_no_commit():
    halt = Halt("non_finite", 3, 1, "sum of gradients")
    outcome = merge_outcomes([(3, None, ("a", "b", "c")), (2, halt, ("a", "b"))])
    assert not outcome.consistent
    assert outcome.halt == halt
    assert outcome.records == ("a", "b")


def test_a_state_survives_its_message(tmp_path):
    problem = Problem(tmp_path, (13, 7))
    engine = LocalEngine(problem.handles)
    commit = engine.start(problem.run, FromValues(Here({WEIGHTS: problem.flat})))
    result = engine.round(commit, RoundPlan(0, ((RATE,),) * 2, lambda step, loss: step == 2))
    state: RankState = result.commit[1]
    back = state_from_message(state_to_message(state))
    assert (back.rank, back.step, back.halt) == (1, 2, Halt("stop", 2))
    assert back.records == state.records
    np.testing.assert_array_equal(back.shard, state.shard)
    for left, right in zip(back.slots[0], state.slots[0], strict=True):
        np.testing.assert_array_equal(left, right)


def test_initial_weights_may_lie_in_a_file(tmp_path):
    problem = Problem(tmp_path, (13, 7))
    held = InFile.write({WEIGHTS: problem.flat}, str(tmp_path))
    np.testing.assert_array_equal(held.value[WEIGHTS], problem.flat)
    engine = LocalEngine(problem.handles)
    here = Here({WEIGHTS: problem.flat})
    commits = [engine.start(problem.run, FromValues(values)) for values in (held, here)]
    for left, right in zip(*commits, strict=True):
        np.testing.assert_array_equal(left.shard, right.shard)
    held.destroy()
    assert not list(tmp_path.glob("initial-*"))


class Recorder(BatchReader):
    """A reader that notes what it was asked for."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.asked = []

    def read(self, step):
        self.asked.append(("read", step))
        return super().read(step)

    def prefetch(self, step):
        self.asked.append(("prefetch", step))
        super().prefetch(step)


def test_the_next_batch_is_read_during_the_gradient_and_none_beyond_the_round(tmp_path):
    problem = Problem(tmp_path, [9])
    engine = LocalEngine(problem.handles)
    commit = engine.start(problem.run, FromValues(Here({WEIGHTS: problem.flat})))
    reader = Recorder(problem.handles[0], problem.order)
    engine._readers = [reader]
    engine.round(commit, RoundPlan(0, ((RATE,),) * 3))
    assert reader.asked == [
        ("read", 0), ("prefetch", 1), ("read", 1), ("prefetch", 2), ("read", 2)
    ]  # fmt: skip
