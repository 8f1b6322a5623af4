"""What every test shares: one SparkContext, and Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pyspark import SparkContext

# Before anything imports TensorFlow: the tests' graphs are tiny, and several processes run at once.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def sc() -> Iterator[SparkContext]:
    """One embedded Spark for the whole run, with slots for the gangs of all tests."""
    from tfspark.context import init_nncontext

    context = init_nncontext(
        {"spark.ui.enabled": "false", "spark.driver.memory": "2g"},
        app_name="tfspark tests",
        master="local[4]",
    )
    yield context
    context.stop()


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs source code in a Python process of its own.

    For what cannot share this process: another SparkContext (a `local-cluster`), another eager
    mode, what an import brings along. Keywords are environment variables, `None` removes one.
    """

    def run(
        source: str, *, timeout_s: float = 300, **environment: str | None
    ) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        merged = {**os.environ, "PYTHONPATH": path, **environment}
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(source)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={name: value for name, value in merged.items() if value is not None},
        )
        assert result.returncode == 0, result.stderr
        return result

    return run
