"""`tfspark doctor`: a small job on the configured cluster, that shows what a training would meet.

    python -m tfspark doctor                                    # this machine
    python -m tfspark doctor --master spark://host:7077 --conf spark.executor.memory=4g
    python -m tfspark doctor --model-dir hdfs:///models/a       # can everybody write there?

Under `spark-submit`, submit a file with `from tfspark.doctor import main` and `main()`.
"""

from __future__ import annotations

import argparse
import enum
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyspark
from pyspark import SparkContext

from tfspark.context import init_nncontext
from tfspark.data.failures import driver_errors, reporting
from tfspark.errors import TFSparkError
from tfspark.executors import compare_executors
from tfspark.slots import slots, task_threads
from tfspark.sync.frames import Message
from tfspark.sync.meeting import Invitation, MeetingPlace
from tfspark.train.checkpoint import CheckpointStore
from tfspark.train.engines import gang_obstacle

_GIB = 2**30
_LEAST_DISK, _LITTLE_DISK = _GIB // 4, 4 * _GIB
_LEAST_MEMORY, _LITTLE_MEMORY = _GIB // 2, _GIB
"""Bytes for each rank of a host: a Python worker with TensorFlow takes some 400 MB at rest."""

_MOST_SKEW_S = 5.0
_SLOW_IMPORT_S = 60.0
_JOIN_S = 60.0
_PAYLOAD_BYTES = 8 * 2**20
_TURNS = 5


class Level(enum.Enum):
    """How bad it is."""

    GOOD = "ok"
    WARNING = "warning"
    PROBLEM = "PROBLEM"


@dataclass(frozen=True)
class Finding:
    """What one check has found.

    Attributes:
        check: what was looked at.
        level: how bad it is.
        text: what was found, and what to do where it is not good.
    """

    check: str
    level: Level
    text: str

    def __str__(self) -> str:
        return f"{self.level.value:8} {self.check}: {self.text}"


@dataclass(frozen=True)
class _Facts:
    """Of an executor, as one of its tasks sees it."""

    rank: int
    host: str
    clock: float
    disk_bytes: int
    memory_bytes: int
    import_s: float


def examine(context: SparkContext, model_dir: str | None = None) -> Iterator[Finding]:
    """Checks an application, one thing after the other; later checks need the former ones.

    Args:
        context: the running SparkContext.
        model_dir: where checkpoints would go.

    Example:
        >>> context = init_nncontext(master="local[2]")  # doctest: +SKIP
        >>> for finding in examine(context):  # doctest: +SKIP
        ...     print(finding)
    """
    yield _spark(context)
    executors = _executors(context)
    yield executors
    if executors.level is Level.PROBLEM:
        return  # no Python task runs there
    number = slots(context)
    yield from _slots(context, number)
    try:
        with driver_errors():
            asked = time.time()
            found = context.parallelize(range(number), number).mapPartitions(_facts).collect()
            answered = time.time()
    except TFSparkError as error:
        yield Finding("tasks", Level.PROBLEM, str(error))
        return
    yield _tensorflow(found)
    yield _clocks(found, asked, answered)
    yield from _room(found)
    if not gang_obstacle(context, number):
        yield _connections(context, number)
    if model_dir is not None:
        yield _model_dir(context, number, model_dir)


def _spark(context: SparkContext) -> Finding:
    jvm: Any = context._jvm
    java = jvm.java.lang.System.getProperty("java.version")
    text = (
        f"Spark {context.version} on Java {java}, PySpark {pyspark.__version__}, Python "
        f"{platform.python_version()}, master {context.master}"
    )
    if context.version.split(".")[:2] != pyspark.__version__.split(".")[:2]:
        return Finding(
            "Spark",
            Level.PROBLEM,
            f"{text}. The driver's PySpark must be of the cluster's version: "
            f"pip install 'pyspark=={context.version}'.",
        )
    return Finding("Spark", Level.GOOD, text)


def _executors(context: SparkContext) -> Finding:
    try:
        compare_executors(context)
    except TFSparkError as error:
        return Finding("executors", Level.PROBLEM, str(error))
    return Finding("executors", Level.GOOD, "Python, TensorFlow and tfspark are the driver's")


