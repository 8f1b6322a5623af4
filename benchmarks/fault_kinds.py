"""Faults that strike a training: each a function of a `Scene`, with the seed's own random numbers.

Those that pass are over when the function returns, or once a worker has obeyed; those that stay
are context managers, over when they are left.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias


@dataclass
class Scene:
    """Where a fault strikes.

    Attributes:
        processes: the module `spark_app`, which finds and kills them.
        hosts: of a standalone cluster; None on a local one.
        order: the file by which code of the workers is told to fail.
        disk: the file system that executors write to, where it is a small one of its own.
        random: of this run.
        ended: set when the run has ended.
    """

    processes: Any
    hosts: Any
    order: Path
    disk: Path | None
    random: random.Random
    ended: threading.Event

    def command(self, order: str) -> str:
        """Tells the code of workers or driver to fail once."""
        temporary = self.order.with_suffix(".new")
        temporary.write_text(order)
        temporary.rename(self.order)
        return order

    def pause(self, least_s: float, most_s: float) -> float:
        """Waits at random; less where the run ends."""
        seconds = self.random.uniform(least_s, most_s)
        self.ended.wait(seconds)
        return seconds


def kill_python(scene: Scene) -> str:
    """A Python worker dies, or what workers are forked from."""
    victim = scene.random.choice(scene.processes.python_workers())
    scene.processes.kill(victim)
    return f"process {victim}"


def kill_executor(scene: Scene) -> str:
    """An executor's JVM dies."""
    victim = scene.random.choice(scene.processes.executors())
    scene.processes.kill(victim)
    return f"process {victim}"


def kill_host(scene: Scene) -> str:
    """A host dies with all that runs there; another one takes its place some seconds later."""
    host = scene.random.choice(scene.hosts.hosts)
    host.kill()
    scene.hosts.hosts.remove(host)
    seconds = scene.random.uniform(1, 10)
    time.sleep(seconds)  # also if the run has ended: the next one needs the host
    scene.hosts.add_host()
    return f"{host.name}, replaced after {seconds:.1f} s"


def stop_python(scene: Scene) -> str:
    """A Python worker is stopped for a while."""
    return _stop(scene, scene.random.choice(scene.processes.python_workers()))


def stop_executor(scene: Scene) -> str:
    """An executor's JVM is stopped for a while."""
    return _stop(scene, scene.random.choice(scene.processes.executors()))


def _stop(scene: Scene, victim: int) -> str:
    try:
        os.kill(victim, signal.SIGSTOP)
    except ProcessLookupError:
        return "ended before"
    seconds = scene.random.uniform(0.5, 8)
    time.sleep(seconds)
    try:
        os.kill(victim, signal.SIGCONT)
    except ProcessLookupError:
        return f"process {victim}, gone within {seconds:.1f} s"
    return f"process {victim} for {seconds:.1f} s"


def fill_disk(scene: Scene) -> str:
    """The disk of the executors is full for a while."""
    _fill(scene)
    seconds = scene.pause(0.5, 5)
    _empty(scene)
    return f"for {seconds:.1f} s"


def _fill(scene: Scene) -> None:
    assert scene.disk is not None
    for number in range(1000):  # each until the disk is full, a new one if the last one is
        ballast = scene.disk / f"ballast{number}"
        if not ballast.exists():
            break
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={ballast}", "bs=64k"], stderr=subprocess.DEVNULL, check=False
    )
    if ballast.stat().st_size == 0:
        ballast.unlink()


def _empty(scene: Scene) -> None:
    assert scene.disk is not None
    for ballast in scene.disk.glob("ballast*"):
        ballast.unlink()


def cut_network(scene: Scene) -> str:
    """The cable of a host is pulled for a while: packets are lost without a word."""
    host = scene.random.choice(scene.hosts.hosts)
    with host.cut():
        seconds = scene.random.uniform(0.5, 15)
        time.sleep(seconds)
    return f"{host.name} for {seconds:.1f} s"


def drop_connection(scene: Scene) -> str:
    """A connection between two ranks breaks."""
    return scene.command("drop")


def delay_transport(scene: Scene) -> str:
    """A rank's messages are late."""
    return scene.command(f"delay {scene.random.uniform(0.5, 8):.1f}")


def raise_once(scene: Scene) -> str:
    """A function of the user raises."""
    return scene.command("raise")


def fail_checkpoint(scene: Scene) -> str:
    """A write of a checkpoint fails, at one of its steps, on an executor or the driver."""
    where = scene.random.choice(["driver", "executor"])
    step = scene.random.choice(["makedirs", "open", "fsync", "replace"])
    return scene.command(f"files {where} {step}")


Fault: TypeAlias = Callable[[Scene], str]
ANYWHERE: tuple[Fault, ...] = (
    kill_python,
    kill_executor,
    stop_python,
    stop_executor,
    raise_once,
    fail_checkpoint,
)
ON_HOSTS: tuple[Fault, ...] = (kill_host, cut_network)
ON_SOCKETS: tuple[Fault, ...] = (drop_connection, delay_transport)


@contextmanager
def always_raise(scene: Scene) -> Iterator[str]:
    """A function of the user raises each time."""
    yield scene.command("raise always")
    scene.order.unlink()


@contextmanager
def never_write(scene: Scene) -> Iterator[str]:
    """No checkpoint can be renamed to its place."""
    yield scene.command("files driver replace always")
    scene.order.unlink()


@contextmanager
def always_full(scene: Scene) -> Iterator[str]:
    """The disk of the executors is full, also of what is freed meanwhile."""
    lifted = threading.Event()

    def fill() -> None:
        while not lifted.wait(0.1):
            _fill(scene)

    filling = threading.Thread(target=fill, daemon=True)
    filling.start()
    yield ""
    lifted.set()
    filling.join()
    _empty(scene)


@contextmanager
def always_kill(scene: Scene) -> Iterator[str]:
    """Every Python worker dies soon after it was made."""
    lifted = threading.Event()

    def kill() -> None:
        while not lifted.wait(1.0):
            for process in scene.processes.python_workers():
                scene.processes.kill(process)

    killing = threading.Thread(target=kill, daemon=True)
    killing.start()
    yield ""
    lifted.set()
    killing.join()


@contextmanager
def lose_all_hosts(scene: Scene) -> Iterator[str]:
    """All hosts die, and no other one comes."""
    number = len(scene.hosts.hosts)
    for host in list(scene.hosts.hosts):
        host.kill()
        scene.hosts.hosts.remove(host)
    yield f"{number} hosts"
    for _ in range(number):
        scene.hosts.add_host()


Lasting: TypeAlias = Callable[[Scene], AbstractContextManager[str]]
LASTING_ANYWHERE: tuple[Lasting, ...] = (always_raise, never_write, always_kill)


def name_of(fault: Fault | Lasting) -> str:
    """As it is called in tables."""
    return fault.__name__.replace("_", " ")
