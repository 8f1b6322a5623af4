"""The examples as users run them; that of the quickstart is in `test_submit`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).parent.parent.parent


def printed(name, folder, *arguments):
    """What an example prints, run from another folder."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_digits_are_recognised_in_sql(tmp_path):
    lines = printed("sql_function.py", tmp_path, "--epochs", "6").splitlines()
    found = [re.fullmatch(r"\|\s*(\d)\|\s*(\d+)\|\s*([\d.]+)\|", line) for line in lines]
    rows = [(int(m[1]), int(m[2]), float(m[3])) for m in found if m]
    assert [label for label, _, _ in rows] == list(range(10))
    assert sum(count for _, count, _ in rows) == 360
    assert sum(count * part for _, count, part in rows) > 0.85 * 360


def test_a_stream_is_scored_once(tmp_path):
    output = printed("stream.py", tmp_path, "--epochs", "20", "--out", "out")
    found = re.findall(r"(\d+) predictions, (\d+) digits, (\d+) right", output)
    counts = [tuple(map(int, each)) for each in found]
    assert [each[:2] for each in counts] == [(100, 100), (160, 160)]
    assert counts[1][2] > 0.85 * 160


def test_a_pipeline_of_census_income_is_cross_validated_and_saved(tmp_path):
    output = printed("census_income.py", tmp_path, "--epochs", "3")
    slow, fast = map(float, re.findall(r"learning rate .*: AUC ([\d.]+)", output))
    assert slow < fast
    found = re.search(r"not seen: AUC ([\d.]+), accuracy ([\d.]+)", output)
    assert float(found[1]) > 0.89
    assert float(found[2]) > 0.83
    assert (tmp_path / "census_model" / "metadata").exists()


def test_a_classifier_learns_from_twenty_photos(tmp_path):
    output = printed("transfer_learning.py", tmp_path)
    assert re.search(r"20 photos, \d+ with an animal", output)
    assert float(re.search(r"not learnt from: ([\d.]+)", output)[1]) > 0.7
    assert (tmp_path / "animals_model" / "metadata").exists()
