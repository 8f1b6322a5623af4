"""Spark jobs that Ctrl-C asks to end, before it cancels them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, TimeoutError
from contextlib import contextmanager
from typing import Any, TypeVar

from pyspark import InheritableThread

T = TypeVar("T")

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

    with _python_handler():
        thread = InheritableThread(target=run, name="tfspark-job", daemon=True)
        thread.start()
        try:
            return future.result()
        except KeyboardInterrupt:
            if future.done():
                raise
        try:
            on_interrupt()
            return future.result(grace_s)
        except (KeyboardInterrupt, TimeoutError):
            cancel()
            thread.join(_CANCELLED_S)
            raise KeyboardInterrupt from None


@contextmanager
def _python_handler() -> Iterator[None]:
    """Without PySpark's own handler of Ctrl-C, which cancels all jobs at once."""
    former: Any = signal.getsignal(signal.SIGINT)
    replaced = threading.current_thread() is threading.main_thread() and getattr(
        former, "__module__", ""
    ).startswith("pyspark.")
    if replaced:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if replaced:
            signal.signal(signal.SIGINT, former)
