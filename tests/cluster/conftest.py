"""Applications of their own, in processes of their own."""

import json
import os
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parent.parent / "support"
TIMEOUT_S = 900  # a busy machine takes long to load TensorFlow in every worker
ROOT = SUPPORT.parent.parent


@pytest.fixture(scope="session")
def application(run_python):
    """Runs source code as a Spark application; what it prints last, as JSON, is the result.

    It can import the tests' support modules, and so can its executors. `path` has folders to
    import from before all others; other keywords go to `run_python`.
    """

    def run(source, path=(), **settings):
        folders = [*map(str, path), str(SUPPORT), str(ROOT), os.environ.get("PYTHONPATH")]
        joined = os.pathsep.join(filter(None, folders))
        output = run_python(source, timeout_s=TIMEOUT_S, PYTHONPATH=joined, **settings).stdout
        return json.loads(output.splitlines()[-1])

    return run
