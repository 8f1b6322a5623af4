"""The process that Python workers are forked from, with TensorFlow imported before it forks.

PySpark starts a worker for every task that runs at the same time, and ends those that were idle
for a minute. Forked from PySpark's own daemon, each would import TensorFlow anew, for some seconds
and into memory of its own. Spark starts this module instead where `spark.python.daemon.module` says
so. `init_nncontext` does on local masters; elsewhere it has to be installed on every host, because
no file of the application has arrived when it starts.

A fork copies the thread that calls it and no other, so nothing may be imported here that waits for
threads of its own. TensorFlow starts none before its first operation. OpenBLAS (of NumPy and SciPy)
and jemalloc (of Arrow) do, and have handlers that make them whole again after a fork.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Iterable
from contextlib import suppress

from pyspark import daemon

# Whatever a task of training imports. The first is PySpark's own part of a worker.
MODULES = ("pyspark.worker", "tfspark.data.chunks", "tfspark.sync.gang", "tfspark.sync.shuffle")


def main() -> None:
    """Imports, then serves Spark until it closes standard input."""
    preload(MODULES)
    daemon.manager()


def preload(modules: Iterable[str]) -> None:
    """Imports modules for all processes that are forked from this one.

    One that cannot be imported is left to the tasks that need it, which can tell the driver.
    """
    # Standard output belongs to Spark, which expects a port as the first bytes.
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        for module in modules:
            with suppress(ImportError):
                importlib.import_module(module)
    finally:
        sys.stdout.flush()
        os.dup2(output, 1)
        os.close(output)
    # Objects that are never looked at again by the garbage collection stay in shared pages, and
    # PySpark collects after every task.
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    main()
