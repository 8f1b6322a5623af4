"""The process that Python workers are forked from, started before Spark asks for it.

Spark starts it (see `daemon.py`) for the first Python task, which then waits for some seconds while
it imports TensorFlow. An embedded JVM takes as long to start and leaves a core idle, so the driver
starts such a process beside it, ahead of time. The one that Spark starts later imports nothing: it
passes its standard streams and its environment on, and stays for Spark to look at.

    driver ── starts ─► process ahead: imports, waits, then serves Spark
       └─ starts ─► JVM ── starts ─► its own: passes streams and environment on, ends with it

They meet at a Unix socket in a folder that only this user can enter. Spark's own process does all
by itself where nobody listens there, or where the one ahead was started with other settings.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

SOCKET = "TFSPARK_AHEAD"
"""The variable that holds the path of the socket."""

FLAG = "--ahead"
"""Of the process that is started ahead."""

# What programs read as they start or are imported: it must be the same.
_READ_EARLY = (
    *("PYTHON", "GLIBC_TUNABLES", "LD_", "MALLOC_", "OMP_", "GOMP_", "KMP_", "OPENBLAS_", "MKL_"),
    *("TF_", "XLA_", "CUDA_", "ARROW_", "NUMEXPR_", "ONEDNN_"),
)
# Of these, what Spark tells its own process only, and what is compared by its entries.
_FOR_SPARK = ("PYTHON_", "PYTHONUNBUFFERED", "PYTHONPATH")

_LENGTH = struct.Struct("!I")
_STREAMS = (0, 1, 2)


class Ahead:
    """A process that imports ahead, as the driver sees it.

    It ends by itself if the driver ends before Spark has asked for it.

    Args:
        environment: all variables that Spark will start its own process with, but for those that
            only Spark reads.

    Attributes:
        path: of the socket where it waits.
    """

    def __init__(self, environment: Mapping[str, str]):
        folder = tempfile.mkdtemp(prefix="tfspark-")
        self.path = os.path.join(folder, "ahead")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tfspark.daemon", FLAG, self.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=dict(environment),
        )

    def end(self) -> None:
        """Ends it where it still waits; otherwise it is Spark's."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()


def serve(path: str, preload: Callable[[], None]) -> bool:
    """In the process ahead: imports, and takes the place of the process that Spark starts.

    Args:
        path: of the socket.
        preload: imports.

    Returns:
        Whether it has done so. If not, nobody will ask for it any more.
    """
    os.setpgid(0, 0)  # Ctrl-C is meant for the driver
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(1)
        began_with = dict(os.environ)
        preload()
        waiting = select.poll()
        waiting.register(listening, select.POLLIN)
        waiting.register(0, select.POLLIN)  # the driver's end of the pipe: closed with it
        asked = {number for number, _ in waiting.poll()}
        front = listening.accept()[0] if listening.fileno() in asked else None
    shutil.rmtree(os.path.dirname(path), ignore_errors=True)
    if front is None:
        return False
    # It stays open until this process ends, for the other side to see that: so workers close it.
    os.register_at_fork(after_in_child=front.close)
    return _take_place(front, began_with)


def _take_place(front: socket.socket, began_with: Mapping[str, str]) -> bool:
    head, streams, _, _ = socket.recv_fds(front, _LENGTH.size, len(_STREAMS), socket.MSG_WAITALL)
    size = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else 0
    with front.makefile("rb") as incoming:
        text = incoming.read(size)
    if not size or len(text) < size:
        return False  # Spark was stopped, and has ended it before it could ask
    asked = json.loads(text)
    fits = fits_together(began_with, asked["environment"])
    if fits:
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        sys.argv[1:] = asked["arguments"]
        for number, stream in zip(_STREAMS, streams, strict=True):
            os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    try:
        front.sendall(_LENGTH.pack(os.getpid() if fits else 0))
    except (BrokenPipeError, ConnectionResetError):
        return False  # Spark was stopped meanwhile
    return fits


def fits_together(ahead: Mapping[str, str], asked: Mapping[str, str]) -> bool:
    """Whether a process that was started with some variables can do for one with others."""
    return _read_early(ahead) == _read_early(asked) and _own_path(ahead) == _own_path(asked)


def _read_early(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_READ_EARLY) and not name.startswith(_FOR_SPARK)
    }


def _own_path(environment: Mapping[str, str]) -> list[str]:
    """The entries of PYTHONPATH, without those of Spark's own files."""
    entries = environment.get("PYTHONPATH", "").split(os.pathsep)
    own = [each for each in entries if each and not each.endswith((".zip", ".jar"))]
    return list(dict.fromkeys(own))


def passed_on() -> bool:
    """In the process that Spark starts: lets the one ahead serve Spark, until that has ended.

    Returns:
        False where there is none, or none that fits: then this process has to serve.
    """
    path = os.environ.get(SOCKET)
    if not path:
        return False
    with socket.socket(socket.AF_UNIX) as other:
        try:
            other.connect(path)
        except OSError:  # it has another one to serve, or it is gone
            return False
        asked = {
            "environment": dict(os.environ),
            "folder": os.getcwd(),
            "arguments": sys.argv[1:],
        }
        text = json.dumps(asked).encode()
        try:
            socket.send_fds(other, [_LENGTH.pack(len(text))], _STREAMS)
            other.sendall(text)
            answer = other.recv(_LENGTH.size, socket.MSG_WAITALL)
        except OSError:  # it has ended meanwhile
            return False
        (process,) = _LENGTH.unpack(answer) if len(answer) == _LENGTH.size else (0,)
        if not process:
            return False

        def end(*_: Any) -> None:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)

        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # A pipe has ended once nobody holds it open any more.
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in _STREAMS:
            os.dup2(nowhere, number)
        with suppress(ConnectionResetError):
            other.recv(1)  # nothing comes
    return True
