"""Stopped and gone on equals never stopped, bit for bit; and what stands in the way is named."""

import errno
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from training import assert_same_bits, classified, differ

from tfspark import (
    MaxEpoch,
    MaxIteration,
    MinLoss,
    Plateau,
    SequentialSchedule,
    SeveralIteration,
    Step,
    TFDataset,
    TFOptimizer,
    Warmup,
)
from tfspark.errors import CheckpointError, InvalidInputError
from tfspark.train import files
from tfspark.train import manifest as manifest_module
from tfspark.train.checkpoint import CheckpointStore, Retention
from tfspark.train.failure_policy import FailurePolicy, Failures
from tfspark.train.training import Training as Started

ROWS, BATCH = 38, 8  # five steps an epoch, the last of six rows
LOSS = "sparse_categorical_crossentropy"


def model(hidden=7):
    """With all that has a state: BatchNorm, dropout, a frozen layer, momentum."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(6, trainable=False, name="frozen"),
            layers.Dense(hidden, name="hidden"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.4, seed=3, name="dropout"),
            layers.Dense(3, "softmax", name="out"),
        ],
        name="model",
    )
    rng = np.random.default_rng(5)
    weights = model.get_weights()
    model.set_weights([rng.normal(size=w.shape) if w.ndim == 2 else w for w in weights])
    return model


def rate():
    schedule = SequentialSchedule(learning_rate=0.002)
    return schedule.add(Warmup(0.001), 4).add(Step(3, 0.5), 100)


class Training:
    """One way to train; each call is as a new process would do it."""

    def __init__(self, model_dir=None, engine="local", ranks=2, seed=7, val=False, make=model):
        self.model = make()
        tensors = classified(ROWS)
        dataset = TFDataset.from_ndarrays(
            tensors, batch_size=BATCH, seed=seed, val_tensors=classified(11, 5) if val else None
        )
        self.optimizer = TFOptimizer.from_keras(
            self.model,
            dataset,
            model_dir=None if model_dir is None else str(model_dir),
            loss=LOSS,
            optimizer=keras.optimizers.Adam(rate()),
            engine=engine,
            num_ranks=ranks,
            progress=False,
        )

    def to(self, step, every=1000):
        self.optimizer.optimize(MaxIteration(step), SeveralIteration(every))
        assert self.optimizer.step == step
        self.optimizer.close()
        return self.state()

    def state(self):
        return [v.numpy() for v in self.model.variables]


def test_the_reference_moves_everything():
    """Were any of this constant, the tests below would prove nothing of it."""
    start, end = Training(), Training()
    end.to(13)
    for before, after, variable in zip(
        start.state(), end.state(), start.model.variables, strict=True
    ):
        assert differ([before], [after]) == ("frozen" not in variable.path), variable.path


@pytest.mark.parametrize("stop", [1, 5, 7], ids=["first step", "end of epoch", "mid-epoch"])
def test_resumed_equals_uninterrupted(tmp_path, stop):
    undisturbed = Training().to(13)
    Training(tmp_path).to(stop)
    assert_same_bits(Training(tmp_path).to(13), undisturbed)


@pytest.mark.parametrize(
    "engines", [("shuffle", "shuffle"), ("local", "gang"), ("gang", "shuffle")], ids="-".join
)
def test_resumed_on_any_engine(sc, tmp_path, engines):
    undisturbed = Training().to(13)
    Training(tmp_path, engines[0]).to(7)
    assert_same_bits(Training(tmp_path, engines[1]).to(13), undisturbed)


def test_load_checkpoint_by_version(tmp_path):
    undisturbed = Training().to(13)
    Training(tmp_path).to(9, every=3)
    for version in (3, 6, None):
        training = Training()
        training.optimizer.load_checkpoint(str(tmp_path), version)
        assert_same_bits(training.to(13), undisturbed)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4.*available: \[3, 6, 9\]"):
        Training().optimizer.load_checkpoint(str(tmp_path), 4)
    with pytest.raises(CheckpointError, match="must be a whole checkpoint"):
        Training().optimizer.load_checkpoint(str(tmp_path / "empty"))


def test_a_rerun_goes_on_from_the_newest_even_if_it_had_begun_from_an_older_one(tmp_path):
    Training(tmp_path).to(3)
    training = Training(tmp_path)
    training.to(9)
    training.optimizer.optimize(MaxIteration(9))
    assert training.optimizer.step == 9
    assert_same_bits(training.state(), Training().to(9))


def test_schedules_remember_scores(tmp_path):
    """Plateau: what it has seen is in the checkpoint."""

    def run(*ends, model_dir=None):
        for end in ends:
            training = Training(model_dir, val=True)
            groups = training.optimizer._recipe.groups
            training.optimizer.optimize(MaxIteration(end), SeveralIteration(4), SeveralIteration(1))
        return training.state(), groups.state()

    global rate
    former, rate = rate, lambda: Plateau("loss", 0.5, patience=1, epsilon=10, learning_rate=0.01)
    try:
        weights, state = run(10)
        assert state["plateaus"][0]["scale"] < 0.1
        resumed_weights, resumed_state = run(4, 8, 10, model_dir=tmp_path)
    finally:
        rate = former
    assert resumed_state == state
    assert_same_bits(resumed_weights, weights)


def test_what_triggers_look_at_is_in_the_checkpoint(tmp_path):
    """A run that ended because its loss was low enough does not take one more step."""
    Training(tmp_path).to(4)
    training = Training(tmp_path)
    training.optimizer.optimize(MinLoss(100.0) | MaxIteration(9))
    assert training.optimizer.step == 4


@pytest.mark.parametrize("ranks", [1, 3])
def test_another_number_of_ranks(tmp_path, ranks):
    Training(tmp_path, ranks=2).to(7)
    saved = Training(tmp_path, ranks=2)
    other = Training(tmp_path, ranks=ranks)
    contents = []
    for training in (saved, other):
        recipe = training.optimizer._recipe
        loop = Started(recipe, recipe.newest_checkpoint(), Failures(FailurePolicy())).loop
        states = list(loop.engine.map_states(loop.commit, lambda run, state: state))
        layout, updates = loop.run.layout, loop.run.updates
        vectors = [
            layout.join([np.concatenate([s.slots[g][i] if kind == "vector" else
                                         np.full(layout.slice_sizes[g], s.slots[g][i])
                                         for g in range(layout.num_groups)]) for s in states])
            for i, kind in enumerate(slot.kind for slot in updates[0].slots)
        ]  # fmt: skip
        contents.append([layout.join([s.shard for s in states]), *vectors])
    assert_same_bits(*contents)
    assert all(np.any(vector) for vector in contents[0])
    at_seven = saved.to(7)
    assert all(np.isfinite(value).all() for value in other.to(11))
    assert differ(other.state(), at_seven)


KILLED = """
    import sys
    sys.path[:0] = [{folder!r}, {support!r}]
    from test_resume import Training
    from tfspark import MaxIteration, SeveralIteration

    class Told(MaxIteration):
        def __call__(self, progress):
            print("step", progress.step, flush=True)
            return super().__call__(progress)

    training = Training({model_dir!r})
    training.optimizer.optimize(Told(100000), SeveralIteration(2))
