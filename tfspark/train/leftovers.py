"""Frees what forgotten objects hold in Spark, in a thread of its own.

A finalizer runs wherever the garbage collector happens to be: inside another call into the JVM, or
deep inside the parser. Calls into the JVM from there may wait for themselves. So a finalizer only
puts a note into a queue, and a thread does the work.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from functools import cache
from queue import SimpleQueue  # the one queue that the garbage collector may put into
from typing import Any

from py4j.protocol import Py4JError

logger = logging.getLogger("tfspark")

_forgotten: SimpleQueue[Callable[[], None]] = SimpleQueue()


def release_with(owner: Any, release: Callable[[], None]) -> Callable[[], None]:
    """Calls `release` in the background once `owner` is gone, unless it was called before.

    Args:
        owner: `release` must not refer to it.
        release: frees something; at most one call is made.

    Returns:
        A function that releases at once, in the caller's thread.
    """
    _start_thread()
    finalizer = weakref.finalize(owner, _forgotten.put, release)
    finalizer.atexit = False  # Spark goes with the process, and all that is held in it

    def release_now() -> None:
        if finalizer.detach() is not None:
            release()

    return release_now


@cache
def _start_thread() -> None:
    threading.Thread(target=_release_forgotten, name="tfspark-leftovers", daemon=True).start()


def _release_forgotten() -> None:
    while True:
        release = _forgotten.get()
        try:
            release()
        except Py4JError as error:
            logger.debug("Not released, Spark has gone: %s", error)
