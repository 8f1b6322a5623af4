"""Errors on their way from a Spark task to the driver.

Spark hands the driver a text. A task that fails inside `reporting` puts its error into that text
as JSON, and `driver_errors` makes the same error of it again. Nothing is unpickled: a text may
contain anything that a row contains.
"""

from __future__ import annotations

import base64
import errno
import json
import pickle
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from py4j.protocol import Py4JError, Py4JJavaError
from pyspark.errors import PySparkException

import tfspark.errors
from tfspark.data.executor_log import last_lines
from tfspark.errors import (
    CommitLostError,
    ResourceError,
    SparkJobError,
    TFSparkError,
    TrainingError,
    UserFunctionError,
    WorkerLostError,
)

# Of a message that is carried to the driver. With all characters of four bytes, and the log beside
# it, it still fits into a control message of a gang.
_MOST_HEAD, _MOST_TAIL = 2000, 6000
_MOST_WHERE = 200

_MARK = "tfspark-error:"
_ENCODED = re.compile(_MARK + r"([A-Za-z0-9+/=]+);")
_PACKAGE = str(Path(__file__).resolve().parent.parent)
_STANDARD = (sysconfig.get_path("stdlib"), "<frozen")

# What passes on another host, or when somebody has cleared up.
_EXHAUSTED = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EROFS,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
    errno.EAGAIN,  # no more threads or processes
}


class TaskFailure(RuntimeError):
    """What a task raises: the error's text for people, and the error for the driver."""


@contextmanager
def reporting(**where: Any) -> Iterator[None]:
    """Around the work of a task: an error in it reaches the driver as it is.

    Errors of tfspark keep their type and attributes; others become a `TrainingError` with their
    traceback.

    Args:
        **where: such as `rank=`, `step=`, `phase=`; added to the error where it lacks them.
    """
    try:
        with locating(**where):
            yield
    except TFSparkError as error:
        raise TaskFailure(encoded(error, last_lines())) from error


@contextmanager
def locating(**where: Any) -> Iterator[None]:
    """Around the work of a task whose job the user starts, so that nobody decodes its error.

    The error is the one that `reporting` would carry, as text for people.

    Args:
        **where: as of `reporting`.
    """
    try:
        yield
    except TaskFailure:
        raise
    # The border of the process: whatever is not carried over here reaches the driver as Java text.
    except Exception as error:
        raise _located(error, where) from error


@contextmanager
def driver_errors() -> Iterator[None]:
    """Around a Spark action on the driver: raises the error that a task reported.

    Example:
        >>> with driver_errors():  # doctest: +SKIP
        ...     rdd.mapPartitions(task).collect()
    """
    try:
        yield
    except (Py4JError, PySparkException) as error:
        raise_from_spark(error)
    except (OSError, MemoryError, pickle.PicklingError) as error:
        # PySpark makes the second of the first, when it cannot write a broadcast.
        if not any(each and _is_exhausted(each) for each in (error, error.__context__)):
            raise
        raise ResourceError(
            "The driver must have room for what training needs: disk (spark.local.dir), memory, "
            f"open files. Received: {type(error).__name__}: {error}."
        ) from error


def raise_from_spark(error: Exception) -> NoReturn:
    """Raises the error that a task reported, or else what Spark says.

    Raises:
        TFSparkError: the one that the task raised inside `reporting`, or a `UserFunctionError`
            with the traceback of any other Python task; or a `TrainingError`, in particular a
            `WorkerLostError`, if the cluster failed a job.
        Exception: `error` itself, if it is no failed job.
    """
    text = str(error)
    if isinstance(error, Py4JJavaError):
        text = f"{error}\n{error.java_exception.toString()}"
    reported = decoded(text)
    if reported is not None:
        raise reported from None  # it says all; Spark adds pages of Java
    start = text.find("Traceback (most recent call last)")
    if start >= 0:
        own = text[start:].split("\n\tat org.apache.spark")[0].strip()
        raise UserFunctionError(
            f"A function that Spark runs to compute the rows raised an error.\n{own}"
        ) from None
    if "SparkContext was shut down" in text:
        raise TrainingError(
            "Training needs its SparkContext until it has ended. Received: one that was stopped. "
            "Train again in a new one; with model_dir=… that goes on from the newest checkpoint."
        ) from None
    if "SparkException" in text:
        raise _cluster_failure(text) from error
    raise error


# What a JVM says that lacks something; Python's own errors come with a type and a number.
_EXHAUSTED_JVM = re.compile(
    r"No space left on device|Too many open files|java\.lang\.OutOfMemoryError"
)

_LOST_WORKER = (
    "Python worker exited unexpectedly",
    # A worker died between two tasks, as did the daemon that made it.
    "PythonWorkerFactory.stopWorker",
    # The daemon died as it started.
    "reading the port number from",
)


