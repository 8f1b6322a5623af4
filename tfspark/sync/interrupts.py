"""Spark jobs that Ctrl-C asks to end, before it cancels them.

Python may swallow the KeyboardInterrupt of a Ctrl-C: whatever is raised while a destructor runs is
printed and forgotten, and every object of the JVM has one. So the signal is also noted, for all of
a training, and looked at while a job is waited for and between jobs.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, TimeoutError, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from pyspark import InheritableThread

T = TypeVar("T")

# Signals belong to the process, and so does this.
_noted = threading.Event()

_LOOK_S = 0.5
"""Seconds between two looks whether an interrupt was noted."""

_CANCELLED_S = 10.0
"""How long a cancelled job may take to end. Its tasks end with it, or later by themselves."""


def run_interruptibly(
    job: Callable[[], T],
    *,
    on_interrupt: Callable[[], None],
    cancel: Callable[[], None],
    grace_s: float,
) -> T:
    """The result of a job, which may end early where the caller is interrupted.

    The job runs in a thread of its own, because an interrupt that meets a call into the JVM leaves
    nothing to wait for.

    Args:
        job: runs one or more Spark jobs.
        on_interrupt: called at the first Ctrl-C; asks the job to end soon.
        cancel: called if it has not ended in time, or at the second Ctrl-C; ends it at once.
        grace_s: how long the job may take to end when it was asked to.

    Raises:
        KeyboardInterrupt: the job was cancelled.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(job())
        except BaseException as error:  # whatever it is, the caller's thread raises it
            future.set_exception(error)

    with noting_interrupts():
        thread = InheritableThread(target=run, name="tfspark-job", daemon=True)
        thread.start()
        try:
            while not wait([future], _LOOK_S).done:
                raise_if_noted()
            return future.result()
        except KeyboardInterrupt:
            if future.done():
                raise
        _noted.clear()
        try:
            on_interrupt()
            return future.result(grace_s)
        except (KeyboardInterrupt, TimeoutError):
            cancel()
            thread.join(_CANCELLED_S)
            raise KeyboardInterrupt from None


@contextmanager
def noting_interrupts() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt here, and is noted; may be nested.

    Instead of PySpark's own handler, which cancels all jobs at once. A handler of the user's own
    stays, and so does that of a program that ignores Ctrl-C.
    """
    former: Any = signal.getsignal(signal.SIGINT)
    ours = former is signal.default_int_handler or getattr(former, "__module__", "").startswith(
        "pyspark."
    )
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    _noted.clear()
    signal.signal(signal.SIGINT, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
        _noted.clear()


def raise_if_noted() -> None:
    """Raises the KeyboardInterrupt of a Ctrl-C that nobody has seen.

    Raises:
        KeyboardInterrupt: there was one.
    """
    if _noted.is_set() and threading.current_thread() is threading.main_thread():
        _noted.clear()
        raise KeyboardInterrupt


def _note(number: int, frame: Any) -> None:
    _noted.set()
    raise KeyboardInterrupt
