import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from tfspark.errors import TrainingError
from tfspark.sync.carriers import FileCarrier, FrameCarrier, message_of, shard_frame, state_of
from tfspark.sync.compression import compression
from tfspark.sync.engine import RankState, StepRecord
from tfspark.sync.frames import Message
from tfspark.sync.messages import state_to_message


@pytest.fixture(params=["frames", "files"])
def carrier(request, tmp_path):
    return FrameCarrier() if request.param == "frames" else FileCarrier(str(tmp_path))


def gradient(source, size):
    values = np.random.default_rng(source).normal(size=size).astype("float32")
    return Message("gradient", source, {"rows": 3}, {"gradient": values, "mean": np.ones(2)})


@pytest.mark.parametrize("size", [0, 10, 100_000])
def test_a_message_arrives_as_it_was(carrier, size):
    sent = gradient(1, size)
    got = message_of(carrier.pack(sent, 4, 0))
    assert (got.kind, got.source, got.meta) == ("gradient", 1, {"rows": 3})
    assert list(got.arrays) == ["gradient", "mean"]
    for name, array in got.arrays.items():
        np.testing.assert_array_equal(array, sent.arrays[name])
        assert array.dtype == sent.arrays[name].dtype and not array.flags.writeable


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_state_reaches_its_owner_whole_and_all_others_as_a_shard(carrier, size):
    shard = np.arange(size, dtype="float32")
    slots = [[shard + 1, np.int64(7)], [shard * 2]]
    record = StepRecord(5, 0.5, 32, {"gradient": 0.1})
    state = RankState(1, 5, shard, slots, np.arange(3.0), [np.int32(4)], [record])
    run = SimpleNamespace(num_ranks=3, compression=compression(None, "float32", 8))
    frames = dict(carrier.state_to_all(run, state, 5))
    assert sorted(frames) == [0, 1, 2]
    for frame in frames.values():
        message = message_of(frame)
        assert message.source == 1 and message.meta["halt"] is None
        np.testing.assert_array_equal(message.arrays["shard"], shard)
        np.testing.assert_array_equal(message.arrays["mean"], np.arange(3.0))
        assert message.arrays["first0"] == 4
    own = state_of(frames[1])
    assert (own.step, own.records) == (5, [record])
    for group, expected in zip(own.slots, slots, strict=True):
        for slot, value in zip(group, expected, strict=True):
            np.testing.assert_array_equal(slot, value)


def test_a_large_message_leaves_its_path_to_spark(tmp_path):
    carrier = FileCarrier(str(tmp_path))
    assert len(carrier.pack(gradient(0, 100_000), 0, 1)) < 500
    assert len(list(tmp_path.rglob("gradient-*"))) == 1
    carrier.pack(gradient(0, 10), 0, 1)
    assert len(list(tmp_path.rglob("gradient-*"))) == 1


def test_a_task_that_runs_again_leaves_readers_alone(tmp_path):
    carrier = FileCarrier(str(tmp_path))
    frame = carrier.pack(gradient(0, 100_000), 0, 1)
    message = message_of(frame)
    assert carrier.pack(gradient(0, 100_000), 0, 1) == frame
    expected = gradient(0, 100_000).arrays["gradient"]
    np.testing.assert_array_equal(message.arrays["gradient"], expected)
    np.testing.assert_array_equal(message_of(frame).arrays["gradient"], expected)


@pytest.mark.parametrize("more", [-1000, 0, 1000])
def test_what_was_forgotten_is_written_over(tmp_path, more):
    carrier = FileCarrier(str(tmp_path))
    first = carrier.pack(gradient(0, 100_000), 3, 1)
    (file,) = tmp_path.rglob("gradient-*")
    inode = file.stat().st_ino
    carrier.forget(0, 3)
    sent = gradient(1, 100_000 + more)
    second = carrier.pack(sent, 4, 1)
    (file,) = tmp_path.rglob("gradient-*")
    assert file.stat().st_ino == inode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4-1"]
    got = message_of(second)
    assert got.source == 1 and list(got.arrays) == ["gradient", "mean"]
    for name, array in sent.arrays.items():
        np.testing.assert_array_equal(got.arrays[name], array)
    with pytest.raises(TrainingError, match="no file"):
        message_of(first)


def test_a_file_is_written_over_by_what_has_about_its_size(tmp_path):
    carrier = FileCarrier(str(tmp_path))
    carrier.pack(gradient(0, 100_000), 3, 1)
    carrier.forget(0, 3)
    for source, size in ((1, 50_000), (2, 200_000)):
        message = message_of(carrier.pack(gradient(source, size), 4, 1))
        expected = gradient(source, size).arrays["gradient"]
        np.testing.assert_array_equal(message.arrays["gradient"], expected)
    sizes = [path.stat().st_size for path in tmp_path.rglob("*-*") if path.is_file()]
    assert len(sizes) == 3


def test_a_task_that_does_not_count_changes_nothing(tmp_path):
    carrier = FileCarrier(str(tmp_path))
    good = gradient(0, 100_000)
    frame = carrier.pack(good, 3, 1)
    # It read what a later step had written over.
    garbage = Message("gradient", 0, {"rows": 3}, {"gradient": np.zeros(100_000, "float32")})
    assert carrier.pack(garbage, 3, 1) == frame
    np.testing.assert_array_equal(message_of(frame).arrays["gradient"], good.arrays["gradient"])


def test_only_one_ranks_messages_of_one_step_are_forgotten(tmp_path):
    carrier = FileCarrier(str(tmp_path))
    frames = {
        (rank, step): carrier.pack(gradient(rank, 100_000), step, 0)
        for rank in (1, 11)
        for step in (2, 12)
    }
    carrier.forget(1, 2)
    carrier.forget(1, 2)
    with pytest.raises(TrainingError, match="no file"):
        message_of(frames[1, 2])
    for key in ((1, 12), (11, 2), (11, 12)):
        assert message_of(frames[key]).source == key[0]


def test_a_task_that_outlives_its_round_leaves_nothing(tmp_path):
    folder = tmp_path / "round"
    folder.mkdir()
    carrier = FileCarrier(str(folder))
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        carrier.pack(gradient(0, 100_000), 0, 1)
    assert not os.path.exists(folder)


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_commit_gives_every_rank_its_shard(carrier, size):
    shard = np.arange(size, dtype="float32")
    state = RankState(1, 5, shard, [[shard * 2]], np.arange(3.0), [np.int32(4)])
    frame = carrier.pack(state_to_message(state), 5, "commit")
    message = message_of(shard_frame(frame))
    assert (message.source, message.meta["step"]) == (1, 5)
    np.testing.assert_array_equal(message.arrays["shard"], shard)
    np.testing.assert_array_equal(message.arrays["mean"], np.arange(3.0))
    assert message.arrays["first0"] == 4
    small = carrier.is_light or size == 10
    assert (len(frame) < 1000) == small
