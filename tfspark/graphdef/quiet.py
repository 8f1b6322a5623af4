"""Imports TensorFlow as quietly as TF_CPP_MIN_LOG_LEVEL asks for."""

from __future__ import annotations

import importlib
import os
import re
import sys
import tempfile

_LETTERS = "IWE"  # of the levels 0, 1, 2 in a line of the log


def import_tensorflow() -> None:
    """Imports TensorFlow, and drops the lines that TF_CPP_MIN_LOG_LEVEL says not to show.

    TensorFlow 2.21 heeds the variable only after it has greeted the terminal: with some lines about
    the processor, in every Python worker. They are written to the file descriptor, so that is where
    they have to be caught. Without the variable nothing is caught.
    """
    level = os.environ.get("TF_CPP_MIN_LOG_LEVEL", "0")
    if "tensorflow" in sys.modules or level not in ("1", "2", "3"):
        return
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            importlib.import_module("tensorflow")
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            caught.seek(0)
            os.write(2, without_greeting(caught.read(), int(level)))


def without_greeting(log: bytes, level: int) -> bytes:
    """The lines of a log that are at least as severe as a level, and all that are no log lines.

    Example:
        >>> without_greeting(b"I0000 00:00:1.2 3 port.cc:1] on", level=1)
        b''
    """
    dropped = re.compile(
        rb"[%s]\d{4} \d\d:\d\d|WARNING: All log messages before absl::InitializeLog"
        % _LETTERS[:level].encode()
    )
    return b"".join(line for line in log.splitlines(keepends=True) if not dropped.match(line))
