"""A small cluster with trainings on it that can be disturbed, and a look at all their processes."""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SUPPORT = HERE.parent / "tests/support"  # the same clusters and faults as those of the tests
sys.path[:0] = [str(SUPPORT), str(HERE)]

import fault_kinds  # noqa: E402
from fault_kinds import Fault, Lasting, Scene  # noqa: E402

ENGINES = ("gang", "shuffle")
CLUSTERS = ("local-cluster", "standalone")
RANKS = 3
STEPS = {"gang": 900, "shuffle": 60, "local": 900}
DISK_MB = 512

_FOLDER_OF_FAULTS = SUPPORT / "faults"


class Trained:
    """A training of the small model that all runs are of.

    Args:
        app: the module `spark_app`.
        context: of Spark.
        engine, model_dir: of the training.
    """

    def __init__(self, app: Any, context: Any, engine: str, model_dir: str):
        from tfspark import FailurePolicy

        self._app, self._steps = app, STEPS[engine]
        self._model, self._training = app.optimizer(
            context,
            "dense",
            sizes=(20, 13, 11),
            engine=engine,
            model_dir=model_dir,
            val_rdd=context.parallelize([0], 1).flatMap(app.Rows("dense", (20,))),
            metrics=["accuracy"],
            failure_policy=FailurePolicy(user_retries=60),
        )

    def train_to(self, step: int) -> None:
        """Trains on up to this step, with a validation and a checkpoint now and then."""
        from tfspark import MaxIteration, SeveralIteration, TriggerOr

        end = TriggerOr(MaxIteration(step), self._app.Sulky(os.getpid()))
        save, validate = SeveralIteration(self._steps // 3), SeveralIteration(self._steps // 4)
        self._training.optimize(end, save, validate)

    @property
    def step(self) -> int:
        """Finished steps."""
        return self._training.step

    @property
    def redone_steps(self) -> int:
        """Steps taken again, as far as the engine told of them."""
        running = self._training._training
        return running.loop.redone_steps if running else 0

    def digest(self) -> str:
        """Of the weights."""
        return self._app.digest(self._model)

    def close(self) -> None:
        """Frees what it holds in Spark."""
        self._training.close()


class Bench:
    """A cluster with trainings on it, undisturbed and disturbed.

    Args:
        folder: for checkpoints.
        context: of Spark.
        hosts: of a standalone cluster, or None.
        disk: the file system of the executors, where it is a small one.
    """

    def __init__(self, folder: Path, context: Any, hosts: Any, disk: Path | None):
        import spark_app

        self._app = spark_app
        self._folder, self._context = folder, context
        self._hosts, self._disk = hosts, disk
        self._order = Path(os.environ["TFSPARK_ORDER"])
        self._lines: list[str] = []
        logging.getLogger("tfspark").addHandler(_Kept(self._lines))

    def faults(self, engine: str) -> list[Fault]:
        """Those that this cluster and machine allow, and that pass."""
        found = list(fault_kinds.ANYWHERE)
        if self._hosts is not None:
            found.append(fault_kinds.kill_host)
            if self._hosts.namespaces:
                found.append(fault_kinds.cut_network)
        if self._disk is not None:
            found.append(fault_kinds.fill_disk)
        if engine == "gang":
            found += fault_kinds.ON_SOCKETS
        return found

    def lasting_faults(self) -> list[Lasting]:
        """Those that this cluster and machine allow, and that stay."""
        found = list(fault_kinds.LASTING_ANYWHERE)
        if self._hosts is not None:
            found.append(fault_kinds.lose_all_hosts)
        if self._disk is not None:
            found.append(fault_kinds.always_full)
        return found

    def new_folder(self) -> str:
        """For the checkpoints of a training."""
        return tempfile.mkdtemp(dir=self._folder)

    def trained(self, engine: str, model_dir: str) -> Trained:
        """A new training."""
        return Trained(self._app, self._context, engine, model_dir)

    def wait_until_whole(self) -> None:
        """Waits for all executors, as Spark and the operating system see them."""
        from tfspark.slots import registered_slots

        self._app.wait_for(
            lambda: min(registered_slots(self._context), len(self._app.executors())) >= RANKS, 120
        )

    def scene(self, draw: random.Random, ended: threading.Event) -> Scene:
        """Where faults strike until the end of a run; orders of an earlier one are forgotten."""
        self._order.unlink(missing_ok=True)
        return Scene(self._app, self._hosts, self._order, self._disk, draw, ended)

    def decisions(self) -> list[str]:
        """Of the failure policy, since this was asked last."""
        found = [line for line in self._lines if line.startswith("Failure policy")]
        self._lines.clear()
        return found

    def look(self) -> dict[str, float]:
        """What all processes of the application take, as of now."""
        runtime = self._context._jvm.java.lang.Runtime.getRuntime()
        here, jvm = os.getpid(), self._app.driver_jvm()
        workers = [_anonymous_mb(process) for process in self._app.python_workers()]
        return {
            "driver_mb": _anonymous_mb(here),
            "heap_mb": (runtime.totalMemory() - runtime.freeMemory()) / 2**20,
            "workers_mb": max(workers, default=0.0),
            "workers": len(workers),
            "disk_mb": _disk_mb(self._disk or self._folder),
            "descriptors": sum(len(os.listdir(f"/proc/{each}/fd")) for each in (here, jvm)),
            "threads": len(os.listdir(f"/proc/{here}/task")),
        }


class _Kept(logging.Handler):
    """Keeps the lines of a log."""

    def __init__(self, lines: list[str]):
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


def without_places(text: str) -> str:
    """A text with tracebacks, without the folders where this project and Python are."""
    for folder in (HERE.parent, sys.prefix, sys.base_prefix):
        text = text.replace(f"{folder}/", "")
    return text


def _anonymous_mb(process: int) -> float:
    try:
        with open(f"/proc/{process}/status") as status:
            found = [line for line in status if line.startswith("RssAnon")]
    except (FileNotFoundError, ProcessLookupError):
        return 0.0  # it ended meanwhile
    return int(found[0].split()[1]) / 1024 if found else 0.0


def _disk_mb(folder: Path) -> float:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.path.getsize(os.path.join(root, name))
    return total / 2**20


@contextmanager
def bench_on(cluster: str) -> Iterator[Bench]:
    """A cluster of three executors with a bench on it; all of it is gone after the block."""
    with ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="tfspark-faults-")))
        disk = undo.enter_context(small_disk(folder / "disk"))
        os.environ["TFSPARK_ORDER"] = str(folder / "order")
        paths = [_FOLDER_OF_FAULTS, SUPPORT, HERE.parent, os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
        os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"
        sys.path.insert(0, str(_FOLDER_OF_FAULTS))
        import sitecustomize  # noqa: F401  (wraps what of tfspark is imported after it)
        import spark_app
        import standalone

        settings: dict[str, Any] = {"cores__max": RANKS, "executor__memory": "768m"}
        hosts, master = None, f"local-cluster[{RANKS},1,1024]"
        if disk is not None:
            settings["local__dir"] = str(disk)
        if cluster == "standalone":
            namespaces = standalone.can_make_namespaces()
            # Executors write where their host says, whatever the application's settings are.
            of_hosts = {} if disk is None else {"spark.local.dir": str(disk)}
            hosts = undo.enter_context(
                standalone.standalone(
                    folder, RANKS, namespaces=namespaces, memory="1g", settings=of_hosts
                )
            )
            master = hosts.url
            os.environ["SPARK_LOCAL_IP"] = hosts.address
            settings |= {"driver__host": hosts.address, "driver__bindAddress": hosts.address}
            # tfspark is on every host, which init_nncontext cannot know of a cluster.
            settings |= {"python__daemon__module": "tfspark.daemon"}
            # A host whose cable was pulled is given up in time for a run to see it.
            settings |= {"network__timeout": "20s", "network__timeoutInterval": "5s"}
            settings |= {"executor__heartbeatInterval": "2s"}
        context = undo.enter_context(spark_app.application(master, **settings))
        bench = Bench(folder, context, hosts, disk)
        bench.wait_until_whole()
        if disk is not None and not any(disk.glob("spark-*/executor-*")):
            sys.exit(f"Executors must write to {disk}: otherwise filling it would be no fault.")
        yield bench


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of its own, small enough to be filled; None where this cannot be made."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    made = (
        shutil.which("mount")
        and not subprocess.run(options, capture_output=True, check=False).returncode
    )
    try:
        yield folder if made else None
    finally:
        if made:
            subprocess.run(["umount", "-l", str(folder)], check=True)
