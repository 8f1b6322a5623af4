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
import importlib.abc
import os
import select
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from tfspark import ahead

# Whatever a task of training or prediction imports. The first is PySpark's own part of a worker.
MODULES = (
    "pyspark.worker",
    "tfspark.data.chunks",
    "tfspark.sync.gang",
    "tfspark.sync.shuffle",
    "tfspark.inference.dataframe",
    "tfspark.inference.rows",
)

# TensorFlow imports Keras although it can do without, and Keras imports scikit-learn and Matplotlib
# where they are installed: two fifths of the time, and a tenth of the memory. Tasks have graphs.
LATER = ("keras", "tf_keras")


def main() -> None:
    """Imports, then serves Spark until it closes standard input; or has a process that did so."""
    if sys.argv[1:2] == [ahead.FLAG]:
        if not ahead.serve(sys.argv[2], _preload_all):
            return
    elif ahead.passed_on():
        return
    else:
        _preload_all()
    if not _is_awaited():
        return  # Spark was stopped meanwhile
    from pyspark import daemon

    daemon.traceback = Tracebacks()  # type: ignore[assignment]
    daemon.manager()


class Tracebacks:
    """The module `traceback` for PySpark's daemon, silent about a Spark that has gone.

    Workers are idle when Spark stops, and find that out as they write: that is no error, but as a
    traceback it would be the last that a script prints.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(traceback, name)

    def print_exc(self) -> None:
        """Prints the exception that is handled, unless nobody was there to write to."""
        if not isinstance(sys.exc_info()[1], (BrokenPipeError, ConnectionResetError)):
            traceback.print_exc()


def _preload_all() -> None:
    _prefer_installed()
    preload(MODULES)


def _prefer_installed() -> None:
    """Takes the archives of an installed PySpark off the path.

    They hold the modules that are installed, as source text that is compiled anew in each process.
    """
    for entry in [*sys.path]:
        archive = Path(entry)
        if archive.match("pyspark/python/lib/*.zip") and str(archive.parents[3]) in sys.path:
            sys.path.remove(entry)


def _is_awaited() -> bool:
    """Whether anybody reads standard output, where the port will be written."""
    output = select.poll()
    output.register(1, 0)  # errors are always told
    return not output.poll(0)


def preload(modules: Iterable[str]) -> None:
    """Imports modules for all processes that are forked from this one.

    One that cannot be imported is left to the tasks that need it, which can tell the driver.
    """
    # Standard output belongs to Spark, which expects a port as the first bytes.
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        with postponed(LATER):
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


@contextmanager
def postponed(packages: Iterable[str]) -> Iterator[None]:
    """Keeps top-level packages from being imported, until the block ends.

    They can still be found: TensorFlow looks for the folder of Keras, so that `tensorflow.keras` is
    there when a task asks for it.
    """
    finder = _Postponed(packages)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Postponed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages, and refuses to load them."""

    def __init__(self, packages: Iterable[str]):
        self._packages = frozenset(packages)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec of one of the packages, with this object as its loader."""
        spec = PathFinder.find_spec(name) if name in self._packages else None
        if spec is not None:
            spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Refuses."""
        raise ImportError(f"{spec.name} is imported by the task that needs it.", name=spec.name)


if __name__ == "__main__":
    main()
