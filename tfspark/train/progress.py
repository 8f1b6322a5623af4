"""How far training is, shown on the driver: a bar where someone looks, log lines elsewhere.

`progress_line` and `planned_steps` decide what to show; the reporters show it.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

import tqdm.auto
import tqdm.autonotebook
import tqdm.std

from tfspark.train.triggers import (
    MaxEpoch,
    MaxIteration,
    Progress,
    Trigger,
    TriggerAnd,
    TriggerOr,
)

logger = logging.getLogger("tfspark")


def planned_steps(end: Trigger, progress: Progress) -> int | None:
    """The step at which training ends at the latest, or None where no count tells.

    Args:
        end: the end trigger.
        progress: at any step before the end.

    Example:
        >>> planned_steps(MaxEpoch(5) | MaxIteration(2000), Progress(steps_per_epoch=100))
        500
    """
    if isinstance(end, (MaxEpoch, MaxIteration)):
        return progress.step if end(progress) else progress.step + end.horizon(progress)
    if isinstance(end, (TriggerAnd, TriggerOr)):
        counts = [planned_steps(trigger, progress) for trigger in end.triggers]
        known = [count for count in counts if count is not None]
        if isinstance(end, TriggerOr):
            return min(known, default=None)
        return max(known) if len(known) == len(counts) else None
    return None


def progress_line(
    progress: Progress, rows_per_second: float, total_steps: int | None, seconds_left: float | None
) -> str:
    """One line for the log.

    Example:
        >>> progress = Progress(30, epoch=2, step_in_epoch=5, steps_per_epoch=10, loss=0.25)
        >>> progress_line(progress, 5120.4, 100, 14)
        'step 30/100, epoch 3, loss 0.25, 5,120 rows/s, 00:14 left'
    """
    step = f"step {progress.step}" + (f"/{total_steps}" if total_steps else "")
    parts = [step, *_details(progress, rows_per_second)]
    if seconds_left is not None:
        parts.append(f"{tqdm.std.tqdm.format_interval(seconds_left)} left")
    return ", ".join(parts)


def _details(progress: Progress, rows_per_second: float) -> list[str]:
    # An epoch has its number, from 1, while it runs, and keeps it at its last step.
    details = [f"epoch {progress.epoch + (not progress.epoch_finished)}"]
    if progress.loss is not None:
        details.append(f"loss {progress.loss:.4g}")
    if progress.score is not None:
        details.append(f"score {progress.score:.4g}")
    return [*details, f"{rows_per_second:,.0f} rows/s"]


class ProgressReporter:
    """Base of the reporters, and the one that shows nothing; a context manager that closes it."""

    def update(self, progress: Progress, rows_per_second: float) -> None:
        """Shows the progress after a round.

        Args:
            progress: after the round's last step.
            rows_per_second: of the round.
        """

    def close(self) -> None:
        """Ends the display, also after an error; the last state stays in sight."""

    def __enter__(self) -> ProgressReporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class ProgressBar(ProgressReporter):
    """A bar in a terminal or a notebook.

    Args:
        total_steps: steps at the end; None where they are not known.
        first_step: finished steps at the start, those of a resumed run.
        stream: the terminal, standard error by default.
    """

    def __init__(self, total_steps: int | None, first_step: int = 0, stream: TextIO | None = None):
        self._bar = tqdm.auto.tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            file=stream,
            dynamic_ncols=True,
            mininterval=0,  # rounds take seconds already
        )

        self._started = False

    def update(self, progress: Progress, rows_per_second: float) -> None:
        """Moves the bar."""
        self._bar.set_postfix_str(", ".join(_details(progress, rows_per_second)), refresh=False)
        if self._started:
            self._bar.update(progress.step - self._bar.n)
        else:
            # The first round starts workers and loads programs. Were it counted, the time left
            # would be hours.
            self._bar.n = self._bar.initial = self._bar.last_print_n = progress.step
            self._bar.unpause()
            self._bar.refresh()
            self._started = True

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


class ProgressLog(ProgressReporter):
    """Lines for the log, the first and the last state and few between.

    They go to the logger `tfspark`, or to the stream where nobody has set up logging for it: a
    program whose output goes to a file shows its progress there without more ado.

    Args:
        total_steps, stream: as for `ProgressBar`.
        interval_s: seconds between two lines.
        clock: gives seconds.
    """

    def __init__(
        self,
        total_steps: int | None,
        stream: TextIO | None = None,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total_steps = total_steps
        self._stream = stream
        self._interval_s = interval_s
        self._clock = clock
        self._first: tuple[float, int] | None = None  # when, at which step
        self._said_at = float("-inf")
        self._unsaid: tuple[Any, ...] | None = None

    def update(self, progress: Progress, rows_per_second: float) -> None:
        """Writes a line if the last one is old enough."""
        self._unsaid = (progress, rows_per_second, self._total_steps, self._seconds_left(progress))
        if self._clock() - self._said_at >= self._interval_s:
            self._say()

    def close(self) -> None:
        """Writes the last state, if it is not there yet."""
        if self._unsaid is not None:
            self._say()

    def _seconds_left(self, progress: Progress) -> float | None:
        """By the rate since the first update: what was before it was mostly start-up."""
        now = self._clock()
        if self._first is None:
            self._first = (now, progress.step)
        first_at, first_step = self._first
        steps = progress.step - first_step
        if self._total_steps is None or steps < 1:
            return None
        return (self._total_steps - progress.step) * (now - first_at) / steps

    def _say(self) -> None:
        assert self._unsaid is not None
        line = progress_line(*self._unsaid)
        self._said_at, self._unsaid = self._clock(), None
        # A level of this logger is a decision of the user, also where it silences the lines.
        if logger.level or (logger.isEnabledFor(logging.INFO) and logger.hasHandlers()):
            logger.info(line)
        else:
            print(line, file=self._stream or sys.stderr, flush=True)


def progress_reporter(
    enabled: bool,
    total_steps: int | None,
    first_step: int = 0,
    stream: TextIO | None = None,
) -> ProgressReporter:
    """The reporter that fits where the program runs.

    Args:
        enabled: False for none.
        total_steps: steps at the end, `planned_steps`; None where they are not known.
        first_step: finished steps at the start.
        stream: where to show it, standard error by default.

    Example:
        >>> with progress_reporter(True, total_steps=500) as reporter:
        ...     reporter.update(Progress(step=10, loss=0.7), rows_per_second=2000.0)
    """
    if not enabled:
        return ProgressReporter()
    # tqdm.auto finds out whether this is a notebook that can show widgets.
    in_notebook = tqdm.autonotebook.tqdm is not tqdm.std.tqdm
    if in_notebook or (stream or sys.stderr).isatty():
        return ProgressBar(total_steps, first_step, stream)
    return ProgressLog(total_steps, stream)
