"""Seeded faults under trainings on a real cluster: what they cost, and whether the bits are right.

Each run trains a small model with validations and checkpoints on three executors, and a fault
strikes it once, at a random moment of its whole life. Then its weights are compared, bit by bit,
with those of runs that nothing disturbed.

    python benchmarks/faults.py                                   # two hours; see --help
    python benchmarks/faults.py --cluster standalone --engines gang --faults 20 --out /tmp/faults

Clusters: `local-cluster`, or `standalone`: Spark's own master and workers, which as root on Linux
live in network namespaces of their own, so that cables can be pulled.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

HERE = Path(__file__).resolve().parent
SUPPORT = HERE.parent / "tests/support"  # the same clusters and faults as those of the tests
sys.path[:0] = [str(SUPPORT), str(HERE)]

import reliability  # noqa: E402

ENGINES = ("gang", "shuffle")
CLUSTERS = ("local-cluster", "standalone")
RANKS = 3
STEPS = {"gang": 900, "shuffle": 60}
DISK_MB = 512
MOST_RUN_S = 300.0
"""A run that has not ended after so long hangs."""

_FOLDER_OF_FAULTS = SUPPORT / "faults"


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
    assert scene.disk is not None
    ballast = scene.disk / "ballast"
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={ballast}", "bs=1M"], stderr=subprocess.DEVNULL, check=False
    )
    seconds = scene.pause(0.5, 5)
    ballast.unlink()
    return f"for {seconds:.1f} s"


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


@dataclass
class Run:
    """One training.

    Attributes:
        cluster, engine, seed: which.
        fault, moment_s, details: what struck it when; empty of an undisturbed one.
        struck: whether the fault came before the end, and if ordered was obeyed.
        seconds: from making the optimizer to the weights.
        digest: of the weights.
        error: that left `optimize`, or "".
        redone_steps: that the engine took again, as far as it told of them.
        decisions: of the failure policy.
    """

    cluster: str
    engine: str
    seed: int
    fault: str = ""
    moment_s: float = 0.0
    details: str = ""
    struck: bool = False
    seconds: float = 0.0
    digest: str = ""
    error: str = ""
    redone_steps: int = 0
    decisions: list[str] = field(default_factory=list)


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

    def take_steps(self, number: int) -> None:
        """Trains on, with a validation and a checkpoint now and then."""
        from tfspark import MaxIteration, SeveralIteration, TriggerOr

        end = TriggerOr(MaxIteration(self.step + number), self._app.Sulky(os.getpid()))
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
        cluster: its name.
        folder: for checkpoints.
        context: of Spark.
        hosts: of a standalone cluster, or None.
        disk: the file system of the executors, where it is a small one.
    """

    def __init__(self, cluster: str, folder: Path, context: Any, hosts: Any, disk: Path | None):
        import spark_app

        self._app = spark_app
        self._cluster, self._folder, self._context = cluster, folder, context
        self._hosts, self._disk = hosts, disk
        self._order = Path(os.environ["TFSPARK_ORDER"])
        self._lines: list[str] = []
        logging.getLogger("tfspark").addHandler(_Kept(self._lines))

    def faults(self, engine: str) -> list[Fault]:
        """Those that this cluster and machine allow."""
        found = list(ANYWHERE)
        if self._hosts is not None:
            found += [fault for fault in ON_HOSTS if fault is kill_host or self._hosts.namespaces]
        if self._disk is not None:
            found.append(fill_disk)
        if engine == "gang":
            found += ON_SOCKETS
        return found

    def trained(self, engine: str, model_dir: str) -> Trained:
        """A new training, once all executors are there."""
        self._app.wait_for(self._is_whole, 120)
        return Trained(self._app, self._context, engine, model_dir)

    def scene(self, draw: random.Random, ended: threading.Event) -> Scene:
        """Where faults strike until the end."""
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

    def run(self, engine: str, seed: int, typical_s: float | None) -> Run:
        """One training; with a fault at a random moment of its typical length, if that is given."""
        from tfspark.errors import TFSparkError

        draw, ended = random.Random(f"{engine} {seed}"), threading.Event()
        run, scene, striker = Run(self._cluster, engine, seed), self.scene(draw, ended), None
        self._app.wait_for(self._is_whole, 120)
        self.decisions()
        started = time.monotonic()
        if typical_s is not None:
            fault = draw.choice(self.faults(engine))
            run.fault, run.moment_s = name_of(fault), draw.uniform(0, typical_s)
            striker = threading.Thread(target=_strike, args=(fault, scene, run), daemon=True)
            striker.start()
        model_dir = tempfile.mkdtemp(dir=self._folder)
        try:
            training = self.trained(engine, model_dir)
            try:
                training.take_steps(STEPS[engine])
                run.digest = training.digest()
            finally:
                run.redone_steps = training.redone_steps
                training.close()
        except TFSparkError as error:
            run.error = f"{type(error).__name__}: {error}"
        run.seconds = time.monotonic() - started
        ended.set()
        if striker is not None:
            striker.join(60)
        run.struck &= not self._order.exists()  # if it does, nobody came by
        run.decisions = self.decisions()
        shutil.rmtree(model_dir)
        return run

    def _is_whole(self) -> bool:
        from tfspark.slots import registered_slots

        return registered_slots(self._context) >= RANKS and len(self._app.executors()) >= RANKS


