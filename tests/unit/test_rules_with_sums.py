"""LAMB, LARS and rules of one's own on shards, against NumPy on whole tensors."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from tfspark import LARS
from tfspark.data.order import BatchOrder
from tfspark.data.spec import Field, RowSpec
from tfspark.data.store import StoreWriter
from tfspark.graph.from_function import program_from_function
from tfspark.graph.optimizers import clipping_of
from tfspark.graph.update import update_program
from tfspark.sync.engine import RoundPlan, Run
from tfspark.sync.local import LocalEngine
from tfspark.train.groups import parameter_groups
from tfspark.train.saving import WEIGHTS, FromValues, Here, Trained

SPEC = RowSpec.of((Field("x", "float32", (4,)), Field("y", "float32", ())))
RATE, STEPS = 0.05, 5
# Odd sizes, so that tensors straddle ranks; `zero` starts at 0 and `idle` has no gradient.
NAMES = ["first", "second", "offset", "zero", "idle"]
START = {
    "first": np.random.default_rng(1).normal(size=(4, 3)),
    "second": np.random.default_rng(2).normal(size=(3, 1)),
    "offset": np.array([0.3]),
    "zero": np.zeros((4, 1)),
    "idle": np.random.default_rng(3).normal(size=(2, 2)),
}


def gradients_of(w, x, y):
    """Of the mean of `(x first second + x zero + offset - y) ** 2`, by hand."""
    error = (x @ w["first"] @ w["second"] + x @ w["zero"])[:, 0] + w["offset"] - y
    outer = 2 * error[:, None] / len(y)
    return {
        "first": x.T @ outer @ w["second"].T,
        "second": (x @ w["first"]).T @ outer,
        "offset": outer.sum(axis=0),
        "zero": x.T @ outer,
        "idle": np.zeros((2, 2)),
    }


class Training:
    """A least-squares problem on ranks with so many rows each."""

    def __init__(self, folder, rows_per_rank, optimizers, clip_norm=None):
        rng = np.random.default_rng(0)
        self.order = BatchOrder(tuple(rows_per_rank), batch_size=8, seed=3, shuffle=True)
        self.parts, self.handles = [], []
        for rank, count in enumerate(rows_per_rank):
            rows = (rng.normal(size=(count, 4)), rng.normal(size=count))
            self.parts.append(tuple(column.astype("float32") for column in rows))
            with StoreWriter(f"{folder}/rank-{rank}.arrow", SPEC, rank=rank) as writer:
                writer.append_columns(self.parts[-1])
            self.handles.append(writer.handle)
        variables = [tf.Variable(tf.cast(START[name], "float32"), name=name) for name in NAMES]

        def loss_fn(batch):
            x, y = batch
            first, second, offset, zero, idle = variables
            prediction = (x @ first @ second + x @ zero)[:, 0] + offset
            return tf.reduce_mean((prediction - y) ** 2) + 0 * tf.reduce_sum(idle)

        groups = parameter_groups(optimizers, NAMES, variables)
        self.bound = program_from_function(loss_fn, variables, SPEC, group_of=groups.group_of)
        self.rates = groups.learning_rates(0)
        self.run = Run(
            run_id=str(folder),
            program=self.bound.program,
            updates=tuple(
                update_program(g.optimizer, weight_decay=g.weight_decay, adaptation=g.adaptation)
                for g in groups.groups
            ),
            clippings=tuple(clipping_of(group.optimizer) for group in groups.groups),
            clip_norm=clip_norm,
            order=self.order,
            mapping=None,
            seed=0,
            state=self.bound.state,
            num_ranks=len(rows_per_rank),
        )

    def weights(self):
        """By name, after all steps on shards."""
        engine = LocalEngine(self.handles)
        commit = engine.start(self.run, FromValues(Here({WEIGHTS: self.bound.flat})))
        result = engine.round(commit, RoundPlan(0, (self.rates,) * STEPS))
        states = engine.collect(result.commit, Trained(frozenset()))
        tensors = self.run.layout.tensors(self.run.layout.join([s.shard for s in states]))
        names = [weight.name for weight in self.run.program.weights]
        return dict(zip(names, tensors, strict=True))

    def batches(self):
        """Of all ranks together."""
        for step in range(STEPS):
            epoch, step_in_epoch = self.order.locate(step)
            ids = [self.order.row_ids(r, epoch, step_in_epoch) for r in range(len(self.parts))]
            yield tuple(
                np.concatenate(
                    [part[column][rows] for part, rows in zip(self.parts, ids, strict=True)]
                )
                for column in (0, 1)
            )

    def by_hand(self, step, clip=lambda gradients: gradients):
        """By name, after all steps of `step(name, w, g, memory, t)` on whole tensors."""
        weights = {name: value.copy() for name, value in START.items()}
        memories = {name: {} for name in NAMES}
        for t, (x, y) in enumerate(self.batches(), start=1):
            gradients = clip(gradients_of(weights, x, y))
            weights = {
                name: step(name, weights[name], gradients[name], memories[name], t)
                for name in NAMES
            }
        return weights


def norm(tensor):
    return np.sqrt(np.sum(tensor * tensor))


def lamb(decay=lambda name: 0.0):
    """Of Keras: Adam's direction times |w| / |direction|, weight decay before and outside."""

    def step(name, w, g, memory, t):
        memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * g
        memory["v"] = 0.999 * memory.get("v", 0.0) + 0.001 * g * g
        w = w - RATE * decay(name) * w
        direction = memory["m"] / (1 - 0.9**t) / (np.sqrt(memory["v"] / (1 - 0.999**t)) + 1e-7)
        ratio = norm(w) / norm(direction) if norm(w) > 0 and norm(direction) > 0 else 1.0
        return w - RATE * ratio * direction

    return step


