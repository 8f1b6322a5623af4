"""Local SGD against NumPy: every rank by itself, then the average; ranks are threads here."""

import uuid
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_reference import rank_batches
from mesh import mesh, on_all

from tfspark.data.batches import BatchReader
from tfspark.data.order import BatchOrder
from tfspark.data.spec import Field, RowSpec
from tfspark.data.store import StoreWriter
from tfspark.graph.from_function import program_from_function
from tfspark.graph.optimizers import clipping_of
from tfspark.graph.update import update_program
from tfspark.sync.engine import Halt, RankState, RoundPlan, Run
from tfspark.sync.gang_rank import GangRank, Patience
from tfspark.sync.local_steps import LocalRank, patience_with, periods, weighted_mean
from tfspark.sync.rank import RankProgram
from tfspark.train.groups import parameter_groups

SPEC = RowSpec.of((Field("x", "float32", (4,)), Field("y", "float32", ())))
START = {
    "kernel": np.random.default_rng(1).normal(size=(4, 3)),
    "out": np.random.default_rng(2).normal(size=3),
    "offset": np.array([0.3]),
}
NAMES = list(START)
ROWS = [(20,), (13, 7), (9, 1, 10), (1, 0, 18)]


def rate(step):
    return 0.05 / (1 + step)


class Training:
    """Least squares on ranks with so many rows each, over rows that a moving mean is taken from."""

    def __init__(self, folder, rows_per_rank, optimizer, average_every, clip_norm=None, bad=None):
        rng = np.random.default_rng(0)
        self.order = BatchOrder(tuple(rows_per_rank), batch_size=4, seed=3, shuffle=True)
        self.parts, self.handles = [], []
        for rank, count in enumerate(rows_per_rank):
            x, y = rng.normal(size=(count, 4)), rng.normal(size=count)
            if bad is not None and rank == bad[0]:
                y[self.order.row_ids(rank, 0, bad[1])[0]] = np.nan
            self.parts.append((x.astype("float32"), y.astype("float32")))
            with StoreWriter(f"{folder}/rank-{rank}.arrow", SPEC, rank=rank) as writer:
                writer.append_columns(self.parts[-1])
            self.handles.append(writer.handle)
        variables = [tf.Variable(tf.cast(START[name], "float32"), name=name) for name in NAMES]
        moving = tf.Variable(tf.zeros([4]), trainable=False, name="moving")
        seen = tf.Variable(0, trainable=False, name="seen")

        def loss_fn(batch):
            x, y = batch
            kernel, out, offset = variables
            seen.assign_add(1)
            moving.assign(0.8 * moving + 0.2 * tf.reduce_mean(x, 0))
            prediction = tf.linalg.matvec((x - moving) @ kernel, out) + offset
            return tf.reduce_mean((prediction - y) ** 2)

        groups = parameter_groups(optimizer, NAMES, variables)
        self.bound = program_from_function(loss_fn, variables, SPEC, group_of=groups.group_of)
        assert sorted(slot.kind for slot in self.bound.program.state) == ["first", "mean"]
        self.run = Run(
            run_id=uuid.uuid4().hex,
            program=self.bound.program,
            updates=tuple(update_program(group.optimizer) for group in groups.groups),
            clippings=tuple(clipping_of(group.optimizer) for group in groups.groups),
            clip_norm=clip_norm,
            order=self.order,
            mapping=None,
            seed=0,
            state=self.bound.state,
            num_ranks=len(rows_per_rank),
            average_every=average_every,
        )
        self.program = RankProgram(self.run)
        self.told = []

    def initial(self):
        return [
            RankState.initial(self.run, self.bound.flat, rank) for rank in range(self.run.num_ranks)
        ]

    def states(self, rounds, rank_of=LocalRank, stop=None, interrupted=None):
        """Of every rank after rounds of so many steps, with the records of all of them."""

        def on_rank(links):
            reader = BatchReader(self.handles[links.rank], self.order)
            rank = rank_of(self.program, reader, links, Patience())
            if links.rank == 0:
                rank.tell, rank.interrupted = self.told.append, interrupted
            state, records = self.initial()[links.rank], []
            for steps in rounds:
                groups = len(self.run.updates)
                rates = [(rate(state.step + i),) * groups for i in range(steps)]
                plan = RoundPlan(state.step, tuple(rates), stop)
                state = rank.take_steps(state.settled(), plan)
                records += state.records
                if state.halt:
                    break
            return replace(state, records=records)

        with mesh(self.run.num_ranks) as links:
            return on_all(links, on_rank)

    def weights(self, states):
        """By name."""
        tensors = self.run.layout.tensors(self.run.layout.join([s.shard for s in states]))
        names = [weight.name for weight in self.run.program.weights]
        return dict(zip(names, tensors, strict=True))

    def model_state(self, states):
        """(moving mean, steps seen)."""
        vector = np.concatenate([state.mean for state in states])
        whole = self.run.state_layout.assemble(self.run.state, vector, states[-1].first)
        return {slot.kind: v for slot, v in zip(self.run.program.state, whole, strict=True)}

    def by_hand(self, rule, steps, averages):
        """Weights, moving mean, steps seen and losses; averaged after the steps `averages`."""
        ranks = [
            {"w": dict(START), "m": {n: {} for n in NAMES}, "moving": np.zeros(4), "t": 0}
            for _ in self.parts
        ]
        losses, rows, taken = [], np.zeros(len(ranks)), np.zeros(len(ranks), int)
        for step, batch in enumerate(rank_batches(self.order, self.parts, steps)):
            total = 0.0
            for number, (rank, (x, y)) in enumerate(zip(ranks, batch, strict=True)):
                if not len(y):
                    continue
                rows[number] += len(y)
                taken[number] += 1
                rank["t"] += 1
                rank["moving"] = 0.8 * rank["moving"] + 0.2 * x.astype(float).mean(0)
                loss, gradients = loss_and_gradients(rank["w"], x - rank["moving"], y)
                total += loss * len(y)
                rank["w"] = {
                    n: rule(rank["w"][n], gradients[n], rank["m"][n], rank["t"], rate(step))
                    for n in NAMES
                }
            losses.append(total / sum(len(y) for _, y in batch))
            if step + 1 in averages:
                ranks = averaged(ranks, rows, leader=int(np.argmax(taken)))
                rows[:], taken[:] = 0, 0
        return ranks[0], losses