class _Kept(logging.Handler):
    """Keeps the lines of a log."""

    def __init__(self, lines: list[str]):
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


def name_of(fault: Fault) -> str:
    """As it is called in tables."""
    return fault.__name__.replace("_", " ")


def _strike(fault: Fault, scene: Scene, run: Run) -> None:
    if not scene.ended.wait(run.moment_s):
        run.struck = True
        run.details = fault(scene)


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
            hosts = undo.enter_context(
                standalone.standalone(folder, RANKS, namespaces=namespaces, memory="1g")
            )
            master = hosts.url
            os.environ["SPARK_LOCAL_IP"] = hosts.address
            settings |= {"driver__host": hosts.address, "driver__bindAddress": hosts.address}
            # A host whose cable was pulled is given up in time for a run to see it.
            settings |= {"network__timeout": "20s", "network__timeoutInterval": "5s"}
            settings |= {"executor__heartbeatInterval": "2s"}
        context = undo.enter_context(spark_app.application(master, **settings))
        yield Bench(cluster, folder, context, hosts, disk)


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


# What came of it


def table(runs: Sequence[Run]) -> str:
    """Faults by kind: how many, survived, steps redone, seconds lost."""
    lines = [
        "| engine | fault | struck | same bits | error | steps redone (median, worst) "
        "| seconds lost (median, worst) |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for engine in dict.fromkeys(run.engine for run in runs):
        own = [run for run in runs if run.engine == engine]
        struck = [run for run in own if run.struck]
        for kind in [*sorted({run.fault for run in struck}), None]:
            some = [run for run in struck if kind in (None, run.fault)]
            if not some:
                continue
            lost = [run.seconds - typical_seconds(own, run.cluster) for run in some]
            redone = [run.redone_steps for run in some]
            right = sum(is_right(run, own) for run in some)
            name = "**all**" if kind is None else kind
            lines.append(
                f"| {engine} | {name} | {len(some)} | {right} | "
                f"{sum(bool(run.error) for run in some)} | {statistics.median(redone):.0f}, "
                f"{max(redone)} | {statistics.median(lost):.1f}, {max(lost):.1f} |"
            )
    return "\n".join(lines)


def undisturbed(runs: Sequence[Run], cluster: str) -> list[Run]:
    """Those without a fault."""
    return [run for run in runs if run.cluster == cluster and not run.fault]


def typical_seconds(runs: Sequence[Run], cluster: str) -> float:
    """Of an undisturbed run; the first one starts workers and is passed over."""
    return statistics.median(run.seconds for run in undisturbed(runs, cluster)[1:])


def is_right(run: Run, runs: Sequence[Run]) -> bool:
    """Whether its weights are those of the undisturbed runs."""
    return {run.digest} == {other.digest for other in undisturbed(runs, run.cluster)}


class Results:
    """All runs, in a JSON file that grows by the run."""

    def __init__(self, path: Path, resume: bool):
        self._path = path
        self.runs: list[Run] = []
        if resume and path.exists():
            self.runs = [Run(**each) for each in json.loads(path.read_text())]

    def of(self, cluster: str, engine: str) -> list[Run]:
        """Of one cluster and engine."""
        return [run for run in self.runs if (run.cluster, run.engine) == (cluster, engine)]

    def add(self, run: Run) -> None:
        """Keeps a run."""
        self.runs.append(run)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps([asdict(each) for each in self.runs], indent=1))