def lars(decay=lambda name: 0.0, adapts=lambda name: name != "offset"):
    """Of You et al.; trust coefficient 0.4, momentum 0.8."""

    def step(name, w, g, memory, t):
        ratio = 1.0
        if adapts(name) and norm(w) > 0 and norm(g) > 0:
            ratio = 0.4 * norm(w) / (norm(g) + decay(name) * norm(w))
        memory["v"] = 0.8 * memory.get("v", 0.0) + RATE * ratio * (g + decay(name) * w)
        return w - memory["v"]

    return step


def make_lars(**arguments):
    return LARS(RATE, 0.8, trust_coefficient=0.4, **arguments)


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


RANKS = [(20,), (13, 7), (1, 0, 18), (4, 4, 4, 4, 4)]


@pytest.mark.parametrize("rows", RANKS)
def test_lamb(tmp_path, rows):
    training = Training(tmp_path, rows, keras.optimizers.Lamb(RATE))
    assert training.run.sums == ("rule",)
    assert_equal(training.weights(), training.by_hand(lamb()))


@pytest.mark.parametrize("rows", RANKS)
def test_lars(tmp_path, rows):
    training = Training(tmp_path, rows, make_lars())
    assert_equal(training.weights(), training.by_hand(lars()))


def test_lamb_with_weight_decay_but_not_of_all(tmp_path):
    optimizer = keras.optimizers.Lamb(RATE, weight_decay=0.3)
    optimizer.exclude_from_weight_decay(var_names=["offset", "first"])
    training = Training(tmp_path, (13, 7), optimizer)
    assert len(training.run.updates) == 2
    decay = lambda name: 0.0 if name in ("offset", "first") else 0.3  # noqa: E731
    assert_equal(training.weights(), training.by_hand(lamb(decay)))


@pytest.mark.parametrize("adapt_vectors", [False, True])
def test_lars_with_weight_decay_but_not_of_all(tmp_path, adapt_vectors):
    optimizer = make_lars(weight_decay=0.3, adapt_vectors=adapt_vectors)
    optimizer.exclude_from_weight_decay(var_names=["first"])
    training = Training(tmp_path, (13, 7), optimizer)
    decay = lambda name: 0.0 if name == "first" else 0.3  # noqa: E731
    adapts = lambda name: adapt_vectors or name != "offset"  # noqa: E731
    assert_equal(training.weights(), training.by_hand(lars(decay, adapts)))


def test_groups_of_different_rules(tmp_path):
    """The rules sum 2, 2 and 0 terms."""
    optimizers = {
        "first": keras.optimizers.Lamb(RATE),
        "": make_lars(),
        "zero": keras.optimizers.SGD(RATE),
    }
    training = Training(tmp_path, (13, 7), optimizers)
    assert sorted(update.num_sums for update in training.run.updates) == [0, 0, 2, 2]
    rules = {"first": lamb(), "zero": lambda name, w, g, memory, t: w - RATE * g}

    def step(name, *rest):
        return rules.get(name, lars())(name, *rest)

    assert_equal(training.weights(), training.by_hand(step))


