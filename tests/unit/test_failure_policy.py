"""The decision after a failure, with a clock of the test's own."""

import logging

import pytest

from tfspark import FailurePolicy
from tfspark.errors import (
    CheckpointError,
    CheckpointWriteError,
    CommitLostError,
    InvalidInputError,
    NonFiniteError,
    PeerLostError,
    ResourceError,
    SparkJobError,
    StoreLostError,
    TrainingError,
    UserFunctionError,
    WorkerLostError,
)
from tfspark.train.failure_policy import Cause, Decision, Failures, cause_of

INFRASTRUCTURE = [
    CheckpointWriteError,
    PeerLostError,
    ResourceError,
    SparkJobError,
    StoreLostError,
    WorkerLostError,
]


class Clock:
    """Seconds that pass only where something sleeps."""

    def __init__(self):
        self.now = 0.0
        self.pauses = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.pauses.append(seconds)


class Job:
    """Raises what it is given, one after the other, then returns."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


@pytest.fixture
def clock():
    return Clock()


def failures(clock, **settings):
    return Failures(FailurePolicy(**settings), clock=clock, sleep=clock.sleep)


def mend(error):
    """Nothing is broken."""


@pytest.mark.parametrize("kind", INFRASTRUCTURE)
def test_what_passes_is_tried_again(clock, kind):
    assert cause_of(kind("Gone.")) is Cause.INFRASTRUCTURE
    job = Job(kind("Gone."), kind("Gone."))
    assert failures(clock).insist(job, mend) == "done"
    assert job.calls == 3


@pytest.mark.parametrize(
    "kind", [CheckpointError, CommitLostError, InvalidInputError, NonFiniteError, TrainingError]
)
def test_what_does_not_pass_is_raised_at_once(clock, kind, caplog):
    job = Job(kind("Never."))
    with pytest.raises(kind, match=r"Never\."):
        failures(clock).insist(job, mend)
    assert job.calls == 1 and not caplog.records


def test_an_error_of_the_user_is_retried_only_where_the_user_says_so(clock):
    with pytest.raises(UserFunctionError):
        failures(clock).insist(Job(UserFunctionError("Mine.")), mend)
    allowed = failures(clock, user_retries=1)
    assert allowed.insist(Job(UserFunctionError("Mine.")), mend) == "done"
    with pytest.raises(UserFunctionError):  # one within the window, whichever job
        allowed.insist(Job(UserFunctionError("Mine.")), mend)
    # The other kind has a count of its own.
    assert allowed.insist(Job(WorkerLostError("Gone.")), mend) == "done"


def test_failures_in_a_row_are_bounded_and_pauses_grow(clock):
    job = Job(*(WorkerLostError(f"Gone {n}.") for n in range(9)))
    with pytest.raises(WorkerLostError, match=r"Gone 6\."):
        failures(clock, in_a_row=6, longest_pause_s=5).insist(job, mend)
    assert job.calls == 7
    assert clock.pauses == [0, 1, 2, 4, 5, 5]


def test_another_job_starts_a_new_row(clock):
    some = failures(clock, in_a_row=2)
    for _ in range(5):
        assert some.insist(Job(PeerLostError("Gone."), PeerLostError("Gone.")), mend) == "done"


def test_failures_are_counted_within_a_window(clock):
    some = failures(clock, infrastructure_retries=2, window_s=60)
    for _ in range(2):
        some.insist(Job(WorkerLostError("Gone.")), mend)
        clock.now += 10
    with pytest.raises(WorkerLostError):
        some.insist(Job(WorkerLostError("Gone.")), mend)
    clock.now = 60  # the first one has left the window, the second has not
    some.insist(Job(WorkerLostError("Gone.")), mend)
    with pytest.raises(WorkerLostError):
        some.insist(Job(WorkerLostError("Gone.")), mend)


def test_what_is_broken_is_mended_before_the_next_try(clock):
    order = []
    errors = [StoreLostError("Lost."), WorkerLostError("Gone.")]

    def job():
        order.append("job")
        if errors:
            raise errors.pop(0)

    failures(clock).insist(job, lambda error: order.append(type(error).__name__))
    assert order == ["job", "StoreLostError", "job", "WorkerLostError", "job"]


def test_a_mending_that_fails_is_tried_again_too(clock):
    job, mending = Job(StoreLostError("Lost.")), Job(WorkerLostError("Gone."))
    assert failures(clock).insist(job, lambda error: mending()) == "done"
    assert (job.calls, mending.calls) == (2, 2)
    with pytest.raises(WorkerLostError):
        failures(clock).insist(
            Job(StoreLostError("Lost.")),
            lambda error: Job(*(WorkerLostError("Gone.") for _ in range(9)))(),
        )


def test_each_decision_is_one_line(clock, caplog):
    some = failures(clock, in_a_row=2, longest_pause_s=8)
    text = "First line.\n  Second, " + "x" * 5000
    with pytest.raises(WorkerLostError):
        some.insist(Job(*(WorkerLostError(text, rank=1) for _ in range(9))), mend)
    lines = [record.getMessage() for record in caplog.records]
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    assert all("\n" not in line and len(line) < 500 for line in lines)
    assert lines[0].startswith(
        "Failure policy: RETRY (infrastructure; 1 of 2 retries of this job, 1 of 100 within "
        "3600 s). WorkerLostError: [rank 1] First line. Second, x"
    )
    assert lines[1].startswith("Failure policy: RETRY after 1 s (infrastructure; 2 of 2 ")
    assert lines[2].startswith("Failure policy: RAISE (infrastructure; 2 of 2 ")
    assert len(lines) == 3


def test_a_decision_can_be_asked_for(clock):
    error, cause = CommitLostError("Lost."), Cause.INFRASTRUCTURE
    assert failures(clock).decide(error, 5, cause) is Decision.RETRY
    assert failures(clock).decide(error, 6, cause) is Decision.RAISE
    assert failures(clock, infrastructure_retries=0).decide(error, 1, cause) is Decision.RAISE


def test_a_very_long_row_has_the_longest_pause():
    assert FailurePolicy(longest_pause_s=30).pause_s(10_000) == 30


@pytest.mark.parametrize(
    "settings",
    [
        {"infrastructure_retries": -1},
        {"user_retries": 0.5},
        {"in_a_row": -1},
        {"window_s": 0},
        {"window_s": float("inf")},
        {"longest_pause_s": -1},
        {"wait_for_slots_s": -1},
        {"wait_for_slots_s": float("nan")},
        {"lost_slots": "fewer"},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(settings):
    with pytest.raises(InvalidInputError, match=next(iter(settings))):
        FailurePolicy(**settings)
