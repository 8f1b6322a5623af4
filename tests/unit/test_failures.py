"""Errors through the text that Spark hands to the driver."""

import pytest
from py4j.protocol import Py4JError

from tfspark.data.failures import (
    TaskFailure,
    decoded,
    driver_errors,
    encoded,
    reporting,
    user_rows,
)
from tfspark.errors import DataError, StoreLostError, TrainingError, UserFunctionError


def test_an_error_survives_as_text():
    error = DataError("Rule; [é]\nReceived: x.", partition=3, row=5, field="a")
    same = decoded(f"org.apache.spark.SparkException: …\n{encoded(error)}\n\tat java…")
    assert type(same) is DataError and str(same) == str(error) and same.where == error.where
    assert decoded("nothing of ours") is None


def test_other_classes_are_not_made():
    import base64
    import json

    for name in ("annotations", "Any", "TFSparkErrors"):
        content = json.dumps([name, "message", {}]).encode()
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


def test_unknown_errors_keep_their_traceback():
    def culprit():
        raise KeyError("gone")

    with pytest.raises(TaskFailure) as caught, reporting(rank=1):
        culprit()
    error = decoded(str(caught.value))
    assert type(error) is TrainingError and error.rank == 1
    assert "in culprit" in error.message and "KeyError: 'gone'" in error.message


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
        ("Checkpoint block rdd_3_0 not found!", "model_dir"),
        ("Job 7 cancelled because SparkContext was shut down", "Job 7 cancelled"),
    ],
)
def test_a_failed_job_is_one_error_without_java(said, meant):
    text = f"An error: org.apache.spark.SparkException: {said}\n\tat org.apache.spark.X(Y.scala:1)"
    with pytest.raises(TrainingError, match=meant) as caught, driver_errors():
        raise JavaError(text)
    assert "\tat " not in str(caught.value)
