"""Ctrl-C: the last commit's weights come home, Spark is free again, and training can go on."""

import signal
import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from training import assert_same_bits, classified

from tfspark import LeaveOut, MaxIteration, SeveralIteration, TFDataset, TFOptimizer

LOSS = "sparse_categorical_crossentropy"


SLOW = 50.0
"""A feature that makes the step of its row take minutes."""


class Identity(layers.Layer):
    """Takes its time over rows that say so."""

    def call(self, x):
        largest = tf.stop_gradient(tf.reduce_max(x))
        count = tf.where(largest >= SLOW, 200_000, 1)
        _, matrix = tf.while_loop(
            lambda i, _: i < count,
            lambda i, m: (i + 1, tf.tanh(m @ m)),
            [tf.constant(0), tf.ones([256, 256]) * largest],
        )
        return x + 0.0 * tf.reduce_sum(matrix)


def training(engine, slow_step=None, **settings):
    model = keras.Sequential([keras.Input((6,)), Identity(), layers.Dense(3, "softmax")])
    model.set_weights([np.random.default_rng(5).normal(size=w.shape) for w in model.get_weights()])
    x, y = classified(26)
    if slow_step is not None:
        x[slow_step * 4 - 2, 0] = SLOW  # each rank gives four rows, in order
    dataset = TFDataset.from_ndarrays(
        (x, y), batch_size=8, shuffle=False, val_tensors=classified(5)
    )
    optimizer = TFOptimizer.from_keras(
        model,
        dataset,
        loss=LOSS,
        optimizer="adam",
        engine=engine,
        num_ranks=2,
        progress=False,
        **settings,
    )
    return model, optimizer


NEVER = SeveralIteration(10**9)


def undisturbed(steps, engine="local", **settings):
    model, optimizer = training(engine, **settings)
    if steps:
        optimizer.optimize(MaxIteration(steps), validation_trigger=NEVER)
        optimizer.close()
    return model.get_weights()


class Interrupt(threading.Thread):
    """Sends the main thread a Ctrl-C in the middle of a round, after some steps.

    Only inside the block: what comes too late would end another test, and all that follow.
    """

    def __init__(self, sc, optimizer, step):
        super().__init__(daemon=True)
        self.tracker, self.optimizer, self.step = sc.statusTracker(), optimizer, step
        self.jobs: set[int] = set()
        self.sent_at = 0.0
        self.over = threading.Event()

    def run(self):
        while self.optimizer.step < self.step and not self.over.is_set():
            time.sleep(0.02)
        if not self.over.wait(3):  # the next round is slow
            self.jobs = set(self.tracker.getActiveJobsIds())
            self.sent_at = time.monotonic()
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()


@pytest.fixture(params=["PySpark's handler", "Python's handler"])
def handler(request, sc):
    """Notebooks install Python's own handler around every cell."""
    former = signal.getsignal(signal.SIGINT)
    if request.param == "Python's handler":
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.parametrize("engine", ["shuffle", "gang"])
def test_an_interrupted_round_is_cancelled(sc, handler, engine):
    model, optimizer = training(engine, slow_step=3)
    with Interrupt(sc, optimizer, 1) as interrupt, pytest.raises(KeyboardInterrupt):
        optimizer.optimize(MaxIteration(5))
    # The tasks that run take minutes; a job to fetch the weights has already found free slots.
    assert time.monotonic() - interrupt.sent_at < 20
    assert interrupt.jobs
    assert not interrupt.jobs & set(sc.statusTracker().getActiveJobsIds())
    assert optimizer.step in (1, 2)
    assert_same_bits(model.get_weights(), undisturbed(optimizer.step))
    optimizer.close()


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({}, {}),
        # Nobody is that late, so that no row is dropped.
        ({"leave_out": LeaveOut(factor=1e6)}, {}),
        ({"average_every": 4}, {"engine": "gang", "average_every": 4}),
    ],
    ids=["each step", "leave out", "local steps"],
)
def test_an_interrupted_round_of_a_gang_ends_at_a_commit(sc, handler, settings, reference):
    """Nothing of it is lost, where steps are short."""
    model, optimizer = training("gang", **settings)
    every = settings.get("average_every", 1)
    optimizer.optimize(MaxIteration(every), validation_trigger=NEVER)
    live, loop, sent_at = [], optimizer._training.loop, []
    loop._live = lambda record: live.append(record.step)

    def interrupt():
        while not live or live[-1] < 20:
            time.sleep(0.02)
        sent_at.append(time.monotonic())
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        # Nothing else ends a round soon.
        optimizer.optimize(MaxIteration(10**9), validation_trigger=NEVER)
    assert time.monotonic() - sent_at[0] < 10
    step = optimizer.step
    assert step >= live[-1] >= 20
    assert step % every == 0
    assert_same_bits(model.get_weights(), undisturbed(step, **reference))
    optimizer.optimize(MaxIteration(step + 3), validation_trigger=NEVER)
    optimizer.close()
    assert_same_bits(model.get_weights(), undisturbed(step + 3, **reference))


@pytest.mark.parametrize("engine", ["local", "shuffle", "gang"])
def test_an_error_between_rounds_keeps_the_commit(sc, engine):
    """Whatever the driver was doing: here, a validation that is interrupted."""
    model, optimizer = training(engine)

    class Once(SeveralIteration):
        def __call__(self, progress):
            if progress.step == 3:
                raise KeyboardInterrupt
            return False

    with pytest.raises(KeyboardInterrupt):
        optimizer.optimize(MaxIteration(9), validation_trigger=Once(1))
    assert optimizer.step == 3
    assert_same_bits(model.get_weights(), undisturbed(3))
    optimizer.optimize(MaxIteration(5))
    optimizer.close()
    assert_same_bits(model.get_weights(), undisturbed(5))


@pytest.mark.parametrize("engine", ["shuffle", "gang"])
def test_a_commit_outlives_a_round_whose_result_was_lost(sc, engine):
    """An interrupt may come when the engine has the new commit and the caller not yet."""
    model, optimizer = training(engine)
    optimizer.optimize(MaxIteration(2))
    loop = optimizer._training.loop
    assert loop is not None
    commit, progress = loop.commit, loop.progress
    optimizer.optimize(MaxIteration(3))
    loop.commit, loop.progress = commit, progress
    optimizer.optimize(MaxIteration(2))
    assert_same_bits(model.get_weights(), undisturbed(2))
    optimizer.optimize(MaxIteration(4))
    optimizer.close()
    assert_same_bits(model.get_weights(), undisturbed(4))
