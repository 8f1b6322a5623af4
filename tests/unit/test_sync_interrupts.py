"""Ctrl-C in the middle of a job: asked to end first, cancelled if it does not."""

import signal
import threading
import time

import pytest

from tfspark.sync.interrupts import noting_interrupts, raise_if_noted, run_interruptibly


def interrupt_soon(times=1):
    def send():
        for _ in range(times):
            time.sleep(0.2)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()


@pytest.fixture(autouse=True)
def python_handler():
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def run(job, ended, grace_s=10.0):
    told = []

    def note(what):
        told.append(what)
        ended.set() if what in job.ends_on else None

    try:
        result = run_interruptibly(
            job,
            on_interrupt=lambda: note("asked"),
            cancel=lambda: note("cancelled"),
            grace_s=grace_s,
        )
    except KeyboardInterrupt:
        result = "interrupted"
    return result, told


class Job:
    """Waits until it is told to end in one of some ways."""

    def __init__(self, ended, *ends_on):
        self.ended, self.ends_on = ended, ends_on

    def __call__(self):
        assert self.ended.wait(20)
        return "result"


def test_an_undisturbed_job_returns_or_raises():
    assert run_interruptibly(lambda: 3, on_interrupt=None, cancel=None, grace_s=1) == 3
    with pytest.raises(ZeroDivisionError):
        run_interruptibly(lambda: 1 / 0, on_interrupt=None, cancel=None, grace_s=1)


def test_a_job_that_ends_when_asked_gives_its_result():
    ended = threading.Event()
    interrupt_soon()
    assert run(Job(ended, "asked", "cancelled"), ended) == ("result", ["asked"])


def test_a_job_that_does_not_end_when_asked_is_cancelled():
    ended = threading.Event()
    interrupt_soon()
    result = run(Job(ended, "cancelled"), ended, grace_s=0.3)
    assert result == ("interrupted", ["asked", "cancelled"])


def test_a_second_interrupt_does_not_wait():
    ended = threading.Event()
    interrupt_soon(times=2)
    started = time.monotonic()
    result = run(Job(ended, "cancelled"), ended, grace_s=20)
    assert result == ("interrupted", ["asked", "cancelled"])
    assert time.monotonic() - started < 10


class Swallowing:
    """Is interrupted while it is destroyed, where Python forgets what is raised."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_swallows_is_not_lost():
    ended = threading.Event()
    with noting_interrupts():
        with pytest.raises(KeyboardInterrupt):
            Swallowing()
            raise_if_noted()
        raise_if_noted()  # once only
        Swallowing()
        assert run(Job(ended, "asked"), ended) == ("result", ["asked"])
        raise_if_noted()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_own_stays():
    seen = []
    signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    with noting_interrupts():
        signal.raise_signal(signal.SIGINT)
        raise_if_noted()
    assert seen == [1]
