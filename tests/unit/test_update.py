"""Updates of shards against plain Keras on the whole vector."""

import itertools
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops, optimizers

from tfspark.errors import InvalidInputError, UnsupportedRuleError
from tfspark.graph.clipping import Clipping, scales, tensor_squared_norms
from tfspark.graph.optimizers import clipping_of, decay_mask, learning_rate_of, optimizer_from
from tfspark.graph.update import update_program
from tfspark.graphdef.loader import load
from tfspark.sync.layout import Segment

RATE = 0.05
SIZE = 21

# TensorFlow's graph optimizer reorders some products, so a graph is not Keras to the last bit.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

RULES = {
    "sgd": lambda: optimizers.SGD(RATE),
    "momentum": lambda: optimizers.SGD(RATE, momentum=0.9),
    "nesterov": lambda: optimizers.SGD(RATE, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda: optimizers.Adam(RATE),
    "adam-decay": lambda: optimizers.Adam(RATE, weight_decay=0.1),
    "amsgrad": lambda: optimizers.Adam(RATE, amsgrad=True, clipvalue=0.3),
    "adamw": lambda: optimizers.AdamW(RATE, weight_decay=0.2),
    "adagrad": lambda: optimizers.Adagrad(RATE, initial_accumulator_value=0.3),
    "adadelta": lambda: optimizers.Adadelta(RATE),
    "adamax": lambda: optimizers.Adamax(RATE),
    "nadam": lambda: optimizers.Nadam(RATE),
    "rmsprop": lambda: optimizers.RMSprop(RATE),
    "rmsprop-centered": lambda: optimizers.RMSprop(RATE, centered=True, momentum=0.8),
    "ftrl": lambda: optimizers.Ftrl(RATE, l1_regularization_strength=0.01, beta=0.1),
    "lion": lambda: optimizers.Lion(RATE, weight_decay=0.1),
    "ema": lambda: optimizers.Adam(RATE, use_ema=True, ema_momentum=0.7),
    "ema-overwrite": lambda: optimizers.SGD(
        RATE, momentum=0.9, use_ema=True, ema_momentum=0.7, ema_overwrite_frequency=3
    ),
    "accumulation": lambda: optimizers.Adam(
        RATE, gradient_accumulation_steps=3, weight_decay=0.1, clipvalue=0.2
    ),
}


def data(steps=7, dtype="float32"):
    rng = np.random.default_rng(0)
    return rng.normal(size=SIZE).astype(dtype), rng.normal(size=(steps, SIZE)).astype(dtype)


def initial_slots(program, size):
    return [
        np.full(size if slot.kind == "vector" else (), slot.initial, slot.dtype)
        for slot in program.slots
    ]


def run(program, start, gradients, *, rates=None, divisor=1, scale=1, jit_compile=False):
    """The shard after each step."""
    step = load(program.graph, jit_compile=jit_compile)
    shard, slots, history = start, initial_slots(program, len(start)), []
    for i, gradient in enumerate(gradients):
        rate = np.float32(rates[i] if rates is not None else RATE)
        shard, *slots = step(
            shard, gradient, np.float64(divisor), np.asarray(scale, start.dtype), rate, *slots
        )
        history.append(np.asarray(shard))
    return np.array(history)


def plain_keras(optimizer, start, gradients, rates=None):
    """The weights after each step of the optimizer itself."""
    variable, history = keras.Variable(start, dtype=start.dtype), []
    for i, gradient in enumerate(gradients):
        if rates is not None:
            optimizer.learning_rate = rates[i]
        optimizer.apply([tf.constant(gradient)], [variable])
        history.append(variable.numpy())
    return np.array(history)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_that_of_keras(name):
    start, gradients = data()
    expected = plain_keras(RULES[name](), start, gradients)
    program = pickle.loads(pickle.dumps(update_program(RULES[name]())))
    np.testing.assert_allclose(run(program, start, gradients), expected, **CLOSE)
    assert not np.array_equal(expected[-1], start)


@pytest.mark.parametrize("name", RULES)
def test_shards_of_every_rule_are_the_whole_under_xla(name):
    start, gradients = data()
    expected = plain_keras(RULES[name](), start, gradients)
    program = update_program(RULES[name]())
    for part in (slice(0, 1), slice(1, 8), slice(8, SIZE)):
        got = run(program, start[part], gradients[:, part], jit_compile=True)
        np.testing.assert_allclose(got, expected[:, part], **CLOSE)


@pytest.mark.parametrize("name", ["nesterov", "adamw", "nadam", "ftrl", "ema-overwrite"])
def test_double_precision(name):
    start, gradients = data(dtype="float64")
    program = update_program(RULES[name](), "float64")
    assert {slot.dtype for slot in program.slots if slot.kind == "vector"} <= {"float64"}
    got = run(program, start, gradients)
    assert got.dtype == np.float64
    expected = plain_keras(RULES[name](), start, gradients)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["momentum", "adam-decay", "lion"])
