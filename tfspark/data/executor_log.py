"""The last lines of an executor's log, read by a Python worker of it.

What a function printed, and what TensorFlow complained of, is in the `stderr` of the executor: on a
standalone cluster and in `local-cluster` a file in its working folder, which its Python workers
share, on YARN one in the folders of `LOG_DIRS`. Elsewhere (an embedded Spark, Kubernetes) there is
no file, and the lines are on the terminal or with the pod.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_MOST_LINES = 15
_MOST_CHARACTERS = 200  # of a line
_TAIL_BYTES = 1 << 16

# What Spark tells of every task, and what TensorFlow says as it starts: no failure is among it.
_CHATTER = re.compile(
    r"\d\d/\d\d/\d\d \d\d:\d\d:\d\d (INFO|DEBUG|TRACE) "
    r"|WARNING: All log messages before absl|I0000 |To enable the following instructions"
)


def last_lines() -> list[str]:
    """The last lines of this executor's log, oldest first; none where there is no such file."""
    folders = [*filter(None, os.environ.get("LOG_DIRS", "").split(","))]
    if "SPARK_EXECUTOR_DIRS" in os.environ:  # or it is the user's folder, with files of the user
        folders.append(os.curdir)
    for folder in folders:
        try:
            with (Path(folder) / "stderr").open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
                text = log.read(_TAIL_BYTES).decode(errors="replace")
        except OSError:
            continue  # no such file, or none that this process may read
        lines = [line for line in text.splitlines() if line.strip() and not _CHATTER.match(line)]
        return [line.rstrip()[:_MOST_CHARACTERS] for line in lines[-_MOST_LINES:]]
    return []