def loss_and_gradients(w, x, y):
    error = x @ w["kernel"] @ w["out"] + w["offset"] - y
    outer = 2 * error / len(y)
    return np.mean(error**2), {
        "kernel": np.outer(x.T @ outer, w["out"]),
        "out": w["kernel"].T @ (x.T @ outer),
        "offset": outer.sum(keepdims=True),
    }


def averaged(ranks, rows, leader):
    """All ranks with the mean by rows of weights, slots and moving means, and a leader's counts."""
    shares = rows / rows.sum()
    present = [(s, rank) for s, rank in zip(shares, ranks, strict=True) if s]
    one = {
        "w": {n: sum(s * rank["w"][n] for s, rank in present) for n in NAMES},
        "m": {
            n: {k: sum(s * rank["m"][n][k] for s, rank in present) for k in present[0][1]["m"][n]}
            for n in NAMES
        },
        "moving": sum(s * rank["moving"] for s, rank in present),
        "t": ranks[leader]["t"],
    }
    return [{**one, "m": {n: dict(one["m"][n]) for n in NAMES}} for _ in ranks]


def sgd(w, g, memory, t, rate):
    return w - rate * g


def momentum(w, g, memory, t, rate):
    memory["v"] = 0.9 * memory.get("v", 0.0) - rate * g
    return w + memory["v"]


def adam(w, g, memory, t, rate):
    memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * g
    memory["v"] = 0.999 * memory.get("v", 0.0) + 0.001 * g * g
    return w - rate * memory["m"] / (1 - 0.9**t) / (np.sqrt(memory["v"] / (1 - 0.999**t)) + 1e-7)


def lamb(w, g, memory, t, rate):
    direction = (adam(w, g, memory, t, 1.0) - w) * -1
    return w - rate * np.linalg.norm(w) / np.linalg.norm(direction) * direction


def clipped(w, g, memory, t, rate):
    return w - rate * g * 0.7 / max(np.linalg.norm(g), 0.7)


RULES = {
    "momentum": (lambda: keras.optimizers.SGD(0.1, momentum=0.9), momentum),
    "adam": (lambda: keras.optimizers.Adam(0.1), adam),
    "lamb": (lambda: keras.optimizers.Lamb(0.1), lamb),
    "clipnorm": (lambda: keras.optimizers.SGD(0.1, clipnorm=0.7), clipped),
    "two groups": (
        lambda: {"kernel": keras.optimizers.SGD(0.1, momentum=0.9), "": keras.optimizers.SGD(0.1)},
        None,
    ),
}


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("average_every", [1, 3])
@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_against_numpy(tmp_path, rows, average_every, rule):
    """Two rounds, the first of which ends between two multiples of three."""
    make, by_hand = RULES[rule]
    training = Training(tmp_path, rows, make(), average_every)
    states = training.states([5, 6])
    averages = {1: range(1, 12), 3: (3, 5, 6, 9, 11)}[average_every]
    expected, losses = training.by_hand(by_hand, 11, averages)
    assert_equal(training.weights(states), expected["w"])
    model_state = training.model_state(states)
    np.testing.assert_allclose(model_state["mean"], expected["moving"], rtol=1e-4, atol=1e-6)
    assert model_state["first"] == expected["t"]
    for state in states:
        assert state.step == 11
        assert state.slots[0][0] == expected["t"]  # "iteration"
        assert [r.step for r in state.records] == list(range(1, 12))
        in_epoch = [training.order.locate(step)[1] for step in range(11)]
        assert [r.rows for r in state.records] == [*map(training.order.global_rows, in_epoch)]
        np.testing.assert_allclose([r.loss for r in state.records], losses, rtol=1e-4)
        assert all({"gradient", "update", "exchange"} <= r.seconds.keys() for r in state.records)
    if len(rows) > 1 and average_every > 1:
        synchronous, _ = training.by_hand(by_hand, 11, range(1, 12))
        assert not np.allclose(synchronous["w"]["kernel"], expected["w"]["kernel"], atol=1e-3)