def _slots(context: SparkContext, number: int) -> Iterator[Finding]:
    threads = task_threads(context)
    text = f"{number} ranks can run at once, with {threads} thread{'s' * (threads > 1)} each"
    yield Finding("slots", Level.GOOD, text)
    obstacle = gang_obstacle(context, number)
    if obstacle:
        yield Finding(
            "engine",
            Level.WARNING,
            f"'gang' cannot run: {obstacle}. Trainings take 'shuffle', which is slower for small "
            "models.",
        )
    else:
        yield Finding("engine", Level.GOOD, "barrier stages are allowed: trainings take 'gang'")


def _tensorflow(found: Sequence[_Facts]) -> Finding:
    slowest = max(found, key=lambda facts: facts.import_s)
    text = f"imports within {slowest.import_s:.0f} s (the slowest: {slowest.host})"
    if slowest.import_s > _SLOW_IMPORT_S:
        return Finding(
            "TensorFlow",
            Level.WARNING,
            f"{text}. Every new worker waits for that: put the environment on a local disk.",
        )
    return Finding("TensorFlow", Level.GOOD, text)


def _clocks(found: Sequence[_Facts], asked: float, answered: float) -> Finding:
    skews = {facts.host: max(asked - facts.clock, facts.clock - answered, 0.0) for facts in found}
    worst = max(skews, key=lambda host: skews[host])
    if skews[worst] > _MOST_SKEW_S:
        return Finding(
            "clocks",
            Level.WARNING,
            f"that of {worst} differs from the driver's by {skews[worst]:.0f} s. Certificates and "
            "Kerberos fail with wrong clocks, and logs mislead: run an NTP client.",
        )
    return Finding("clocks", Level.GOOD, f"within {max(1.0, skews[worst]):.0f} s of the driver's")


def _room(found: Sequence[_Facts]) -> Iterator[Finding]:
    ranks_of = {facts.host: sum(f.host == facts.host for f in found) for facts in found}
    limits = {
        "disk": (_LEAST_DISK, _LITTLE_DISK, "for stores and shuffles", "spark.local.dir"),
        "memory": (
            _LEAST_MEMORY,
            _LITTLE_MEMORY,
            "for Python",
            "spark.executor.memoryOverhead, or spark.executor.cores for fewer tasks at once",
        ),
    }
    for what, (least, little, purpose, setting) in limits.items():
        shares = {
            facts.host: getattr(facts, f"{what}_bytes") / ranks_of[facts.host] for facts in found
        }
        host = min(shares, key=lambda name: shares[name])
        text = f"{shares[host] / _GIB:.1f} GiB free for each rank {purpose} (least: {host})"
        if shares[host] >= little:
            yield Finding(what, Level.GOOD, text)
        else:
            level = Level.PROBLEM if shares[host] < least else Level.WARNING
            yield Finding(what, level, f"{text}. That is little: set {setting}.")


def _connections(context: SparkContext, number: int) -> Finding:
    try:
        place = MeetingPlace.of(context)
        meeting, invitation = place.open(number, lambda rank, report: None)
        with meeting, driver_errors():
            task = _connect(invitation(), number)
            ranks = context.parallelize(range(number), number).barrier()
            told = ranks.mapPartitionsWithIndex(task).collect()
    except TFSparkError as error:
        return Finding(
            "connections",
            Level.PROBLEM,
            f"{error} Open the ports between all hosts (spark.tfspark.ports says which are used), "
            "or set spark.tfspark.engine=shuffle.",
        )
    latency_s, bytes_per_s = max(row[0] for row in told), min(row[1] for row in told)
    encrypted = "" if place.identity is None else ", encrypted"
    if number == 1:
        return Finding("connections", Level.GOOD, f"the rank reaches the driver{encrypted}")
    return Finding(
        "connections",
        Level.GOOD,
        f"all ranks reach the driver and each other{encrypted}: {latency_s * 1e3:.1f} ms for a "
        f"message to all, {bytes_per_s / 1e6:,.0f} MB/s to and from each rank",
    )