@pytest.mark.parametrize("make, rule", [(keras.optimizers.Lamb, lamb), (LARS, lars)])
@pytest.mark.parametrize("by", ["clip_norm", "clipnorm", "global_clipnorm", "clipvalue"])
def test_the_sums_of_a_rule_are_of_clipped_gradients(tmp_path, make, rule, by):
    limit, clips = 0.3, 0

    def clip(gradients):
        nonlocal clips
        if by == "clipvalue":
            return {name: np.clip(g, -limit, limit) for name, g in gradients.items()}
        whole = np.sqrt(sum(norm(g) ** 2 for g in gradients.values()))
        norms = {name: norm(g) if by == "clipnorm" else whole for name, g in gradients.items()}
        clips += any(value > limit for value in norms.values())
        return {name: g * limit / max(norms[name], limit) for name, g in gradients.items()}

    arguments = {} if by == "clip_norm" else {by: limit}
    if make is LARS:
        # One group, so that the norm of its gradients is that of all.
        optimizer = make_lars(adapt_vectors=True, **arguments)
        rule = lambda: lars(adapts=lambda name: True)  # noqa: E731
    else:
        optimizer = make(RATE, **arguments)
    clip_norm = limit if by == "clip_norm" else None
    training = Training(tmp_path, (13, 7), optimizer, clip_norm=clip_norm)
    assert training.run.sums == (("rule",) if by == "clipvalue" else ("clipping", "rule"))
    expected = training.by_hand(rule(), clip)
    assert by == "clipvalue" or clips == STEPS, "the limit is too high to test anything"
    assert_equal(training.weights(), expected)


def test_averages_and_accumulation_go_together_with_sums(tmp_path):
    """Against plain Keras on the same batches."""
    make = lambda: make_lars(adapt_vectors=True, gradient_accumulation_steps=2)  # noqa: E731
    averaged = lambda: keras.optimizers.Lamb(  # noqa: E731
        RATE, use_ema=True, ema_momentum=0.6, ema_overwrite_frequency=2
    )
    for number, optimizer in enumerate((make, averaged)):
        folder = tmp_path / str(number)
        folder.mkdir()
        training = Training(folder, (13, 7), optimizer())
        variables = [keras.Variable(START[name], dtype="float32", name=name) for name in NAMES]
        plain = optimizer()
        for x, y in training.batches():
            weights = {name: v.numpy() for name, v in zip(NAMES, variables, strict=True)}
            gradients = gradients_of(weights, x, y)
            plain.apply([tf.cast(gradients[name], "float32") for name in NAMES], variables)
        expected = {name: v.numpy() for name, v in zip(NAMES, variables, strict=True)}
        # An average that has not overwritten the weights comes home instead of them.
        got = training.weights()
        assert_equal(got, expected)


class Normed(keras.optimizers.Optimizer):
    """A rule that tfspark has never seen: the gradient over its L1 and its L2 norm."""

    def update_step(self, gradient, variable, learning_rate):
        norms = ops.norm(gradient) + ops.sum(ops.abs(gradient)) + 1.0
        self.assign_sub(variable, gradient * ops.cast(learning_rate, variable.dtype) / norms)


def test_a_rule_of_ones_own_may_sum_over_tensors(tmp_path):
    training = Training(tmp_path, (13, 7), Normed(RATE))
    expected = training.by_hand(
        lambda name, w, g, memory, t: w - RATE * g / (norm(g) + np.abs(g).sum() + 1.0)
    )
    assert_equal(training.weights(), expected)


def test_double_precision_is_that_of_keras():
    """One tensor on one rank, where the sums are the only inputs that Keras does not have."""
    from tfspark.graphdef.loader import load

    program = update_program(keras.optimizers.Lamb(RATE, weight_decay=0.1), "float64")
    step, terms = load(program.graph), load(program.terms)
    rng = np.random.default_rng(4)
    start = rng.normal(size=9)
    variable, plain = keras.Variable(start, dtype="float64"), keras.optimizers.Lamb(RATE)
    plain.weight_decay = 0.1
    shard, slots = start, [np.int64(0), np.zeros(9), np.zeros(9)]
    for gradient in rng.normal(size=(4, 9)):
        given = (shard, gradient, np.float64(1), np.float64(1), np.float32(RATE), *slots)
        sums = [np.full(9, np.sum(values)) for values in terms(*given)]
        shard, *slots = (np.asarray(output) for output in step(*given, *sums))
        plain.apply([tf.constant(gradient)], [variable])
    assert shard.dtype == np.float64
    np.testing.assert_allclose(shard, variable.numpy(), rtol=1e-10)


def test_elementwise_rules_pay_nothing(tmp_path):
    training = Training(tmp_path, (13, 7), keras.optimizers.Adam(RATE))
    assert training.run.sums == ()
    assert training.run.updates[0].terms is None