def test_the_rate_is_fed(name):
    start, gradients = data()
    rates = np.linspace(0.5, 0.01, len(gradients))
    got = run(update_program(RULES[name]()), start, gradients, rates=rates)
    np.testing.assert_allclose(got, plain_keras(RULES[name](), start, gradients, rates), **CLOSE)


def test_slots_are_named_as_in_keras():
    def described(name):
        return {(s.name, s.kind, s.dtype, s.initial) for s in update_program(RULES[name]()).slots}

    assert described("sgd") == {("iteration", "scalar", "int64", 0.0)}
    assert described("nadam") == {
        ("iteration", "scalar", "int64", 0.0),
        ("momentum", "vector", "float32", 0.0),
        ("velocity", "vector", "float32", 0.0),
        ("u_product", "scalar", "float32", 1.0),
    }
    assert ("accumulator", "vector", "float32", float(np.float32(0.3))) in described("adagrad")
    assert ("average", "vector", "float32", 0.0) in described("ema")


def test_sums_are_divided_scaled_and_clipped_in_this_order():
    start, gradients = data(steps=1)
    program = update_program(optimizers.SGD(1.0), clip_value=(-0.1, 0.2))
    scale = np.linspace(0, 1, SIZE, dtype=np.float32)
    got = run(program, start, gradients, rates=[1.0], divisor=4, scale=scale)[0]
    expected = start - np.clip(gradients[0] / 4 * scale, -0.1, 0.2)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_a_rate_of_zero_freezes_bit_for_bit(name):
    start, gradients = data()
    start[:3] = [-0.0, 0.0, 1e-42]
    got = run(update_program(RULES[name]()), start, gradients, rates=np.zeros(len(gradients)))
    for weights in got:
        assert weights.tobytes() == start.tobytes()


def test_excluded_weights_do_not_decay():
    start, gradients = data()
    got = run(update_program(RULES["adamw"](), weight_decay=False), start, gradients)
    np.testing.assert_allclose(got, plain_keras(RULES["adam"](), start, gradients), **CLOSE)


def test_the_optimizer_is_left_alone():
    optimizer = optimizers.Adam(RATE, clipnorm=1.0)
    update_program(optimizer)
    assert not optimizer.built
    assert float(optimizer.learning_rate) == pytest.approx(RATE)
    assert optimizer.clipnorm == 1.0


def test_the_same_rule_gives_the_same_graph():
    fingerprints = {update_program(RULES["adam"]()).graph.fingerprint for _ in range(2)}
    assert len(fingerprints) == 1


class Signed(optimizers.Optimizer):
    """An elementwise rule that tfspark has never seen."""

    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, ops.sign(gradient) * ops.cast(learning_rate, variable.dtype))


class Largest(optimizers.Optimizer):
    """A rule that looks at all elements, and not by a sum."""

    def update_step(self, gradient, variable, learning_rate):
        rate = ops.cast(learning_rate, variable.dtype) / ops.max(ops.abs(gradient))
        self.assign_sub(variable, gradient * rate)


class Twice(optimizers.Optimizer):
    """A rule that sums what depends on a sum."""

    def update_step(self, gradient, variable, learning_rate):
        direction = gradient / ops.norm(gradient)
        rate = ops.cast(learning_rate, variable.dtype) / ops.sum(ops.abs(direction))
        self.assign_sub(variable, direction * rate)


class Remembering(optimizers.Optimizer):
    """A rule that keeps a norm."""

    def build(self, variables):
        super().build(variables)
        self.norm = self.add_variable((), name="norm")

    def update_step(self, gradient, variable, learning_rate):
        self.assign(self.norm, ops.norm(gradient))
        self.assign_sub(variable, gradient * ops.cast(learning_rate, variable.dtype))


class RowWise(optimizers.Optimizer):
    """A rule that is elementwise for vectors only."""

    def update_step(self, gradient, variable, learning_rate):
        if len(variable.shape) == 2:
            gradient = gradient - ops.mean(gradient, axis=1, keepdims=True)
        self.assign_sub(variable, gradient * ops.cast(learning_rate, variable.dtype))


class OddSlot(optimizers.Optimizer):
    """A rule with a slot of a shape of its own."""

    def build(self, variables):
        super().build(variables)
        self.history = self.add_variable((3, 2), name="history")


class Copying(optimizers.Optimizer):
    """A rule with a slot that starts from the weights."""

    def build(self, variables):
        super().build(variables)
        self.copies = self.add_optimizer_variables(variables, "copy")
        self.copies[0].assign(variables[0])


