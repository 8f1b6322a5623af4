"""The loop of rounds: plan, run, record, validate, save, until the end trigger fires.

The loop decides; engines do. Its only state is the newest good commit and the progress up to it,
so whatever happens inside a round, what came before it is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from tfspark.data.order import BatchOrder
from tfspark.errors import NonFiniteError, StoreLostError, TFSparkError
from tfspark.sync.engine import Engine, RoundPlan, RoundResult, Run, StepRates, StepRecord
from tfspark.sync.interrupts import raise_if_noted
from tfspark.train.checkpoint import CheckpointStore, Retention
from tfspark.train.failure_policy import FailurePolicy, Failures
from tfspark.train.history import History
from tfspark.train.left_out import LeftOutRows
from tfspark.train.pacing import Pacing
from tfspark.train.progress import ProgressReporter, planned_steps
from tfspark.train.saving import save
from tfspark.train.summary import TrainSummary, ValidationSummary
from tfspark.train.triggers import Progress, Trigger

logger = logging.getLogger("tfspark")

T = TypeVar("T")


class Rates(Protocol):
    """The learning rates of the parameter groups; `ParameterGroups` is the real one."""

    def learning_rates(self, step: int) -> StepRates:
        """One rate per group for the step after `step` finished ones; None: it rests."""

    def observe(self, scores: Mapping[str, float], step: int) -> None:
        """Tells the schedules that watch a score the results of a validation, by name."""

    def state(self) -> dict[str, Any]:
        """What the schedules remember, as JSON."""


@dataclass(frozen=True)
class StopWhen:
    """A trigger as the stop predicate of a round: pure, and the same on every rank."""

    trigger: Trigger
    order: BatchOrder
    score: float | None

    def __call__(self, step: int, loss: float) -> bool:
        return self.trigger(progress_at(self.order, step, loss, self.score))


def progress_at(
    order: BatchOrder, step: int, loss: float | None = None, score: float | None = None
) -> Progress:
    """The progress after `step` finished steps."""
    epoch, step_in_epoch = order.locate(step)
    done = min(step_in_epoch * order.batch_size, order.total_rows)
    return Progress(
        step=step,
        epoch=epoch,
        step_in_epoch=step_in_epoch,
        steps_per_epoch=order.steps_per_epoch,
        rows=epoch * order.total_rows + done,
        loss=loss,
        score=score,
    )


def score_of(scores: Mapping[str, float]) -> float | None:
    """*The* score of a validation: its first metric, or its loss where there is no metric."""
    others = [value for name, value in scores.items() if name != "loss"]
    return next(iter([*others, *scores.values()]), None)


@dataclass
class TrainingLoop:
    """Runs rounds of an engine from a commit until a trigger fires.

    Attributes:
        engine, run: started.
        rates: learning rates by step.
        commit: the newest good commit.
        progress: after `commit`.
        validate: gives the scores of a commit by metric name; None without validation.
        store, retention: where checkpoints go, and which stay; None: nowhere.
        train_summary, validation_summary: what is written for TensorBoard.
        reporter: the progress bar.
        pacing: the length of rounds.
        scores: of the last validation.
        left_out: counts the rows of ranks that steps went on without; None where none may be.
        failures: decides which jobs are done again.
        after_save: called after a checkpoint, from which training may go on in another way.
        history: losses and scores so far.
        redone_steps: taken again after failures, as far as an engine told of them before it failed.
    """

    engine: Engine
    run: Run
    rates: Rates
    commit: Any
    progress: Progress
    reporter: ProgressReporter
    validate: Callable[[Any], dict[str, float]] | None = None
    store: CheckpointStore | None = None
    retention: Retention = field(default_factory=Retention)
    train_summary: TrainSummary | None = None
    validation_summary: ValidationSummary | None = None
    pacing: Pacing = field(default_factory=Pacing)
    scores: Mapping[str, float] = field(default_factory=dict)
    left_out: LeftOutRows | None = None
    failures: Failures = field(default_factory=lambda: Failures(FailurePolicy()))
    after_save: Callable[[], None] | None = None
    history: History = field(default_factory=History)
    redone_steps: int = 0
    _seen_step: int = 0  # the newest that the engine told of
    _saved_step: int | None = None
    # Of the last round; a later `train` need not find out again.
    _seconds_per_step: float | None = None
    _fixed_s: float = 0.0

    def train(self, end: Trigger, checkpoint: Trigger, validation: Trigger) -> None:
        """Takes steps until `end` fires; `commit` and `progress` follow along.

        Raises:
            NonFiniteError: a loss or a gradient is NaN or infinite; `commit` is the newest state
                that is good on all ranks.
            KeyboardInterrupt: the user interrupted; `commit` is the newest.
            TFSparkError: whatever the engine met; `commit` stays good.
        """
        look = None
        while not end(self.progress):
            raise_if_noted()
            step = self.progress.step
            if look is None or step >= look:
                look = self._next_look(end, checkpoint, validation)
            horizons = [] if look is None else [look - step]
            steps = self.pacing.steps(horizons, self._seconds_per_step, self._fixed_s, step)
            result = self._round(steps, end)
            self._record(result)
            self._advance(result)
            if result.halt and result.halt.kind == "non_finite":
                raise _non_finite(result)
            if result.halt and result.halt.kind == "interrupt":
                raise KeyboardInterrupt
            self._fixed_s = result.fixed_s
            self._seconds_per_step = (result.seconds - result.fixed_s) / len(result.records)
            if self.validate and validation(self.progress):
                self._validate()
            if self.store and checkpoint(self.progress):
                self.save()
                if self.after_save and not end(self.progress):
                    self.after_save()
        if self.store and self.progress.step:
            self.save_newest()

    def save_newest(self) -> None:
        """Writes the newest commit as a checkpoint, if it is none yet."""
        if self._saved_step != self.progress.step:
            self.save()

    def save(self) -> None:
        """Writes the newest commit as a checkpoint."""
        store = self.store
        assert store is not None
        training = {
            "schedules": self.rates.state(),
            "rows_per_epoch": self.run.order.total_rows,
            "loss": self.progress.loss,  # a trigger may look at it again after a resume
            "history": self.history.state(),
        }
        self.insist(
            lambda: save(
                store, self.engine, self.run, self.commit, self.progress, training, self.scores
            )
        )
        store.retain(self.retention)
        self._saved_step = self.progress.step

    def _next_look(self, end: Trigger, checkpoint: Trigger, validation: Trigger) -> int | None:
        """The step after which a trigger may fire first, or None where none bounds a round.

        It is asked of triggers at the start and where it was before: so it is the same however
        many rounds there are in between.
        """
        progress = self.progress
        watched = [checkpoint] if self.store else []
        watched += [validation] if self.validate else []
        steps = [progress.step + trigger.horizon(progress) for trigger in watched]
        # Of the end only what counts say: ranks ask it themselves (StopWhen), after each step or,
        # in local SGD, after each average.
        last = planned_steps(end, progress)
        return min([*steps, *([] if last is None else [last])], default=None)

    def _round(self, num_steps: int, end: Trigger) -> RoundResult:
        first = self.progress.step
        plan = RoundPlan(
            first_step=first,
            learning_rates=tuple(
                self.rates.learning_rates(step) for step in range(first, first + num_steps)
            ),
            stop=StopWhen(end, self.run.order, self.progress.score),
        )
        return self.insist(lambda: self.engine.round(self.commit, plan, self._live))

    def _live(self, record: StepRecord) -> None:
        """Shows a step of the round that runs."""
        self._seen_step = record.step
        at = progress_at(self.run.order, record.step, record.loss, self.progress.score)
        self.reporter.update(at, record.rows / sum(record.seconds.values()))

    def insist(self, job: Callable[[], T]) -> T:
        """The result of a job, which is done again if its failure is one that passes.

        Args:
            job: reads `commit`, which stays good whatever happens.
        """
        return self.failures.insist(job, self._mend)

    def _mend(self, error: TFSparkError) -> None:
        self.redone_steps += max(0, self._seen_step - self.progress.step)
        self._seen_step = self.progress.step
        if isinstance(error, StoreLostError):
            logger.warning("Rebuilding lost stores.")
            self.engine.rebuild()

    def _advance(self, result: RoundResult) -> None:
        if result.commit is None:
            return
        self.commit = result.commit  # also without a step: the engine keeps the newest only
        if not result.records:
            return
        last = result.records[-1]
        self.progress = progress_at(self.run.order, last.step, last.loss, self.progress.score)
        rows = sum(record.rows for record in result.records)
        self.reporter.update(self.progress, rows / result.seconds)

    def _record(self, result: RoundResult) -> None:
        if self.left_out is not None:
            self.left_out.add(result.records)
        for record in result.records:
            ends_epoch = self.run.order.locate(record.step)[1] == 0
            self.history.add_step(record.loss, record.rows, ends_epoch)
        if self.train_summary is None or not result.records:
            return
        seconds_per_step = result.seconds / len(result.records)
        for record in result.records:
            rates = self.rates.learning_rates(record.step - 1)
            scalars = {
                "Loss": record.loss,
                "LearningRate": next(rate for rate in rates if rate is not None),
                "Throughput": record.rows / seconds_per_step,
                **_phases(record, seconds_per_step),
            }
            if self.left_out is not None:
                scalars["LeftOut"] = len(record.left_out)
            at = progress_at(self.run.order, record.step, record.loss, self.progress.score)
            self.train_summary.add_step(at, scalars)
        self.train_summary.flush()

    def _validate(self) -> None:
        assert self.validate is not None
        validate = self.validate
        self.scores = self.insist(lambda: validate(self.commit))
        self.history.add_scores(self.progress.step, self.scores)
        score = score_of(self.scores)
        self.progress = replace(self.progress, score=score)
        if score is not None:
            self.rates.observe({"score": score, **self.scores}, self.progress.step)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in self.scores.items())
        logger.info("Validation after step %d: %s", self.progress.step, shown)
        if self.validation_summary is not None:
            for name, value in self.scores.items():
                self.validation_summary.add_scalar(name, value, self.progress.step)
            self.validation_summary.flush()


def _phases(record: StepRecord, seconds_per_step: float) -> dict[str, float]:
    """Seconds of each phase; where the exchange is not measured, it is what is left."""
    if "exchange" in record.seconds:
        return {f"Phase/{name}": value for name, value in record.seconds.items()}
    rest = max(0.0, seconds_per_step - sum(record.seconds.values()))
    return {f"Phase/{name}": value for name, value in {**record.seconds, "exchange": rest}.items()}


def _non_finite(result: RoundResult) -> NonFiniteError:
    halt = result.halt
    assert halt is not None
    return NonFiniteError(
        f"The {halt.what} must be finite. Received: NaN or infinity. The weights of the last "
        "good commit are kept; lower the learning rate, clip the gradient "
        "(clip_norm=, clip_value=), or look at the rows of this batch.",
        rank=halt.rank,
        step=halt.step,
        phase="gradient",
    )