"""


@pytest.mark.slow
def test_a_driver_killed_in_mid_training(tmp_path):
    here = Path(__file__).parent
    source = KILLED.format(
        folder=str(here), support=str(here.parent / "support"), model_dir=str(tmp_path)
    )
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(source)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(here.parent.parent)},
        ) as driver:
            assert driver.stdout is not None
            taken = (line for line in driver.stdout if line.startswith("step"))
            for _, _line in zip(range(60), taken, strict=False):
                pass
            time.sleep(0.01)
            driver.kill()
    killed_at = CheckpointStore(str(tmp_path)).list()[-1]
    assert killed_at >= 20
    resumed = Training(tmp_path).to(killed_at + 5)
    assert_same_bits(resumed, Training().to(killed_at + 5))


def test_a_truncated_checkpoint_falls_back_and_says_so(tmp_path, caplog):
    Training(tmp_path).to(6, every=2)
    manifest = CheckpointStore(str(tmp_path)).latest()
    shard = tmp_path / manifest.folder / manifest.shards[1].file
    shard.write_bytes(shard.read_bytes()[:-5])
    training = Training(tmp_path)
    with caplog.at_level("INFO", "tfspark"):
        weights = training.to(9)
    assert re.search(r"step 6 is not whole and is passed over: .*rank-00001.bin", caplog.text)
    assert "Going on from step 4" in caplog.text
    assert_same_bits(weights, Training().to(9))


def test_a_truncated_checkpoint_is_found_by_the_executors(sc, tmp_path, caplog):
    Training(tmp_path, "shuffle").to(4, every=2)
    manifest = CheckpointStore(str(tmp_path)).latest()
    (tmp_path / manifest.folder / manifest.shards[0].file).unlink()
    weights = Training(tmp_path, "shuffle").to(6)
    assert re.search(r"step 4 is not whole and is passed over: .*rank-00000.bin", caplog.text)
    assert_same_bits(weights, Training().to(6))


def test_another_model_is_refused_by_its_tensors(tmp_path):
    Training(tmp_path).to(2)
    other = Training(tmp_path, make=lambda: model(hidden=9))
    before = other.state()
    with pytest.raises(CheckpointError) as raised:
        other.to(4)
    for part in ("hidden/kernel: float32 (6, 9) in the model, float32 (6, 7) in the checkpoint",
                 "norm/gamma: float32 (9,)", "out/kernel: float32 (9, 3)"):  # fmt: skip
        assert part in str(raised.value)
    assert "out/bias" not in str(raised.value)
    assert_same_bits(other.state(), before)
    with pytest.raises(CheckpointError, match="hidden/kernel"):
        Training(make=lambda: model(hidden=9)).optimizer.load_checkpoint(str(tmp_path))


def test_the_same_model_under_other_names_gets_a_hint(tmp_path):
    Training(tmp_path).to(2)

    def renamed():
        copy = keras.models.clone_model(
            model(), clone_function=lambda layer: layer.__class__.from_config(
                {**layer.get_config(), "name": f"{layer.name}_1"}
            ),
        )  # fmt: skip
        return copy

    with pytest.raises(CheckpointError, match=r"clear_session\(\)"):
        Training(tmp_path, make=renamed).to(4)


def test_another_optimizer_is_refused_by_its_slots(tmp_path):
    Training(tmp_path).to(2)
    training = Training(tmp_path)
    dataset = training.optimizer._recipe.dataset
    sgd = TFOptimizer.from_keras(
        model(), dataset, model_dir=str(tmp_path), loss=LOSS, optimizer="sgd",
        engine="local", progress=False,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"SGD with slots.*saved: Adam with slots"):
        sgd.optimize()


def test_weights_are_loaded_without_what_the_optimizer_remembers(tmp_path):
    """Another optimizer, and a layer frozen that was trained; random draws start anew."""
    trained = Training(tmp_path)
    trained.to(6)
    tuned = model()
    tuned.get_layer("hidden").trainable = False
    optimizer = TFOptimizer.from_keras(
        tuned, trained.optimizer._recipe.dataset, loss=LOSS, optimizer="sgd", engine="local",
        num_ranks=2, progress=False,
    )  # fmt: skip
    assert optimizer.load_weights(str(tmp_path)) is optimizer

    def of(a_model):
        return {v.path: v.numpy() for v in a_model.variables if "seed" not in v.path}

    assert_same_bits(list(of(tuned).values()), list(of(trained.model).values()))
    optimizer.optimize(MaxIteration(2))
    assert optimizer.step == 2
    moved = {path for path, value in of(tuned).items() if (value != of(trained.model)[path]).any()}
    assert {"model/out/kernel", "model/norm/moving_mean"} < moved
    assert not moved & {"model/hidden/kernel", "model/hidden/bias", "model/frozen/kernel"}


def test_weights_of_another_model_are_not_loaded(tmp_path):
    Training(tmp_path).to(2)
    other = Training(make=lambda: model(hidden=9))
    before = other.state()
    with pytest.raises(CheckpointError, match=r"hidden/kernel.*norm/moving_mean"):
        other.optimizer.load_weights(str(tmp_path))
    assert_same_bits(other.state(), before)
    with pytest.raises(CheckpointError, match="none in"):
        other.optimizer.load_weights(str(tmp_path / "nothing"))
    with pytest.raises(InvalidInputError, match=r"no checkpoint then.*with step 2"):
        Training(tmp_path).optimizer.load_weights(str(tmp_path))


def test_a_model_dir_that_cannot_be_written_stops_before_training(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match="must be a folder that can be written"):
        Training(file / "model")
    with pytest.raises(InvalidInputError, match="model_dir is a path or a URL"):
        Training("nosuch://bucket/model")


def test_a_model_dir_that_fails_once_is_tried_again(tmp_path, monkeypatch, caplog):
    make, calls = files.make_folder, []

    def fails_once(fs, path):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(errno.EIO, "the storage hiccuped")
        make(fs, path)

    monkeypatch.setattr(files, "make_folder", fails_once)
    Training(tmp_path).to(2)
    assert len(calls) > 1 and "the storage hiccuped" in caplog.text


def test_retention(tmp_path):
    tensors = classified(ROWS)
    dataset = TFDataset.from_ndarrays(tensors, batch_size=BATCH)
    optimizer = TFOptimizer.from_keras(
        model(), dataset, model_dir=str(tmp_path), loss=LOSS, optimizer="adam",
        retention=Retention(keep_last=2, keep_every=4), engine="local", progress=False,
    )  # fmt: skip
    optimizer.optimize(MaxIteration(11), SeveralIteration(1))
    assert CheckpointStore(str(tmp_path)).list() == (4, 8, 10, 11)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 4


def test_a_checkpoint_at_each_epoch_and_at_the_end(tmp_path):
    training = Training(tmp_path)
    training.optimizer.optimize(MaxIteration(12))
    assert CheckpointStore(str(tmp_path)).list() == (5, 10, 12)
    training.optimizer.optimize(MaxEpoch(2))  # long since
    assert CheckpointStore(str(tmp_path)).list() == (5, 10, 12)


def test_weights_are_read_with_json_and_numpy_alone(tmp_path, monkeypatch):
    """By the very code that the manifest's documentation shows."""
    training = Training(tmp_path / "model", ranks=3)
    training.to(3)
    (document,) = (tmp_path / "model").glob("step-*.json")
    source = re.search(r"```python\n(.*?)```", manifest_module.__doc__, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(source.replace("step-00000120.json", document.name), names)
    trainable = {v.path: v.numpy() for v in training.model.trainable_variables}
    assert names["weights"].keys() == trainable.keys()
    for path, value in trainable.items():
        np.testing.assert_array_equal(names["weights"][path], value)
    assert json.loads(document.read_text())["step"] == 3


def test_graphs_resume_too(tmp_path):
    v1 = tf.compat.v1
    x, y = classified(ROWS)

    def run(model_dir, *ends):
        for end in ends:
            dataset = TFDataset.from_ndarrays((x, y), batch_size=BATCH, seed=2)
            with tf.Graph().as_default():
                features, labels = dataset.tensors
                kernel = v1.get_variable("kernel", [6, 3], initializer=v1.zeros_initializer())
                moving = v1.get_variable(
                    "moving", [6], initializer=v1.zeros_initializer(), trainable=False
                )
                update = v1.assign(moving, 0.9 * moving + 0.1 * tf.reduce_mean(features, 0))
                dropped = tf.nn.dropout(features, rate=0.3, seed=1)
                loss = tf.reduce_mean(
                    tf.nn.sparse_softmax_cross_entropy_with_logits(
                        labels=labels, logits=(dropped - moving) @ kernel
                    )
                )
                optimizer = TFOptimizer.from_loss(
                    loss, keras.optimizers.Adam(0.01), model_dir=model_dir, updates=[update],
                    engine="local", num_ranks=2, progress=False,
                )  # fmt: skip
                optimizer.optimize(MaxIteration(end))
                values = optimizer.sess.run([kernel, moving])
        return values

    assert_same_bits(run(str(tmp_path), 4, 7, 11), run(None, 11))