@pytest.mark.parametrize("rule", ["lamb", "clipnorm"])
def test_norms_are_those_of_the_rank(tmp_path, rule):
    make, by_hand = RULES[rule]
    training = Training(tmp_path, (13, 7), make(), 4)
    assert training.run.sums
    expected, _ = training.by_hand(by_hand, 8, (4, 8))
    assert_equal(training.weights(training.states([8])), expected["w"])


def test_groups_of_different_rules(tmp_path):
    training = Training(tmp_path, (9, 1, 10), RULES["two groups"][0](), 3)
    assert len(training.run.updates) == 2
    kernels = iter(range(10**6))

    def by_name(w, g, memory, t, rate):
        return (momentum if next(kernels) % 3 == 0 else sgd)(w, g, memory, t, rate)

    expected, _ = training.by_hand(by_name, 6, (3, 6))
    assert_equal(training.weights(training.states([6])), expected["w"])


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_an_average_after_every_step_is_synchronous_sgd(tmp_path, rows):
    """Of plain SGD, whose step is linear in the gradient."""
    training = Training(tmp_path, rows, keras.optimizers.SGD(0.1), 1)
    local, together = training.states([7]), training.states([7], rank_of=GangRank)
    assert_equal(training.weights(local), training.weights(together))
    for one, other in zip(local[0].records, together[0].records, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)


def test_rounds_do_not_show_and_repeat_bit_for_bit(tmp_path):
    training = Training(tmp_path, (9, 1, 10), keras.optimizers.Adam(0.1), 3)
    runs = [training.states(rounds) for rounds in ([12], [12], [3, 6, 3])]
    for run in runs[1:]:
        for state, other in zip(runs[0], run, strict=True):
            np.testing.assert_array_equal(state.shard, other.shard)
            for slot, slot_of_other in zip(state.slots[0], other.slots[0], strict=True):
                np.testing.assert_array_equal(slot, slot_of_other)
            assert [r.loss for r in state.records] == [r.loss for r in other.records]


def test_a_group_with_a_rate_of_zero_stays_bit_for_bit(tmp_path, monkeypatch):
    training = Training(tmp_path, (13, 7), RULES["momentum"][0](), 3)
    monkeypatch.setitem(globals(), "rate", lambda step: 0.0)
    for name, value in training.weights(training.states([6])).items():
        np.testing.assert_array_equal(value, START[name].astype("float32"))


def test_stop_is_asked_at_averages(tmp_path):
    asked = []

    def stop(step, loss):
        asked.append((step, loss))
        return step >= 4

    training = Training(tmp_path, (13, 7), keras.optimizers.SGD(0.1), 3)
    states = training.states([12], stop=stop)
    for state in states:
        assert state.halt == Halt("stop", 6)
        assert len(state.records) == state.step == 6
    losses = {r.step: r.loss for r in states[0].records}
    assert {step: loss for step, loss in asked} == {3: losses[3], 6: losses[6]}
    assert [record.step for record in training.told] == [3, 6]


def test_an_interrupt_ends_at_the_next_average(tmp_path):
    training = Training(tmp_path, (13, 7), keras.optimizers.SGD(0.1), 3)
    states = training.states([12], interrupted=lambda: len(training.told) == 1)
    for state in states:
        assert state.halt == Halt("interrupt", 6)
        assert len(state.records) == state.step == 6


def test_what_is_not_finite_costs_its_period(tmp_path):
    """Step 5 on rank 1 alone: the state is that after step 3, on all ranks."""
    training = Training(tmp_path, (9, 11), keras.optimizers.Adam(0.1), 3, bad=(1, 4))
    states = training.states([12])
    good = training.states([3])
    for state, before in zip(states, good, strict=True):
        assert state.halt == Halt("non_finite", 5, 1, "loss")
        assert len(state.records) == state.step == 3
        np.testing.assert_array_equal(state.shard, before.shard)
        np.testing.assert_array_equal(state.slots[0][1], before.slots[0][1])


def test_periods_end_at_multiples():
    assert list(periods(0, 6, 3)) == [range(0, 3), range(3, 6)]
    assert list(periods(4, 9, 5)) == [range(4, 5), range(5, 10), range(10, 13)]
    assert list(periods(4, 2, 1)) == [range(4, 5), range(5, 6)]


def test_a_weighted_mean_keeps_what_is_equal():
    value = np.float64([0.1, 1 / 3, -1e300])
    np.testing.assert_array_equal(weighted_mean([(3, value), (7, value), (11, value)]), value)
    halves = [(1, np.float32([2.0])), (3, np.float32([4.0]))]
    assert weighted_mean(halves) == [3.5]


def test_a_long_period_is_not_a_dead_peer():
    assert patience_with(1, None).limit_s(first=True) == Patience().limit_s(first=True)
    assert patience_with(101, None).limit_s(first=True) == 600 + 100 * 30
    assert patience_with(101, 50.0).limit_s(first=False) == 1000