def _cluster_failure(text: str) -> TrainingError:
    """What it means, if it was no Python code, that Spark gave a job up."""
    if any(words in text for words in _LOST_WORKER):
        return WorkerLostError(
            "A Python worker must live as long as its task. Received: one that was killed, and "
            "Spark has used up its attempts. Most often memory ran out: give executors more "
            "(spark.executor.memoryOverhead), or take fewer rows at a time (a smaller batch_size, "
            "or accumulation_steps)."
        )
    if "ExecutorLostFailure" in text:
        return WorkerLostError(
            "An executor must live as long as its tasks. Received: one that was lost, and Spark "
            "has used up its attempts. Look into its log; most often memory ran out "
            "(spark.executor.memoryOverhead), or the machine was taken away."
        )
    lost = re.search(r"(?:Checkpoint|Could not compute split,) block (\w+) (?:of|not)", text)
    if lost:
        return CommitLostError(
            f"A commit needs one of its copies. Received: none of {lost[1]}, they were lost with "
            "the executors that held them. Train with model_dir=…, and the next optimize() after "
            "close() goes on from the newest checkpoint there.",
            block=lost[1],
        )
    said = text[text.find("SparkException") :].split("\n\tat ")[0].strip()
    if _EXHAUSTED_JVM.search(said):
        return ResourceError(
            "Spark must have room for what training needs on every host: disk (spark.local.dir; "
            "of a standalone cluster's host SPARK_LOCAL_DIRS), memory (spark.executor.memory), "
            f"open files. Received: {said}"
        )
    return SparkJobError(f"Spark could not finish a job. Received: {said}")


def encoded(error: TFSparkError, log: Sequence[str] = ()) -> str:
    """A text that holds an error.

    Args:
        error: to hold.
        log: the last lines of the log where it was raised.
    """
    where = {
        name: value if isinstance(value, (int, float, bool)) else str(value)[:_MOST_WHERE]
        for name, value in error.where.items()
    }
    parts = [type(error).__name__, _shortened(error.message), where, list(log)]
    content = json.dumps(parts, ensure_ascii=False).encode(errors="replace")
    return f"{error}\n{_MARK}{base64.b64encode(content).decode()};"


def carried(text: str) -> str:
    """What `decoded` needs of a text that holds an error: a few ten thousand bytes at most."""
    found = _ENCODED.search(text)
    return found.group() if found else ""


def _shortened(message: str) -> str:
    """A message without the middle of what nobody reads to the end: a graph, a row."""
    missing = len(message) - _MOST_HEAD - _MOST_TAIL
    if missing <= 0:
        return message
    gap = f"\n[{missing} characters are left out here]\n"
    return message[:_MOST_HEAD] + gap + message[-_MOST_TAIL:]


def decoded(text: str) -> TFSparkError | None:
    """The error that a text holds, with the log in its message; None where it holds none."""
    found = _ENCODED.search(text)
    if found is None:
        return None
    name, message, where, log = json.loads(base64.b64decode(found.group(1)))
    kind = getattr(tfspark.errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, TFSparkError)):
        kind = TrainingError
    if log:
        message += "\nThe last lines of its executor's log:\n" + "\n".join(f"  | {x}" for x in log)
    return kind(message, **where)


def user_rows(rows: Iterable[Any], partition: int, first: int = 0) -> Iterator[Any]:
    """The rows of the user's own functions; what these raise names partition and row.

    Args:
        rows: computed while they are iterated over.
        partition: of the rows.
        first: index of the first row.

    Raises:
        UserFunctionError: with the user's traceback.
    """
    row = first
    try:
        for value in rows:
            yield value
            row += 1
    except (TFSparkError, TaskFailure):
        raise
    # Whatever the user's function may raise.
    except Exception as error:
        raise UserFunctionError(
            "A function that computes the rows of the data set raised an error. Received:\n"
            f"{user_traceback(error)}",
            partition=partition,
            row=row,
        ) from error


def user_traceback(error: BaseException) -> str:
    """The traceback of an error, from the first frame outside of tfspark and PySpark on."""
    frames = error.__traceback__
    start = frames
    while start is not None and _is_ours(start.tb_frame.f_code.co_filename):
        start = start.tb_next
    shown = traceback.format_exception(type(error), error, start or frames)
    return "".join(shown).rstrip()


def _is_ours(filename: str) -> bool:
    return filename.startswith(_PACKAGE) or "/pyspark/" in filename or "pyspark.zip" in filename


def _located(error: Exception, where: dict[str, Any]) -> TFSparkError:
    if isinstance(error, TFSparkError):
        return type(error)(error.message, **{**where, **error.where})
    own = user_traceback(error)
    if _is_exhausted(error):
        return ResourceError(
            "A host must have room for what training needs: disk, memory, open files. Received:\n"
            f"{own}",
            **where,
        )
    if _is_of_the_user(error):
        return UserFunctionError(
            f"A function of the user raised an error. Received:\n{own}", **where
        )
    return TrainingError(f"A task raised an error.\n{own}", **where)


def _is_exhausted(error: BaseException) -> bool:
    """Whether a host lacks something that it may have again later, or another host has."""
    if isinstance(error, OSError):
        return error.errno in _EXHAUSTED
    return isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError"


def _is_of_the_user(error: BaseException) -> bool:
    """Whether the user's code raised an error, or an operation of the user's graph."""
    if type(error).__module__.startswith("tensorflow."):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return any(not _is_library(frame.filename) for frame in frames)


def _is_library(filename: str) -> bool:
    return _is_ours(filename) or "site-packages" in filename or filename.startswith(_STANDARD)
