"""Errors through the text that Spark hands to the driver."""

import base64
import errno
import json
import pickle
from pathlib import Path

import pytest
from py4j.protocol import Py4JError

import tfspark
from tfspark.data.failures import (
    TaskFailure,
    _located,
    carried,
    decoded,
    driver_errors,
    encoded,
    reporting,
    user_rows,
)
from tfspark.errors import (
    DataError,
    ResourceError,
    StoreLostError,
    TrainingError,
    UserFunctionError,
)
from tfspark.sync.control import MAX_LINE_BYTES


def test_an_error_survives_as_text():
    error = DataError("Rule; [é]\nReceived: x.", partition=3, row=5, field="a")
    same = decoded(f"org.apache.spark.SparkException: …\n{encoded(error)}\n\tat java…")
    assert type(same) is DataError and str(same) == str(error) and same.where == error.where
    assert decoded("nothing of ours") is None


def test_an_error_brings_the_log_along():
    error = decoded(encoded(TrainingError("Rule.", rank=1), ["one", "two"]))
    assert str(error) == "[rank 1] Rule.\nThe last lines of its executor's log:\n  | one\n  | two"


@pytest.mark.parametrize("character", ["a", "é", "😀", "\udc80", '"'])
def test_an_error_of_any_length_fits_into_a_control_message(character):
    message = "begin" + character * 100_000 + "end"
    error = TrainingError(message, rank=1, path=character * 5000)
    text = carried(encoded(error, [character * 200] * 15))
    assert len(json.dumps({"error": text})) < MAX_LINE_BYTES
    same = decoded(text)
    shown = character.encode(errors="replace").decode()
    assert same.message.startswith(f"begin{shown}") and f"{shown}end" in same.message
    assert "[92008 characters are left out here]" in same.message and same.rank == 1


def test_other_classes_are_not_made():
    for name in ("annotations", "Any", "TFSparkErrors"):
        content = json.dumps([name, "message", {}, []]).encode()
        assert (
            type(decoded(f"tfspark-error:{base64.b64encode(content).decode()};")) is TrainingError
        )


def test_tasks_add_where_it_happened_once():
    outer, inner = reporting(rank=9, step=7), reporting(rank=2, phase="gradient")
    with pytest.raises(TaskFailure) as caught, outer, inner:
        raise StoreLostError("Lost.", host="h")
    error = decoded(str(caught.value))
    assert isinstance(error, StoreLostError)
    assert error.where == {"rank": 2, "phase": "gradient", "host": "h"}


def reported(raising):
    """The error that the driver gets for what a task raised."""
    with pytest.raises(TaskFailure) as caught, reporting(rank=1):
        raising()
    return decoded(str(caught.value))


def raised_by_tfspark(error):
    """Raises an error as code of the package would."""
    names = {"error": error}
    exec(compile("def code():\n    raise error", tfspark.__file__, "exec"), names)
    # Without the frames of this file, which counts as a user's.
    try:
        names["code"]()
    except BaseException as caught:
        return caught.with_traceback(caught.__traceback__.tb_next)


def test_errors_of_the_users_code_are_the_users():
    def culprit():
        raise KeyError("gone")

    error = reported(culprit)
    assert type(error) is UserFunctionError and error.rank == 1
    assert "in culprit" in error.message and "KeyError: 'gone'" in error.message


def test_errors_of_an_operation_are_the_users():
    class InvalidArgumentError(Exception):
        __module__ = "tensorflow.python.framework.errors_impl"

    error = _located(raised_by_tfspark(InvalidArgumentError("assertion failed")), {"rank": 1})
    assert type(error) is UserFunctionError and "assertion failed" in error.message


def test_unknown_errors_keep_their_traceback():
    error = _located(raised_by_tfspark(KeyError("gone")), {"rank": 1})
    assert type(error) is TrainingError and error.rank == 1
    assert "in code" in error.message and "KeyError: 'gone'" in error.message


class ResourceExhaustedError(Exception):
    """As TensorFlow says that memory ran out."""


@pytest.mark.parametrize(
    "cause",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EMFILE, "Too many open files"),
        MemoryError("8 GiB"),
        ResourceExhaustedError("OOM when allocating tensor"),
    ],
)
def test_a_host_without_room_is_no_fault_of_the_user(cause):
    def of_the_user():
        raise cause

    error = reported(of_the_user)
    assert type(error) is ResourceError and error.rank == 1
    assert str(cause) in error.message and "in of_the_user" in error.message


def test_another_error_of_the_system_is_none_of_room():
    assert type(reported(Path("/nowhere/at/all").read_text)) is UserFunctionError


def test_user_rows_name_partition_and_row():
    def rows():
        yield from "ab"
        raise ValueError("third")

    seen = []
    with pytest.raises(UserFunctionError, match=r"(?s)third") as caught:
        for row in user_rows(rows(), partition=4):
            seen.append(row)
    assert seen == ["a", "b"] and (caught.value.partition, caught.value.row) == (4, 2)
    assert "in rows" in str(caught.value) and "in user_rows" not in str(caught.value)


def test_errors_of_the_driver_pass():
    with pytest.raises(ZeroDivisionError), driver_errors():
        _ = 1 / 0


def test_a_driver_without_room():
    def broadcast():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise pickle.PicklingError(f"Could not serialize broadcast: {error}")  # noqa: B904

    told = pytest.raises(ResourceError, match=r"driver.*spark\.local\.dir.*No space left")
    with told, driver_errors():
        broadcast()
    with pytest.raises(pickle.PicklingError), driver_errors():
        raise pickle.PicklingError("a lambda")
    with pytest.raises(FileNotFoundError), driver_errors():
        Path("/nowhere/at/all").read_text()


class JavaError(Py4JError):
    """What py4j raises when a job failed: a Java text."""


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("Python worker exited unexpectedly (crashed): null", "memoryOverhead"),
        (
            "Lost task 1.0: java.io.IOException: Stream closed\n\tat org.apache.spark.api.python."
            "PythonWorkerFactory.stopWorker(PythonWorkerFactory.scala:527)",
            "memoryOverhead",
        ),
        (
            "Stage failed because barrier task ResultTask(3, 1) finished unsuccessfully.\norg."
            "apache.spark.SparkException: EOFException occurred while reading the port number from "
            "pyspark.daemon's stdout.",
            "memoryOverhead",
        ),
        ("Checkpoint block rdd_3_0 not found!", "model_dir"),
        ("Could not compute split, block rdd_3_0 of RDD 7 not found", "none of rdd_3_0.*model_dir"),
        (
            "Job aborted due to stage failure: Task 2 in stage 7.0 failed 4 times, most recent "
            "failure: Lost task 2.3 in stage 7.0 (host executor 1): java.io.IOException: No space "
            "left on device",
            r"spark\.local\.dir.*host executor 1.*No space left on device",
        ),
        ("Lost task 1.0: java.lang.OutOfMemoryError: Java heap space", "spark.executor.memory"),
        ("Job 7 cancelled because SparkContext was shut down", "one that was stopped"),
        ("Job 7 cancelled because of something", "Job 7 cancelled"),
    ],
)
def test_a_failed_job_is_one_error_without_java(said, meant):
    text = f"An error: org.apache.spark.SparkException: {said}\n\tat org.apache.spark.X(Y.scala:1)"
    with pytest.raises(TrainingError, match=meant) as caught, driver_errors():
        raise JavaError(text)
    assert "\tat " not in str(caught.value)
    assert getattr(caught.value, "block", "rdd_3_0") == "rdd_3_0"
    lacks = "No space" in said or "OutOfMemory" in said
    assert isinstance(caught.value, ResourceError) == lacks
