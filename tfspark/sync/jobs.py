"""Spark jobs that end: cancelled if they are left, or if executors are missing for too long."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from py4j.protocol import Py4JError, Py4JNetworkError
from pyspark import InheritableThread, SparkContext
from pyspark.errors import PySparkException

from tfspark.data.failures import driver_errors
from tfspark.errors import ClusterError, TFSparkError
from tfspark.slots import in_process, registered_slots

logger = logging.getLogger("tfspark")

WAIT_FOR_SLOTS_S = 30.0

_LOOK_S = 0.2
"""Seconds between two looks whether executors are back."""

_FIRST_LOOK_S, _SELDOM_S = 2.0, 5.0
"""When a job that runs is first asked whether it has executors, and how often then."""

_MOST_CANCELS = 10


class Jobs:
    """The jobs of one training.

    Args:
        context: the SparkContext.
        wait_for_slots_s: how long they wait for executors in place of those that were lost.
    """

    def __init__(self, context: SparkContext, wait_for_slots_s: float = WAIT_FOR_SLOTS_S):
        self.wait_for_slots_s = wait_for_slots_s
        self._context = context
        self._tag = f"tfspark-{uuid.uuid4().hex}"

    @contextmanager
    def job(self, slots: int = 1) -> Iterator[None]:
        """Around a Spark job: raises the errors of its tasks as they were, cancels it if left.

        Args:
            slots: that it needs at the same time.

        Raises:
            ClusterError: there were too few slots for too long.
        """
        self._context.addJobTag(self._tag)
        try:
            with self._given_up_without(slots), driver_errors():
                yield
        except (KeyboardInterrupt, SystemExit):
            # PySpark's own handler of Ctrl-C does this too, but notebooks replace it.
            self.cancel()
            raise
        finally:
            self._context.removeJobTag(self._tag)

    def cancel(self) -> None:
        """Cancels those that run."""
        for attempt in range(_MOST_CANCELS):
            try:
                self._context.cancelJobsWithTag(self._tag)
            except Py4JNetworkError:
                # py4j has dropped the connection that was interrupted, and now and then the JVM
                # drops the next one too.
                if attempt + 1 == _MOST_CANCELS:
                    raise
                time.sleep(0.1)
            else:
                return

    def await_slots(self, needed: int, timeout_s: float) -> int:
        """How many task slots there are, once as many are there as needed, or time is over."""
        there = registered_slots(self._context)
        if there < needed and timeout_s:
            logger.warning(
                "Waiting up to %g s for %d task slots; there are %d.", timeout_s, needed, there
            )
        deadline = time.monotonic() + timeout_s
        while there < needed and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            there = registered_slots(self._context)
        return there

    @contextmanager
    def _given_up_without(self, slots: int) -> Iterator[None]:
        """Around a Spark job: cancels it where slots are missing, for which Spark waits for ever.

        Spark compares the slots with those of a barrier stage when a job is submitted, but not when
        it starts the stage anew because an executor was lost.
        """
        if in_process(self._context):
            yield
            return
        ended, missing = threading.Event(), threading.Event()
        # This kind of thread gives its connection to the JVM back when it ends.
        arguments = slots, ended, missing
        InheritableThread(target=self._watch_slots, args=arguments, daemon=True).start()
        try:
            yield
        except (Py4JError, PySparkException, TFSparkError):
            if not missing.is_set():
                raise
            raise ClusterError(
                f"A job needs {slots} task slot{'s' * (slots > 1)} at the same time. Received: "
                f"fewer for {self.wait_for_slots_s:g} s. Look whether the cluster has hosts left, "
                "or let training wait longer (FailurePolicy(wait_for_slots_s=…))."
            ) from None
        finally:
            ended.set()

    def _watch_slots(self, slots: int, ended: threading.Event, missing: threading.Event) -> None:
        pause_s, missing_since = _FIRST_LOOK_S, None
        while not ended.wait(pause_s):
            pause_s, now = _SELDOM_S, time.monotonic()
            try:
                there = registered_slots(self._context)
            except (Py4JError, AssertionError, AttributeError):
                return  # Spark was stopped, which ends the job by itself
            if there >= slots:
                missing_since = None
                continue
            if missing_since is None:
                missing_since = now
            if now - missing_since >= self.wait_for_slots_s:
                missing.set()
                self.cancel()
                return
