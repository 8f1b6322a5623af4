from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tfspark.errors import InvalidInputError
from tfspark.train.summary import TrainSummary, ValidationSummary
from tfspark.train.triggers import EveryEpoch, Progress, SeveralIteration


def events(folder: Path) -> list:
    """Every event of a folder, read by TensorFlow's own reader, which checks the checksums."""
    return [
        event
        for path in sorted(folder.iterdir())
        for event in tf.compat.v1.train.summary_iterator(str(path))
    ]


def test_tensorflow_reads_what_was_written(tmp_path):
    summary = TrainSummary(tmp_path, "lenet")
    summary.add_scalar("Loss", 0.5, 1, wall_time=1000.25)
    summary.add_scalar("Phase/update", 0.001, 2)
    summary.close()
    version, loss, phase = events(tmp_path / "lenet" / "train")
    assert version.file_version == "brain.Event:2"
    assert (loss.step, loss.wall_time) == (1, 1000.25)
    assert [(v.tag, v.simple_value) for v in loss.summary.value] == [("Loss", 0.5)]
    assert phase.wall_time == pytest.approx(time.time(), abs=60)
    assert phase.summary.value[0].tag == "Phase/update"
    assert phase.summary.value[0].simple_value == np.float32(0.001)


def test_the_file_is_one_that_tensorboard_looks_for(tmp_path):
    summary = ValidationSummary(str(tmp_path), "lenet")
    summary.add_scalar("accuracy", 0.9, 10)
    (path,) = (tmp_path / "lenet" / "validation").iterdir()
    assert "tfevents" in path.name


def test_read_scalar_gives_step_value_and_time(tmp_path):
    summary = TrainSummary(tmp_path, "a")
    for step, value in [(1, 0.5), (2, 0.25)]:
        summary.add_scalar("Loss", value, step, wall_time=100.5 + step)
        summary.add_scalar("Throughput", 7.0, step)
    expected = [[1, 0.5, 101.5], [2, 0.25, 102.5]]
    np.testing.assert_array_equal(summary.read_scalar("Loss"), expected)
    assert summary.tags() == ["Loss", "Throughput"]
    assert summary.read_scalar("Other").shape == (0, 3)


def test_a_flushed_value_is_there_for_another_reader(tmp_path):
    summary = TrainSummary(tmp_path, "a")
    summary.add_scalar("Loss", 0.5, 1)
    summary.flush()
    assert len(events(tmp_path / "a" / "train")) == 2
    assert len(TrainSummary(tmp_path, "a").read_scalar("Loss")) == 1


def test_an_earlier_run_and_a_second_file_are_read_in_order(tmp_path):
    earlier = TrainSummary(tmp_path, "a")
    earlier.add_scalar("Loss", 3.0, 1)
    earlier.close()
    earlier.add_scalar("Loss", 2.0, 2)
    later = TrainSummary(tmp_path, "a")
    later.add_scalar("Loss", 1.0, 3)
    assert len(list((tmp_path / "a" / "train").iterdir())) == 3
    earlier.flush()
    np.testing.assert_array_equal(later.read_scalar("Loss")[:, :2], [[1, 3], [2, 2], [3, 1]])


def test_a_record_being_written_is_left_out(tmp_path):
    summary = TrainSummary(tmp_path, "a")
    summary.add_scalar("Loss", 1.0, 1)
    summary.add_scalar("Loss", 2.0, 2)
    summary.close()
    (path,) = (tmp_path / "a" / "train").iterdir()
    whole = path.read_bytes()
    for cut in range(1, 30):
        path.write_bytes(whole[:-cut])
        assert summary.read_scalar("Loss")[:, 0].tolist() == [1]


def test_graph_mode(run_python, tmp_path):
    output = run_python(f"""
        import tensorflow as tf
        tf.compat.v1.disable_v2_behavior()
        from tfspark.train.summary import TrainSummary
        summary = TrainSummary({str(tmp_path)!r}, "a")
        with tf.Graph().as_default():
            summary.add_scalar("Loss", 0.5, 3)
            print(summary.read_scalar("Loss")[:, :2].tolist())
    """).stdout
    assert output.strip() == "[[3.0, 0.5]]"


class TestTriggers:
    def steps(self, summary: TrainSummary, count: int) -> None:
        for step in range(1, count + 1):
            progress = Progress(step, *divmod(step, 4), 4)
            scalars = {"Loss": 1.0 / step, "Phase/update": 0.1, "Phase/gradient": 0.2}
            summary.add_step(progress, scalars)

    def test_every_step_by_default(self, tmp_path):
        summary = TrainSummary(tmp_path, "a")
        self.steps(summary, 3)
        assert summary.read_scalar("Loss")[:, 0].tolist() == [1, 2, 3]

    def test_only_when_they_fire(self, tmp_path):
        summary = TrainSummary(tmp_path, "a")
        summary.set_summary_trigger("Loss", SeveralIteration(3))
        assert summary.set_summary_trigger("Phase", EveryEpoch()) is summary
        self.steps(summary, 9)
        assert summary.read_scalar("Loss")[:, 0].tolist() == [3, 6, 9]
        assert summary.read_scalar("Phase/update")[:, 0].tolist() == [4, 8]
        assert summary.read_scalar("Phase/gradient")[:, 0].tolist() == [4, 8]

    def test_wrong_names_and_triggers(self, tmp_path):
        summary = TrainSummary(tmp_path, "a")
        with pytest.raises(InvalidInputError, match=r"Loss, LearningRate, .* Received: 'loss'"):
            summary.set_summary_trigger("loss", EveryEpoch())
        with pytest.raises(InvalidInputError, match="checkpoint"):
            summary.set_summary_trigger("Parameters", EveryEpoch())
        with pytest.raises(InvalidInputError, match="trigger is a trigger"):
            summary.set_summary_trigger("Loss", 3)


@pytest.mark.parametrize(("log_dir", "app_name"), [("", "a"), (None, "a"), ("x", ""), ("x", 3)])
def test_wrong_names_of_folders(log_dir, app_name):
    with pytest.raises(InvalidInputError, match="is a string that is not empty"):
        TrainSummary(log_dir, app_name)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInputError, match="can write"):
        TrainSummary(tmp_path / "file", "a")