def measure(bench: Bench, cluster: str, engine: str, faults: int, seed: int, out: Results) -> None:
    """Undisturbed runs, then so many that a fault has struck."""
    while len(undisturbed(out.of(cluster, engine), cluster)) < 4:
        run = bench.run(engine, seed, None)
        out.add(run)
        say(run)
    typical_s = typical_seconds(out.of(cluster, engine), cluster)
    done = {run.seed for run in out.of(cluster, engine) if run.fault}
    while sum(run.struck for run in out.of(cluster, engine)) < faults:
        seed += 1
        if seed not in done:
            run = bench.run(engine, seed, typical_s)
            out.add(run)
            say(run)


def say(run: Run) -> None:
    """One line of progress."""
    print(
        f"{time.strftime('%H:%M:%S')} {run.cluster} {run.engine} {run.seed}: "
        f"{run.fault or 'undisturbed'} {run.details} at {run.moment_s:.1f} s"
        f"{'' if run.struck or not run.fault else ' (missed)'}: {run.seconds:.1f} s, "
        f"{run.digest[:8] or run.error[:200]}, {len(run.decisions)} decisions",
        flush=True,
    )


def main() -> None:
    """Strikes, prints the table, writes JSON and the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--cluster", choices=CLUSTERS, help="one only (both)")
    parser.add_argument("--faults", type=int, default=50, help="of each engine and cluster (50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="keep what the folder has")
    parser.add_argument("--table-only", action="store_true", help="from the folder's JSON")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    results = Results(options.out / "faults.json", options.resume or options.table_only)
    threading.Thread(target=_end_if_it_hangs, args=(results,), daemon=True).start()
    if not options.table_only:
        for cluster in [options.cluster] if options.cluster else CLUSTERS:
            with bench_on(cluster) as bench:
                for engine in options.engines:
                    measure(bench, cluster, engine, options.faults, options.seed, results)
    text = "\n\n".join(
        f"On `{cluster}`:\n\n{table([run for run in results.runs if run.cluster == cluster])}"
        for cluster in CLUSTERS
        if any(run.cluster == cluster for run in results.runs)
    )
    print(text)
    if options.out == HERE / "results":
        reliability.write_page(options.out, faults=text)
    wrong = [
        run
        for run in results.runs
        if run.struck and not is_right(run, results.of(run.cluster, run.engine))
    ]
    if wrong:
        sys.exit(f"{len(wrong)} runs did not end with the bits of an undisturbed one.")


def _end_if_it_hangs(results: Results) -> None:
    """Ends this process where no run has ended for too long: that is the worst of results."""
    count, since = -1, time.monotonic()
    while time.sleep(1) is None:
        if len(results.runs) != count:
            count, since = len(results.runs), time.monotonic()
        elif time.monotonic() - since > MOST_RUN_S:
            print(f"A run has not ended after {MOST_RUN_S:g} s.", flush=True)
            os._exit(3)


if __name__ == "__main__":
    main()
