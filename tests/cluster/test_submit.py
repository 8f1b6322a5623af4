"""The quickstart's script as users run it: by Python from anywhere, and by spark-submit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pyspark
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "examples" / "lenet.py"
SUBMIT = Path(pyspark.__file__).parent / "bin" / "spark-submit"


@pytest.mark.parametrize(
    "command",
    [[sys.executable], [SUBMIT, "--master", "local[2]"]],
    ids=["python", "spark-submit"],
)
def test_lenet_trains(command, tmp_path):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYSPARK_DRIVER_PYTHON": sys.executable}
    result = subprocess.run(
        [*map(str, command), str(SCRIPT), "--epochs", "1", "--out", "out"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    found = re.search(r"Test accuracy: ([\d.]+)%", result.stdout)
    assert found and float(found[1]) > 90, result.stdout
    for kind in ("logs", "checkpoint", "model", "loss.png"):
        assert (tmp_path / "out" / kind).exists()
