"""Whether the executors of a running application have what its driver has."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

from py4j.protocol import Py4JError
from pyspark import SparkContext

from tfspark.errors import ClusterError
from tfspark.slots import slots


class _Versions(NamedTuple):
    """What must agree between the driver and the executors; an empty string: not installed."""

    host: str
    python: str
    tensorflow: str
    tfspark: str


def _probe() -> Callable[[Iterable[int]], list[tuple[str, ...]]]:
    """A task that reports versions; nested, so that it travels by value, without tfspark."""

    def versions(ranks: Iterable[int]) -> list[tuple[str, ...]]:
        import importlib.metadata
        import importlib.util
        import platform
        import sys

        list(ranks)  # a task reads its input to the end
        tensorflow = tfspark = ""
        if importlib.util.find_spec("tensorflow") is not None:
            # The distribution has many names: tensorflow, tensorflow-cpu, tf-nightly …
            owners = importlib.metadata.packages_distributions().get("tensorflow", [])
            found = [importlib.metadata.version(owner) for owner in owners]
            tensorflow = found[0] if found else "of unknown version"
        if importlib.util.find_spec("tfspark") is not None:
            tfspark = importlib.import_module("tfspark").__version__
        python = "{}.{}".format(*sys.version_info)
        return [(platform.node(), python, tensorflow, tfspark)]

    return versions


def compare_executors(context: SparkContext) -> None:
    """Compares the executors' Python and packages with the driver's, in one tiny job.

    Raises:
        ClusterError: they differ, or no Python task runs there.
    """
    probe = _probe()
    (driver,) = probe([])
    number = slots(context)
    try:
        found = context.parallelize(range(number), number).mapPartitions(probe).collect()
    except Py4JError as error:
        raise ClusterError(_worker_failure(str(error))) from error
    for executor in sorted(set(found)):
        if difference := _difference(_Versions(*driver), _Versions(*executor)):
            raise ClusterError(difference)


def _difference(driver: _Versions, executor: _Versions) -> str | None:
    """A message about the first thing in which an executor differs; None where none does."""
    remedy = (
        "Ship the driver's environment to the executors (spark.archives, or the same packages on "
        "every host) and point PYSPARK_PYTHON at its interpreter."
    )
    names = {"python": "Python", "tensorflow": "TensorFlow", "tfspark": "tfspark"}
    for field, name in names.items():
        here, there = getattr(driver, field), getattr(executor, field)
        if here and not there:
            return (
                f"Executors need {name}. Received: {name} {here} on the driver, none on "
                f"{executor.host}. {remedy}"
            )
        # Patch releases run each other's graphs.
        if here.split(".")[:2] != there.split(".")[:2]:
            return (
                f"Executors need the driver's {name}. Received: {name} {here} on the driver, "
                f"{there} on {executor.host}. {remedy}"
            )
    return None


def _worker_failure(text: str) -> str:
    """What to tell when Python does not even start on an executor."""
    remedy = "Point PYSPARK_PYTHON at an interpreter that is on every host."
    here = "{}.{}".format(*sys.version_info)
    mismatch = re.search(r"different version:? \(?(\d+)(?:\.|, )(\d+)", text)
    if mismatch:
        return (
            f"Executors need the driver's Python. Received: Python {here} on the driver, "
            f"{mismatch[1]}.{mismatch[2]} on an executor. {remedy}"
        )
    missing = re.search(r'Cannot run program "([^"]*)"', text)
    if missing:
        return (
            f"Executors need the driver's Python {here}. Received: no program {missing[1]!r} on an "
            f"executor. {remedy}"
        )
    return f"The executors cannot run Python tasks. Received: {text.strip()} {remedy}"
