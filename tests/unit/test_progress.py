from __future__ import annotations

import io
import logging
import time

import pytest

from tfspark.train.progress import (
    ProgressBar,
    ProgressLog,
    ProgressReporter,
    planned_steps,
    progress_line,
    progress_reporter,
)
from tfspark.train.triggers import (
    EveryEpoch,
    MaxEpoch,
    MaxIteration,
    MaxScore,
    MinLoss,
    Progress,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def at(step: int, loss: float | None = 0.5, steps_per_epoch: int = 10) -> Progress:
    return Progress(step, *divmod(step, steps_per_epoch), steps_per_epoch, loss=loss)


class TestPlannedSteps:
    @pytest.mark.parametrize(
        ("end", "steps"),
        [
            (MaxEpoch(5), 50),
            (MaxIteration(7), 7),
            (EveryEpoch(), None),
            (MaxScore(0.9), None),
            (MaxEpoch(5) | MaxScore(0.9) | MaxIteration(70), 50),
            (MaxEpoch(5) & MaxIteration(70), 70),
            (MaxEpoch(5) & MinLoss(0.1), None),
            (MinLoss(0.1) | MaxScore(0.1), None),
        ],
    )
    @pytest.mark.parametrize("step", [0, 3])
    def test_from_any_step(self, end, steps, step):
        assert planned_steps(end, at(step)) == steps

    def test_an_end_that_is_reached(self):
        assert planned_steps(MaxEpoch(2), at(25)) == 25


class TestLine:
    def test_everything_known(self):
        line = progress_line(at(30, 0.25), 5120.4, 100, 75)
        assert line == "step 30/100, epoch 3, loss 0.25, 5,120 rows/s, 01:15 left"

    def test_little_known(self):
        assert progress_line(at(31, None), 9.6, None, None) == "step 31, epoch 4, 10 rows/s"

    def test_the_score_of_a_validation(self):
        progress = Progress(step=1, epoch=1, loss=1.0, score=0.98765)
        assert progress_line(progress, 1.0, None, None).endswith("score 0.9877, 1 rows/s")


class TestBar:
    def test_it_shows_steps_epoch_loss_and_rate(self):
        stream = Terminal()
        with ProgressBar(100, stream=stream) as bar:
            bar.update(at(25, 0.75), 2000.0)
        last = stream.getvalue().rstrip("\n").rpartition("\r")[2]
        assert "25%" in last
        assert "25/100" in last
        assert "epoch 3, loss 0.75, 2,000 rows/s" in last
        assert stream.getvalue().endswith("\n")

    def test_a_resumed_run_starts_where_it_was(self):
        stream = Terminal()
        with ProgressBar(100, first_step=40, stream=stream) as bar:
            bar.update(at(41), 1.0)
        assert "40/100" in stream.getvalue()
        assert "41/100" in stream.getvalue()

    def test_time_left_does_not_count_the_start_up(self):
        stream = Terminal()
        with ProgressBar(1000, stream=stream) as bar:
            time.sleep(0.3)  # tqdm has no clock to set: at this rate 999 steps would take minutes
            bar.update(at(1), 1.0)
            assert "<?" in stream.getvalue().rpartition("\r")[2]
            time.sleep(0.01)
            bar.update(at(500), 1.0)
            assert "<00:00" in stream.getvalue().rpartition("\r")[2]

    def test_no_total(self):
        stream = Terminal()
        with ProgressBar(None, stream=stream) as bar:
            bar.update(at(7), 1.0)
        assert "7step" in stream.getvalue()
        assert "%" not in stream.getvalue()

    def test_it_closes_after_an_error(self):
        stream = Terminal()
        with pytest.raises(RuntimeError, match="stop"), ProgressBar(9, stream=stream) as bar:
            bar.update(at(1), 1.0)
            raise RuntimeError("stop")
        assert stream.getvalue().endswith("\n")


class TestLog:
    def test_few_lines_and_always_the_last(self):
        stream, clock = io.StringIO(), Clock()
        with ProgressLog(100, stream=stream, interval_s=10, clock=clock) as log:
            for step in range(1, 31):
                clock.now = float(step)
                log.update(at(step), 1.0)
        lines = stream.getvalue().splitlines()
        assert [line.partition(",")[0] for line in lines] == [
            "step 1/100",
            "step 11/100",
            "step 21/100",
            "step 30/100",
        ]
        assert lines[1].endswith("01:29 left")  # 89 steps at one a second

    def test_time_left_does_not_count_the_start_up_and_what_was_before(self):
        stream, clock = io.StringIO(), Clock()
        with ProgressLog(100, stream=stream, clock=clock) as log:
            clock.now = 60.0
            log.update(at(81), 1.0)
            clock.now = 70.0
            log.update(at(90), 1.0)
        first, second = stream.getvalue().splitlines()
        assert first.endswith("rows/s")
        assert second.endswith("00:11 left")

    def test_a_logger_that_is_set_up_gets_the_lines(self, caplog):
        stream = io.StringIO()
        with caplog.at_level(logging.INFO, "tfspark"), ProgressLog(10, stream=stream) as log:
            log.update(at(1), 1.0)
        assert "step 1/10" in caplog.text
        assert stream.getvalue() == ""

    def test_a_logger_that_is_silenced_stays_silent(self, caplog):
        stream = io.StringIO()
        with caplog.at_level(logging.ERROR, "tfspark"), ProgressLog(10, stream=stream) as log:
            log.update(at(1), 1.0)
        assert caplog.text == stream.getvalue() == ""

    def test_nothing_to_say(self):
        stream = io.StringIO()
        ProgressLog(10, stream=stream).close()
        assert stream.getvalue() == ""


class TestChoice:
    def test_by_where_the_program_runs(self):
        assert isinstance(progress_reporter(True, 10, stream=Terminal()), ProgressBar)
        assert isinstance(progress_reporter(True, 10, stream=io.StringIO()), ProgressLog)
        assert type(progress_reporter(False, 10, stream=Terminal())) is ProgressReporter

    def test_switched_off_shows_nothing(self):
        stream = Terminal()
        with progress_reporter(False, 10, stream=stream) as reporter:
            reporter.update(at(1), 1.0)
        assert stream.getvalue() == ""
