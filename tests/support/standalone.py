"""A standalone cluster of Spark on this machine: its own master and workers, each a process.

Workers may live in network namespaces of their own, each with an address of its own on a bridge, as
hosts of a network have: then a cable can be pulled (`Host.cut`). That takes root on Linux and the
command `ip`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pyspark

_BRIDGE = "tfspark0"
_NETWORK = "10.213.77"
_UP_S = 60.0
_GONE = suppress(FileNotFoundError, ProcessLookupError)  # it ended meanwhile


@dataclass
class Host:
    """A worker of Spark, and where it lives.

    Attributes:
        name: of the worker, and of its namespace if it has one.
        address: that it listens at.
        namespace: whether it has a network of its own.
        process: the worker's JVM.
    """

    name: str
    address: str
    namespace: bool
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """Ends the worker, its executors and their Python, all at once, as a host that dies."""
        for process in [self.process.pid, *descendants_of(self.process.pid)]:
            with _GONE:
                os.kill(process, signal.SIGKILL)
        self.process.wait()
        if self.namespace:
            _remove_namespace(self.name)

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Pulls the cable of its network while the block runs: what is sent is lost silently."""
        assert self.namespace, "a host without a namespace has no cable of its own"
        _ip("link", "set", f"{self.name}-host", "down")
        try:
            yield
        finally:
            _ip("link", "set", f"{self.name}-host", "up")


@dataclass
class Cluster:
    """A master and its workers.

    Attributes:
        url: of the master: `spark://…`.
        address: of the driver's host, as workers reach it.
        hosts: the workers.
    """

    url: str
    address: str
    folder: Path
    namespaces: bool
    cores: int
    memory: str
    settings: Mapping[str, str]
    hosts: list[Host] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: count(2))  # the driver's host is 1

    def add_host(self) -> Host:
        """Starts another worker; it registers by itself."""
        number = next(self._numbers)
        name = f"tfs{number}"
        address = f"{_NETWORK}.{number}" if self.namespaces else self.address
        before: list[str] = []
        if self.namespaces:
            _make_namespace(name, address)
            before = ["ip", "netns", "exec", name]
        process = _spark_class(
            "org.apache.spark.deploy.worker.Worker",
            self.folder / f"{name}.log",
            *("--host", address, "--cores", str(self.cores), "--memory", self.memory),
            *("--work-dir", str(self.folder / name), "--webui-port", "0", self.url),
            address=address,
            before=before,
            settings=self.settings,
        )
        host = Host(name, address, self.namespaces, process)
        self.hosts.append(host)
        return host


@contextmanager
def standalone(
    folder: Path,
    num_hosts: int,
    *,
    namespaces: bool = False,
    cores: int = 1,
    memory: str = "1g",
    settings: Mapping[str, str] | None = None,
) -> Iterator[Cluster]:
    """A running cluster; all of it is gone after the block.

    Args:
        folder: for logs and working folders.
        num_hosts: workers.
        namespaces: give each a network of its own.
        cores, memory: of each.
        settings: of Spark, for master and workers.
    """
    # Driver and executors run this interpreter; both look here.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    # A host whose network goes with it says no farewell: until its time is up the master counts it,
    # and starts no executor on another one in its place.
    known = {"spark.master.rest.enabled": "false", "spark.worker.timeout": "15"}
    settings = {**known, **(settings or {})}
    with ExitStack() as undo:
        address = "127.0.0.1"
        if namespaces:
            address = f"{_NETWORK}.1"
            undo.callback(_remove_network)
            _remove_network()  # what a killed run left
            _ip("link", "add", "name", _BRIDGE, "type", "bridge")
            _ip("addr", "add", f"{address}/24", "dev", _BRIDGE)
            _ip("link", "set", _BRIDGE, "up")
        with socket.create_server((address, 0)) as free:
            port = free.getsockname()[1]
        master = _spark_class(
            "org.apache.spark.deploy.master.Master",
            folder / "master.log",
            *("--host", address, "--port", str(port), "--webui-port", "0"),
            address=address,
            settings=settings,
        )
        undo.callback(_end, master)
        cluster = Cluster(
            f"spark://{address}:{port}", address, folder, namespaces, cores, memory, settings
        )
        undo.callback(lambda: [host.kill() for host in [*cluster.hosts]])
        _wait_for_port(address, port, master)
        for _ in range(num_hosts):
            cluster.add_host()
        yield cluster


def can_make_namespaces() -> bool:
    """Whether this process may make network namespaces, with cables between them."""
    if not sys.platform.startswith("linux") or os.geteuid() or not shutil.which("ip"):
        return False
    tried = subprocess.run(
        ["ip", "link", "add", "tfstry0", "type", "veth", "peer", "name", "tfstry1"],
        capture_output=True,
        check=False,
    )
    if tried.returncode:
        return False
    _ip("link", "del", "tfstry0")
    tried = subprocess.run(["ip", "netns", "add", "tfstry"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", "tfstry"], capture_output=True, check=False)
    return tried.returncode == 0


def descendants_of(process: int) -> list[int]:
    """All processes that a process started, directly or not."""
    children: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with _GONE, open(f"/proc/{entry}/stat") as stat:
            parent = int(stat.read().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(entry))
    found, waiting = [], [process]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _spark_class(
    name: str,
    log: Path,
    *arguments: str,
    address: str,
    before: Sequence[str] = (),
    settings: Mapping[str, str],
) -> subprocess.Popen[bytes]:
    home = Path(pyspark.__file__).parent
    java = Path(os.environ["JAVA_HOME"]) / "bin/java" if "JAVA_HOME" in os.environ else "java"
    # An executor's command is made by the worker from its own environment.
    environment = {**os.environ, "SPARK_HOME": str(home), "SPARK_SCALA_VERSION": "2.13"}
    environment["SPARK_LOCAL_IP"] = address  # that of the driver may be set in here
    defined = [f"-D{key}={value}" for key, value in settings.items()]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            [*before, str(java), "-Xmx512m", *defined, "-cp", f"{home}/jars/*", name, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _wait_for_port(address: str, port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _UP_S
    while True:
        try:
            socket.create_connection((address, port), 1).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < end, "the master does not start"
            time.sleep(0.1)


def _make_namespace(name: str, address: str) -> None:
    _ip("netns", "add", name)
    _ip("link", "add", f"{name}-host", "type", "veth", "peer", "name", f"{name}-in")
    _ip("link", "set", f"{name}-in", "netns", name)
    _ip("link", "set", f"{name}-host", "master", _BRIDGE)
    _ip("link", "set", f"{name}-host", "up")
    for command in (
        ["addr", "add", f"{address}/24", "dev", f"{name}-in"],
        ["link", "set", f"{name}-in", "up"],
        ["link", "set", "lo", "up"],
        ["route", "add", "default", "via", f"{_NETWORK}.1"],
    ):
        _ip("-n", name, *command)


def _remove_namespace(name: str) -> None:
    """With all that runs in it."""
    pids = subprocess.run(
        ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
    )
    for process in pids.stdout.split():
        with _GONE:
            os.kill(int(process), signal.SIGKILL)
    for command in (["netns", "del", name], ["link", "del", f"{name}-host"]):
        subprocess.run(["ip", *command], capture_output=True, check=False)


def _remove_network() -> None:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
    for line in listed.stdout.splitlines():
        if line.startswith("tfs"):
            _remove_namespace(line.split()[0])
    subprocess.run(["ip", "link", "del", _BRIDGE], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