def _model_dir(context: SparkContext, number: int, model_dir: str) -> Finding:
    try:
        store = CheckpointStore(model_dir)
        store.check_writable()
        with driver_errors():
            ranks = context.parallelize(range(number), number)
            names = ranks.mapPartitions(_write(store)).collect()
        unseen = store.take_probes(names)
    except TFSparkError as error:
        return Finding("model_dir", Level.PROBLEM, str(error))
    if unseen:
        return Finding(
            "model_dir",
            Level.PROBLEM,
            f"the driver does not see what {len(unseen)} of {number} executors wrote to "
            f"{model_dir!r}. Use a folder that all machines share.",
        )
    return Finding("model_dir", Level.GOOD, f"all executors write to {model_dir!r}")


# Tasks


def _facts(ranks: Iterable[int]) -> Iterator[_Facts]:
    (rank,) = ranks
    clock = time.time()
    started = time.perf_counter()
    import tensorflow as tf

    assert float(tf.reduce_sum(tf.ones([4]))) == 4
    folders = os.environ.get("SPARK_LOCAL_DIRS") or tempfile.gettempdir()
    free = min(shutil.disk_usage(folder).free for folder in folders.split(","))
    yield _Facts(
        rank,
        platform.node(),
        clock,
        free,
        _free_memory(),
        time.perf_counter() - started,
    )


def _free_memory() -> int:
    """Bytes that this process may still take: the machine's, or its container's if that is less."""
    if not os.path.exists("/proc/meminfo"):
        # Other systems than Linux do not say what is free: all that there is.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with open("/proc/meminfo", encoding="ascii") as file:
        (line,) = [line for line in file if line.startswith("MemAvailable")]
    free = int(line.split()[1]) * 1024
    limit, used = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"
    if os.path.exists(limit):
        with open(limit, encoding="ascii") as most, open(used, encoding="ascii") as now:
            text = most.read().strip()
            if text.isdigit():  # "max" means no limit
                free = min(free, int(text) - int(now.read()))
    return free


def _connect(
    invitation: Invitation, num_ranks: int
) -> Callable[[int, Iterable[int]], Iterator[tuple[float, float]]]:
    def run(rank: int, ranks: Iterable[int]) -> Iterator[tuple[float, float]]:
        list(ranks)  # a task reads its input to the end
        where = reporting(rank=rank, phase="rendezvous")
        with where, invitation.join(rank, num_ranks, _JOIN_S) as member:
            links = member.links
            small = {peer: Message("small", rank) for peer in links.peers}
            payload = np.zeros(_PAYLOAD_BYTES // max(1, num_ranks - 1), np.uint8)
            arrays = {"payload": payload}
            large = {peer: Message("large", rank, {}, arrays) for peer in links.peers}
            taken: dict[str, float] = {}
            for name, messages in (("small", small), ("large", large)):
                times = []
                for turn in range(_TURNS):
                    started = time.perf_counter()
                    links.exchange(messages, phase=name, step=turn, timeout_s=_JOIN_S)
                    times.append(time.perf_counter() - started)
                taken[name] = sorted(times)[_TURNS // 2]
            member.done()
        yield taken["small"], _PAYLOAD_BYTES / taken["large"]

    return run


def _write(store: CheckpointStore) -> Callable[[Iterable[int]], Iterator[str]]:
    def run(ranks: Iterable[int]) -> Iterator[str]:
        (rank,) = ranks
        with reporting(rank=rank, phase="model_dir"):
            yield store.write_probe(f"executor-{rank}")

    return run


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all checks and prints them; 1 if one found a problem, 0 otherwise."""
    parser = argparse.ArgumentParser(
        prog="tfspark doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--master", help="where Spark runs (what is configured, or local[*])")
    parser.add_argument("--conf", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--model-dir", help="a folder or URL for checkpoints, to try")
    options = parser.parse_args(arguments)
    conf = dict(setting.partition("=")[::2] for setting in options.conf)
    was_running = SparkContext._active_spark_context is not None
    try:
        context = init_nncontext(conf, master=options.master, check_executors=False)
    except TFSparkError as error:
        print(Finding("Spark", Level.PROBLEM, str(error)))
        return 1
    worst = 0
    try:
        for finding in examine(context, options.model_dir):
            print(finding, flush=True)
            worst |= finding.level is Level.PROBLEM
    finally:
        if not was_running:
            context.stop()
    print("A training would fail here." if worst else "A training can run here.")
    return int(worst)


if __name__ == "__main__":
    sys.exit(main())
