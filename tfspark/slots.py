"""Slots: how many tasks of an application can run at once, and how many do."""

from __future__ import annotations

import logging
import math
import re
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from pyspark import SparkConf, SparkContext

from tfspark.errors import ClusterError

logger = logging.getLogger("tfspark")

STARTING_WORKERS = "tfspark-workers"  # the group of the job that does, see context.py

# How long executors may take to register, and how long their number must stay the same for the
# cluster to count as complete.
_REGISTRATION_S = 60.0
_SETTLED_S = 5.0

# The slots of applications whose executors have registered, which need not be waited for again.
_settled: weakref.WeakKeyDictionary[SparkContext, int] = weakref.WeakKeyDictionary()


def slots(context: SparkContext) -> int:
    """How many tasks the application can run at once; the default of `num_ranks`.

    Waits until the executors that were asked for have registered: on some clusters a new
    SparkContext has none for the first seconds. What has registered by then is known from there on,
    and waited for again only while there are fewer, after a loss. With dynamic allocation it is the
    number that Spark may grow to, or starts with where no limit is set.

    Raises:
        ClusterError: no executor registered within a minute, or `spark.task.cpus` is more than an
            executor has.

    Example:
        >>> slots(init_nncontext(master="local[4]"))  # doctest: +SKIP
        4
    """
    settings = settings_of(context)
    expected = _expected_slots(settings)
    registered = registered_slots(context)
    if settings.get("spark.dynamicAllocation.enabled") == "true" and expected:
        return max(registered, expected)
    if not in_process(context):
        if registered < _settled.get(context, math.inf):
            registered = _await_slots(lambda: registered_slots(context), expected)
        _settled[context] = max(1, registered)
    if registered < 1:
        raise ClusterError(
            "Training needs at least one task slot: executors times their cores, divided by "
            f"spark.task.cpus. Received: none on {settings.get('spark.master')} with "
            f"spark.task.cpus={task_threads(context)}. Give the application more cores, or lower "
            "spark.task.cpus."
        )
    if expected and registered < expected:
        logger.warning("%d of %d task slots have registered.", registered, expected)
    return registered


def busy_slots(context: SparkContext) -> int:
    """How many tasks of the application run, whoever started them, as of a moment ago.

    Spark's status follows what happens by a tenth of a second. What starts Python workers does not
    count: every other task waits for the same.
    """
    tracker = context.statusTracker()
    # A job or a stage may end between two questions.
    starting = [tracker.getJobInfo(job) for job in tracker.getJobIdsForGroup(STARTING_WORKERS)]
    passed_over = {stage for job in starting if job for stage in job.stageIds}
    active = set(tracker.getActiveStageIds()) - passed_over
    stages = [tracker.getStageInfo(stage) for stage in active]
    return sum(stage.numActiveTasks for stage in stages if stage)


def settings_of(context: SparkContext) -> SparkConf:
    """The application's settings, to be read only.

    `getConf` copies them, in hundreds of calls into the JVM: 20 to 35 ms.
    """
    return context._conf


def task_threads(context: SparkContext) -> int:
    """TensorFlow threads of one task: the cores that Spark gives it, `spark.task.cpus`."""
    return int(settings_of(context).get("spark.task.cpus", "1"))


def in_process(context: SparkContext) -> bool:
    """Whether the driver is the only executor: `local`, `local[n]`, not `local-cluster`."""
    return re.match(r"local(\[|$)", str(context.master)) is not None


def registered_slots(context: SparkContext) -> int:
    """Tasks that the executors there are can run at once, as barrier stages count them."""
    spark: Any = context._jsc.sc()
    profile = spark.resourceProfileManager().defaultResourceProfile()
    return int(spark.maxNumConcurrentTasks(profile))


def _expected_slots(settings: Mapping[str, str] | SparkConf) -> int | None:
    """Slots of the executors that were asked for; None where the settings do not tell."""
    master = settings.get("spark.master", "")
    cpus = int(settings.get("spark.task.cpus", "1"))
    if match := re.match(r"local-cluster\[\s*(\d+)\s*,\s*(\d+)", master):
        return int(match[1]) * (int(match[2]) // cpus)
    # On YARN and Kubernetes an executor has one core unless told; on a standalone cluster it
    # takes all cores of its host, and how many these are is not known here.
    cores = settings.get("spark.executor.cores")
    if cores is None and master.startswith("spark:"):
        total = settings.get("spark.cores.max")
        return int(total) // cpus if total else None
    cores_per_executor = int(cores or "1")
    per_executor = cores_per_executor // cpus
    executors = int(settings.get("spark.executor.instances", "0"))
    if settings.get("spark.dynamicAllocation.enabled") == "true":
        limit = settings.get("spark.dynamicAllocation.maxExecutors", "infinity")
        if limit.isdigit() and int(limit) < 2**31 - 1:
            return int(limit) * per_executor
        for key in ("minExecutors", "initialExecutors"):
            executors = max(executors, int(settings.get(f"spark.dynamicAllocation.{key}", "0")))
    elif not executors and (total := settings.get("spark.cores.max")):
        executors = int(total) // cores_per_executor
    return executors * per_executor or None


def _await_slots(
    count: Callable[[], int],
    expected: int | None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """The number of slots once all that are expected are there, or no more come."""
    start = settled_since = clock()
    number = count()
    while expected is None or number < expected:
        if clock() - start > _REGISTRATION_S or (number and clock() - settled_since > _SETTLED_S):
            break
        sleep(0.1)
        before, number = number, count()
        if number != before:
            settled_since = clock()
    return number