class Static(optimizers.Optimizer):
    """A rule that knows the length it was built on."""

    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, ops.ones(variable.shape) * learning_rate)


class Forgetful(Signed):
    """A rule whose config lacks an argument."""

    def __init__(self, learning_rate, power=1.0, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.power = power


class Demanding(Signed):
    """A rule whose config lacks an argument that it needs."""

    def __init__(self, learning_rate, power, **kwargs):
        super().__init__(learning_rate, **kwargs)


def test_an_unknown_elementwise_rule_works():
    start, gradients = data()
    got = run(update_program(Forgetful(RATE)), start, gradients)
    np.testing.assert_allclose(got, plain_keras(Signed(RATE), start, gradients), **CLOSE)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (Largest(0.1), "Largest, whose step on a vector is not its step on its halves"),
        (Twice(0.1), "not what depends on such a sum. Received: Twice"),
        (Remembering(0.1), "Remembering, whose 'norm' depends on a sum over a tensor"),
        (RowWise(0.1), "RowWise, whose step on a vector is not its step on a matrix"),
        (OddSlot(0.1), r"OddSlot with 'history' of shape \(3, 2\)"),
        (Copying(0.1), "Copying, whose 'copy' starts from the weights"),
        (Static(0.1), "Static, which does not"),
        (Forgetful(0.1, 2.0), "Forgetful: from_config does not bring back power"),
        (Demanding(0.1, 2.0), "Demanding: from_config failed.*'power'"),
        (optimizers.Adafactor(), "Adafactor: it keeps means over rows"),
        (optimizers.Muon(), "Muon: it orthogonalises"),
        (optimizers.LossScaleOptimizer(optimizers.SGD()), "LossScaleOptimizer: .*optimizer in it"),
        (optimizers.Adam(gradient_accumulation_steps=2, clipnorm=1.0), "not with clipnorm"),
        (optimizers.Adam(gradient_accumulation_steps=2, use_ema=True), "use_ema"),
    ],
)
def test_rules_that_cannot_be_sharded_are_refused(optimizer, message):
    with pytest.raises(UnsupportedRuleError, match=message):
        update_program(optimizer)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (optimizers.Adam, r"Make an instance: Adam\("),
        (tf.compat.v1.train.AdamOptimizer(), r"tf\.compat\.v1\.train have a namesake"),
        ("no_such_rule", "'no_such_rule'"),
        (0.1, "Received: 0.1"),
        (None, "Received: None"),
    ],
)
def test_wrong_types_are_refused(value, hint):
    with pytest.raises(InvalidInputError, match=f"one of keras.optimizers.*{hint}"):
        optimizer_from(value)


def test_names_are_optimizers():
    assert isinstance(optimizer_from("adam"), optimizers.Adam)


def test_learning_rates():
    schedule = optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    function = lambda: 0.3  # noqa: E731
    assert learning_rate_of(optimizers.Adam(1e-3))() == 0.001
    assert learning_rate_of(optimizers.Adam(schedule)) is schedule
    assert learning_rate_of(optimizers.Adam(function)) is function
    optimizer = optimizers.SGD(0.5)
    optimizer.learning_rate = 0.25
    assert learning_rate_of(optimizer)() == 0.25


def test_a_schedule_without_a_config_is_no_obstacle():
    class Mine(optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.1

    start, gradients = data()
    got = run(update_program(optimizers.SGD(Mine())), start, gradients, rates=[0.1] * 7)
    np.testing.assert_allclose(got, plain_keras(optimizers.SGD(0.1), start, gradients), **CLOSE)


SCRIPT = """
import numpy as np, tensorflow as tf, keras
tf.compat.v1.{switch}()
from tfspark.graph.optimizers import learning_rate_of
from tfspark.graph.update import update_program
from tfspark.graphdef.loader import load
optimizer = keras.optimizers.Adam(0.25, weight_decay=0.5)
step = load(update_program(optimizer).graph)
one = np.ones(2, np.float32)
out = step(one, one, np.float64(1), np.float32(1), np.float32(0.25), np.int64(0), 0 * one, 0 * one)
print(learning_rate_of(optimizer), out[0].numpy()[0])  # no function: its variable is in a graph
"""


@pytest.mark.parametrize("switch", ["disable_v2_behavior", "disable_eager_execution"])
def test_where_eager_mode_is_off(switch):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(switch=switch)],
        capture_output=True,
        text=True,
        check=True,
    )
    rate, weight = map(float, result.stdout.split())
    assert rate == 0.25
    assert weight == pytest.approx(1 - 0.5 * 0.25 - 0.25, rel=1e-5)


