"""Runs a side as a process with a time limit, and watches the memory of all that it starts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MB = 2**20
_PROC = Path("/proc")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_WATCH_S, _GRACE_S = 1.0, 3.0
# The kernel walks all pages of a process to count those that it shares. With gigabytes that takes a
# tenth of a second of a core that the others train on, so the next count is this share away.
_COUNTING_SHARE = 0.005
_ERROR_LINES = 12


@dataclass(frozen=True)
class Outcome:
    """How a run of a side ended.

    Attributes:
        answer: what it said, see `sides/protocol.py`; None after an error.
        error: the last lines of its output, where there is no answer.
        memory_mb: see `Family.memory_mb`; empty where `/proc` is missing.
        seconds: of the whole run.
    """

    answer: dict | None
    error: str | None
    memory_mb: dict[str, float]
    seconds: float


@dataclass
class Family:
    """A process and all that descends from it, also what started a session of its own.

    `look` must be called while they live: what was never seen as a child or in a known session
    cannot be found later.

    Args:
        root: the process; leader of a session.
    """

    root: int
    _members: dict[tuple[int, int], tuple[str, float]] = field(default_factory=dict)
    _sessions: set[int] = field(default_factory=set)
    _most: float = 0.0
    _count_at: float = 0.0  # of time.monotonic()

    def look(self) -> list[int]:
        """The members that live; remembers their peak memory."""
        self._sessions.add(self.root)
        found = {stat.pid: stat for stat in _processes()}
        living: dict[int, _Stat] = {}
        # Children may be listed before their parents, so until nothing is added.
        while True:
            new = [
                stat
                for pid, stat in found.items()
                if pid not in living
                and (
                    stat.session in self._sessions
                    or stat.parent in living
                    or (pid, stat.started) in self._members
                )
            ]
            if not new:
                break
            for stat in new:
                living[stat.pid] = stat
                if stat.session == stat.pid:
                    self._sessions.add(stat.pid)
        counts = time.monotonic() >= self._count_at
        began, total = time.thread_time(), 0.0
        for stat in living.values():
            key = stat.pid, stat.started
            memory = _memory_mb(stat) if counts else 0.0
            # One that has just ended has no memory any more.
            _, former = self._members.get(key, ("", 0.0))
            self._members[key] = (stat.name, max(former, memory))
            total += memory
        self._most = max(self._most, total)
        if counts:
            cost_s = time.thread_time() - began
            self._count_at = time.monotonic() + cost_s / _COUNTING_SHARE
        return [pid for pid, stat in living.items() if stat.state != "Z"]

    def memory_mb(self) -> dict[str, float]:
        """Peaks of resident memory, in MB, as seen now and then: seldom where there is much.

        A page that several processes share counts for each by its part (`Pss`), so that sums are
        what the machine holds. driver: of the root and of every JVM, added; worker: of the largest
        other process; all: the largest sum at one time.
        """
        driver = sum(
            peak
            for (pid, _), (name, peak) in self._members.items()
            if pid == self.root or name == "java"
        )
        others = [
            peak
            for (pid, _), (name, peak) in self._members.items()
            if pid != self.root and name != "java"
        ]
        return {"driver": driver, "worker": max(others, default=0.0), "all": self._most}

    def end(self) -> None:
        """Ends whoever still lives, politely first."""
        for number, wait_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
            for pid in self.look():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + wait_s
            while self.look() and time.monotonic() < deadline:
                time.sleep(0.1)


def run_side(
    command: Sequence[str | Path], environment: Mapping[str, str], limit_s: float
) -> Outcome:
    """Runs a side to its end, or to the end of its time.

    Args:
        command: interpreter, script and options; `--started` and `--scratch` are added.
        environment: variables beside those of this process.
        limit_s: whoever takes longer is ended, with all that descends from it.
    """
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="side-", ignore_cleanup_errors=True) as scratch,
        tempfile.TemporaryFile() as output,
    ):
        process = subprocess.Popen(
            [*map(str, command), "--started", repr(time.time()), "--scratch", scratch],
            env={**os.environ, "SPARK_LOCAL_DIRS": scratch, **environment},
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        family = Family(process.pid)
        ended = threading.Event()
        watcher = threading.Thread(target=_watch, args=(family, ended), daemon=True)
        watcher.start()
        try:
            process.wait(limit_s)
            late = False
        except subprocess.TimeoutExpired:
            late = True
        finally:
            ended.set()
            watcher.join()
            family.end()
            process.wait()
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    answer = None if late else last_answer(text)
    reason = f"Ended after {limit_s:.0f} s.\n" if late else ""
    error = None if answer else reason + last_lines(text)
    return Outcome(answer, error, family.memory_mb(), time.monotonic() - began)


def last_answer(text: str) -> dict | None:
    """The last line that is the answer of a side; Spark may write after it."""
    for line in reversed(text.splitlines()):
        if line.startswith('{"') and '"rows_per_second"' in line:
            with contextlib.suppress(json.JSONDecodeError):
                return json.loads(line)
    return None


def last_lines(text: str, count: int = _ERROR_LINES) -> str:
    """The end of an output, without Java's stack and empty lines."""
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join(
        [line[:300] for line in lines if line and not line.startswith(("\tat ", "    at "))][
            -count:
        ]
    )


def _watch(family: Family, ended: threading.Event) -> None:
    while not ended.wait(_WATCH_S):
        family.look()


@dataclass(frozen=True)
class _Stat:
    """What `/proc/PID/stat` says; `started` tells a process from a later one of the same number."""

    pid: int
    name: str
    state: str
    parent: int
    session: int
    started: int
    resident_mb: float


def _processes() -> list[_Stat]:
    found = []
    for folder in _PROC.glob("[0-9]*"):
        # Processes end while they are looked at.
        with contextlib.suppress(OSError):
            head, _, tail = (folder / "stat").read_text().rpartition(")")
            pid, _, name = head.partition(" (")
            fields = tail.split()
            found.append(
                _Stat(
                    pid=int(pid),
                    name=name,
                    state=fields[0],
                    parent=int(fields[1]),
                    session=int(fields[3]),
                    started=int(fields[19]),
                    resident_mb=int(fields[21]) * _PAGE / MB,
                )
            )
    return found


def _memory_mb(stat: _Stat) -> float:
    with contextlib.suppress(OSError):
        for line in (_PROC / str(stat.pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return stat.resident_mb
