"""Spark applications of their own: what they train, and the processes that they are made of.

Used by the sources that tests hand to `run_python`; nothing here is a test.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import optree
from keras_models import MODELS

from tfspark import MaxIteration, TFDataset, TFOptimizer, init_nncontext
from tfspark.train.triggers import Trigger


@contextmanager
def application(master: str, **settings: Any) -> Iterator[Any]:
    """A SparkContext; in the names of settings `__` stands for a dot."""
    conf = {f"spark.{name.replace('__', '.')}": value for name, value in settings.items()}
    context = init_nncontext(
        {"spark.ui.enabled": False, "spark.log.level": "OFF", **conf}, master=master
    )
    try:
        yield context
    finally:
        context.stop()


class Rows:
    """The rows of a rank, made where they are needed."""

    def __init__(self, name: str, sizes: tuple[int, ...]):
        self.name, self.sizes = name, sizes

    def __call__(self, rank: int) -> Iterator[Any]:
        x, y = MODELS[self.name][1](self.sizes[rank], 100 * rank)
        leaves, treedef = optree.tree_flatten((x, y))
        for values in zip(*leaves, strict=True):
            yield optree.tree_unflatten(treedef, values)


def dataset(context: Any, name: str, sizes: tuple[int, ...], **more: Any) -> TFDataset:
    """A data set with `sizes[r]` rows for rank `r`."""
    x, y = MODELS[name][1](1, 0)
    features, labels = optree.tree_map(lambda a: (a.dtype.name, a.shape[1:]), (x, y))
    rdd = context.parallelize(range(len(sizes)), len(sizes)).flatMap(Rows(name, sizes))
    return TFDataset.from_rdd(rdd, features=features, labels=labels, batch_size=12, seed=3, **more)


def optimizer(
    context: Any, name: str = "convolution", sizes: tuple[int, ...] = (20, 13), **settings: Any
) -> tuple[Any, TFOptimizer]:
    """A model with the same initial weights every time, and its optimizer, Adam."""
    keras.utils.set_random_seed(5)
    keras.backend.clear_session()  # names of layers count up otherwise
    model, loss = MODELS[name][0]()
    model.compile(keras.optimizers.Adam(0.01), loss)
    more = {"val_rdd": settings.pop("val_rdd")} if "val_rdd" in settings else {}
    settings = {"engine": "shuffle", "num_ranks": len(sizes), "progress": False, **settings}
    return model, TFOptimizer.from_keras(model, dataset(context, name, sizes, **more), **settings)


class Sulky(Trigger):
    """Never fires; raises on an executor where the order `raise` is given."""

    def __init__(self, driver: int):
        self.driver = driver

    def __call__(self, progress: Any) -> bool:
        if os.getpid() != self.driver:
            import sitecustomize  # that of the folder `faults`, without which nobody orders

            if sitecustomize.ordered()[:1] == ["raise"] and sitecustomize.taken():
                raise RuntimeError("The user's function raises.")
        return False


def train(context: Any, steps: int, **settings: Any) -> str:
    """The digest of the weights after a training."""
    model, training = optimizer(context, **settings)
    training.optimize(MaxIteration(steps))
    training.close()
    return digest(model)


def digest(model: Any) -> str:
    """Of all weights, bit by bit."""
    return hashlib.sha256(b"".join(w.tobytes() for w in model.get_weights())).hexdigest()


# Processes


def descendants() -> dict[int, str]:
    """Processes that this one started, directly or not, with their command lines."""
    children: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as stat:
                parent = int(stat.read().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(entry))
    found, waiting = {}, list(children.get(os.getpid(), ()))
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, ())
        try:
            with open(f"/proc/{process}/cmdline") as command:
                found[process] = command.read().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def executors() -> list[int]:
    """JVMs of executors that are processes of their own."""
    return sorted(p for p, line in descendants().items() if _is(line, "ExecutorBackend"))


def driver_jvm() -> int:
    """The JVM of the driver."""
    (found,) = [p for p, line in descendants().items() if _is(line, "SparkSubmit")]
    return found


def python_workers() -> list[int]:
    """Daemons, PySpark's or tfspark's, and the workers that they fork."""
    return sorted(p for p, line in descendants().items() if " -m " in line and ".daemon" in line)


def _is(line: str, part: str) -> bool:
    return line.split(" ")[0].endswith("java") and part in line


def kill(process: int) -> bool:
    """Kills a process of this application; whether it was still there."""
    try:
        os.kill(process, 9)
    except ProcessLookupError:
        return False
    return True


class During(threading.Thread):
    """Calls a function in a thread of its own while the block runs."""

    def __init__(self, function: Callable[[], Any]):
        super().__init__(daemon=True)
        self.function = function
        self.result: Any = None

    def run(self) -> None:
        self.result = self.function()

    def __enter__(self) -> During:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.join(60)
        assert not self.is_alive()


def wait_for(condition: Callable[[], Any], timeout_s: float = 60) -> Any:
    """The first true value of a condition."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


def in_a_round(context: Any, stages: int = 6) -> bool:
    """Whether a job is well under way: so many of its stages have begun."""
    tracker = context.statusTracker()
    for job in tracker.getActiveJobsIds():
        info = tracker.getJobInfo(job)
        begun = [s for s in (info.stageIds if info else ()) if tracker.getStageInfo(s)]
        if len(begun) >= stages:
            return True
    return False


def settled(context: Any, number: int) -> None:
    """Waits until so many executors are there again."""
    status = context._jsc.sc()
    wait_for(lambda: status.getExecutorMemoryStatus().size() - 1 == number == len(executors()))