def test_decay_mask_is_that_of_keras():
    model = keras.Sequential([keras.layers.Dense(2), keras.layers.BatchNormalization()])
    model.build((None, 3))
    weights = model.trainable_variables
    names = [weight.path for weight in weights]
    for excluded in (
        {"var_names": ["bias", "gamma"]},
        {"var_list": [weights[0], weights[3]]},
        {"var_list": [weights[0]], "var_names": ["beta"]},
    ):
        optimizer = optimizers.AdamW()
        optimizer.exclude_from_weight_decay(**excluded)
        expected = [optimizer._use_weight_decay(weight.value) for weight in weights]
        assert 0 < sum(expected) < 4
        assert decay_mask(optimizer, names, weights) == expected
    with pytest.raises(InvalidInputError, match="var_names"):
        decay_mask(optimizer, names)
    assert decay_mask(optimizers.Adam(), names) == [True] * 4


# -- clipping by norm ---------------------------------------------------------------------------


def clipped_by_slices(clipping, tensors, num_slices, in_group=None):
    """Clips the tensors slice by slice, as the engines do, and returns them joined."""
    flat = np.concatenate([tensor.ravel() for tensor in tensors])
    bounds = np.cumsum([0, *(tensor.size for tensor in tensors)])
    slices = np.array_split(np.arange(flat.size), num_slices)
    segments = [
        tuple(
            Segment(
                tensor=i,
                start=max(a, part[0]) - part[0],
                stop=min(b, part[-1] + 1) - part[0],
                offset=max(a, part[0]) - a,
            )
            for i, (a, b) in enumerate(itertools.pairwise(bounds))
            if max(a, part[0]) < min(b, part[-1] + 1)
        )
        for part in slices
    ]
    norms = sum(
        tensor_squared_norms(flat[part], seg, len(tensors))
        for part, seg in zip(slices, segments, strict=True)
    )
    members = in_group or [True] * len(tensors)
    factors = [
        scales(clipping, norms, seg, members, len(part))
        for part, seg in zip(slices, segments, strict=True)
    ]
    return flat * np.concatenate(factors), flat


@pytest.mark.parametrize("num_slices", [1, 2, 5])
@pytest.mark.parametrize("limit", [0.5, 2.0, 3.0, 100.0])
def test_clipping_by_norm_is_that_of_tensorflow(num_slices, limit):
    rng = np.random.default_rng(1)
    tensors = [rng.normal(size=shape).astype(np.float32) for shape in ((3, 4), (1,), (5,), (2, 2))]
    got, _ = clipped_by_slices(Clipping(norm=limit), tensors, num_slices)
    expected = np.concatenate([tf.clip_by_norm(t, limit).numpy().ravel() for t in tensors])
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    got, _ = clipped_by_slices(Clipping(global_norm=limit), tensors, num_slices)
    clipped, _ = tf.clip_by_global_norm(tensors, limit)
    expected = np.concatenate([t.numpy().ravel() for t in clipped])
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_norm_is_that_of_the_own_group():
    tensors = [np.float32([3, 4]), np.float32([300, 400]), np.float32([0, 12])]
    got, flat = clipped_by_slices(Clipping(global_norm=6.5), tensors, 2, [True, False, True])
    np.testing.assert_allclose(got[[0, 1, 4, 5]], flat[[0, 1, 4, 5]] / 2)
    np.testing.assert_array_equal(got[2:4], flat[2:4])


def test_zero_gradients_and_padding_are_not_scaled():
    segments = (Segment(tensor=0, start=0, stop=2, offset=0),)
    norms = tensor_squared_norms(np.zeros(3, np.float32), segments, 1)
    np.testing.assert_array_equal(scales(Clipping(norm=1.0), norms, segments, [True], 3), 1)
    np.testing.assert_array_equal(scales(Clipping(), norms + 9, segments, [True], 3), 1)


def test_clipping_of_an_optimizer():
    assert clipping_of(optimizers.Adam()) == Clipping()
    assert clipping_of(optimizers.Adam(clipvalue=0.5)) == Clipping(value=(-0.5, 0.5))
    assert clipping_of(optimizers.Adam(clipnorm=0.5)) == Clipping(norm=0.5)
    assert clipping_of(optimizers.Adam(global_clipnorm=2.0)) == Clipping(global_norm=2.0)
    assert Clipping(norm=1.0).needs_norms and Clipping(global_norm=1.0).needs_norms
    assert not Clipping(value=(-1, 1)).needs_norms


@pytest.mark.parametrize(
    "fields", [{"value": (1, -1)}, {"norm": 0.0}, {"global_norm": -1.0}, {"norm": float("nan")}]
)
def test_impossible_clipping(fields):
    with pytest.raises(InvalidInputError, match="Received: "):
        Clipping(**fields)
    with pytest.raises(InvalidInputError, match="not both"):
        Clipping(norm=1.0, global_norm=1.0)
