"""What TensorFlow says when it is imported."""

import os
import subprocess
import sys

import pytest

from tfspark.graphdef.quiet import without_greeting

LOG = b"""\
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1795263003.578718    2344 port.cc:153] oneDNN custom operations are on.
W0000 00:00:1795263003.578718    2344 a.cc:1] something odd
E0000 00:00:1795263003.578718    2344 a.cc:1] something bad
Illegal instruction
"""


@pytest.mark.parametrize(
    ("level", "kept"), [(1, "something odd|bad"), (2, "something bad"), (3, "Illegal")]
)
def test_lines_below_the_level_go_and_all_others_stay(level, kept):
    lines = without_greeting(LOG, level).decode().splitlines()
    assert len(lines) == 4 - level
    assert any(word in lines[0] for word in kept.split("|"))
    assert lines[-1] == "Illegal instruction"


def imported(**environment):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "0", **environment}
    script = (
        "import sys, tfspark.graphdef; print('in', 'tensorflow' in sys.modules); "
        "sys.stderr.write('still there')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout, done.stderr


def test_a_worker_does_not_greet_the_terminal():
    assert imported(TF_CPP_MIN_LOG_LEVEL="1") == ("in True\n", "still there")


def test_without_the_variable_nothing_is_imported_or_caught():
    assert imported() == ("in False\n", "still there")
