"""Runs the examples of all docstrings, in a process of its own: python docstrings.py.

What an example may use without importing it: the public names of tfspark, np, tf and keras.
"""

from __future__ import annotations

import doctest
import importlib
import sys
from pathlib import Path
from typing import Any

import tfspark

PACKAGE = Path(tfspark.__file__).parent


class ShownResults(doctest.OutputChecker):
    """Compares results that an example shows; a statement without one only has to run."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def modules_with_examples() -> list[str]:
    return sorted(
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
        if ">>>" in path.read_text(encoding="utf-8")
    )


def names_for_examples() -> dict[str, Any]:
    import keras
    import numpy as np
    import tensorflow as tf

    public = {name: getattr(tfspark, name) for name in tfspark.__all__}
    return {"np": np, "tf": tf, "keras": keras, **public}


def run(module: str, names: dict[str, Any]) -> doctest.TestResults:
    """Runs the examples of a module, reports wrong ones, and stops the Spark that they started."""
    from pyspark import SparkContext

    runner = doctest.DocTestRunner(ShownResults(), verbose=False)
    for test in doctest.DocTestFinder().find(importlib.import_module(module), extraglobs=names):
        runner.run(test, out=sys.stderr.write)
    if SparkContext._active_spark_context is not None:
        SparkContext._active_spark_context.stop()
    return doctest.TestResults(runner.failures, runner.tries)


if __name__ == "__main__":
    names = names_for_examples()
    results = [run(module, names) for module in modules_with_examples()]
    print(sum(result.attempted for result in results), "examples")
    sys.exit(any(result.failed for result in results))
