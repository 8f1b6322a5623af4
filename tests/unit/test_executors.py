"""What executors must have in common with the driver."""

import sys

import pytest

from tfspark import executors

DRIVER = executors._Versions("driver", "3.11", "2.21.0", "0.1.0")


def test_patch_releases_agree():
    other = DRIVER._replace(host="a", tensorflow="2.21.3")
    assert executors._difference(DRIVER, other) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"python": "3.10"}, "Python 3.11 on the driver, 3.10 on a"),
        ({"tensorflow": "2.18.1"}, "TensorFlow 2.21.0 on the driver, 2.18.1 on a"),
        ({"tensorflow": ""}, "TensorFlow 2.21.0 on the driver, none on a"),
        ({"tfspark": ""}, "tfspark 0.1.0 on the driver, none on a"),
    ],
)
def test_a_difference_names_both(change, message):
    executor = DRIVER._replace(host="a", **change)
    assert message in executors._difference(DRIVER, executor)


def test_the_probe_reports_this_interpreter():
    ((_, python, tensorflow, tfspark),) = executors._probe()([1, 2])
    assert python == "{}.{}".format(*sys.version_info)
    assert tensorflow.startswith("2.")
    assert tfspark == sys.modules["tfspark"].__version__


@pytest.mark.parametrize(
    "text",
    [
        "Python in worker has different version (3, 9) than that in driver 3.11",
        "Python in worker has different version: 3.9 than that in driver: 3.11",
    ],
)
def test_spark_refuses_the_workers_python(text):
    assert "3.9 on an executor" in executors._worker_failure(text)


def test_no_python_on_an_executor():
    text = 'java.io.IOException: Cannot run program "/opt/py/bin/python": error=2'
    assert "no program '/opt/py/bin/python'" in executors._worker_failure(text)
