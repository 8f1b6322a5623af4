"""The oldest and the newest Python, each in an environment of its own: `make pythons`."""

import json
import os
import re
import subprocess
import textwrap
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).parent.parent.parent
PYTHONS = re.search(r"(?m)^PYTHONS := (.*)$", (ROOT / "Makefile").read_text())[1].split()

SOURCE = """
    import json, sys
    from spark_app import *

    with application("local[2]") as sc:
        bits = [train(sc, 6, name="convolution", engine=e) for e in ("shuffle", "gang", "local")]
    print(json.dumps(dict(version="%d.%d" % sys.version_info[:2], bits=bits)))
"""


@pytest.mark.parametrize("version", PYTHONS)
def test_engines_give_the_same_bits(version):
    environment = ROOT / f".venv-{version}"
    if not (environment / ".ready").exists():
        pytest.skip(f"no environment with Python {version}; `make pythons` makes it (2 GB)")
    paths = map(str, (ROOT / "tests/support", ROOT))
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYSPARK", "SPARK"))}
    done = subprocess.run(
        [str(environment / "bin/python"), "-c", textwrap.dedent(SOURCE)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**variables, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["version"] == version
    assert len(result["bits"]) == 3 and len(set(result["bits"])) == 1
