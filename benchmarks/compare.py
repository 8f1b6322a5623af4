"""tfspark, plain TensorFlow and other trainers on Spark, side by side on this machine.

Every side trains the same models in processes of its own, the peers in virtual environments that
are made on the way. Plain TensorFlow is measured before and after each, and the figure of a side is
its ratio to that. Results are written as they come; `--resume` goes on where a run was stopped.

    python benchmarks/compare.py                                # two hours; see --help
    python benchmarks/compare.py --quick --out /tmp/quick       # LeNet only
    python benchmarks/compare.py --sides tfspark-gang bigdl --workloads lenet:512 --repeats 3
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from environments import ENVIRONMENTS, CannotMakeError
from pages import fill
from processes import Outcome, run_side
from report import LIMIT, cells, page, plot, ratio, rows, table

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))

from workloads import WORKLOADS  # noqa: E402

DEFAULT_CELLS = (
    "lenet:128",
    "lenet:512",
    "lenet:4096",
    "ncf:1024",
    "ncf:4096",
    "lstm:128",
    "mobilenet:128",
    "dense:128",
)


@dataclass(frozen=True)
class Side:
    """One trainer.

    Attributes:
        name: in tables.
        script: in `sides/`.
        environment: of `ENVIRONMENTS`; None: this interpreter and this checkout of tfspark.
        workloads: those it can train; empty: all.
        why_not: a word on the others.
        variables: for its processes.
    """

    name: str
    script: str
    environment: str | None = None
    workloads: Sequence[str] = ()
    why_not: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)

    def command(self) -> list[Path | str]:
        """Interpreter and script.

        Raises:
            CannotMakeError: its environment cannot be made.
        """
        if self.environment is None:
            interpreter = Path(sys.executable)
        else:
            interpreter = ENVIRONMENTS[self.environment].make()
        return [interpreter, HERE / "sides" / self.script]

    def environ(self) -> dict[str, str]:
        """Variables of its processes."""
        path = [HERE / "sides", *([HERE.parent] if self.environment is None else [])]
        return {
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "SPARK_LOCAL_IP": "127.0.0.1",
            **self.variables,
        }


LEGACY_KERAS = {"TF_USE_LEGACY_KERAS": "1"}
ONE_THREAD = {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1", "OMP_NUM_THREADS": "1"}
SIDES = {
    side.name: side
    for side in (
        Side(LIMIT, "plain_loop.py"),
        Side("Keras fit", "plain_fit.py"),
        Side("tfspark-gang", "tfspark_gang.py"),
        Side("tfspark-shuffle", "tfspark_shuffle.py"),
        Side("multiworker", "multiworker.py", "multiworker", variables=LEGACY_KERAS),
        Side(
            "elephas",
            "elephas_side.py",
            "elephas",
            workloads=tuple(set(WORKLOADS) - {"ncf"}),
            why_not="fails on models with two inputs",
            variables=ONE_THREAD,
        ),
        Side(
            "tensorflowonspark",
            "tensorflowonspark_side.py",
            "tensorflowonspark",
            variables={**LEGACY_KERAS, **ONE_THREAD},
        ),
        Side(
            "spark-tensorflow-distributor",
            "spark_tensorflow_distributor_side.py",
            "spark-tensorflow-distributor",
            variables={**LEGACY_KERAS, **ONE_THREAD},
        ),
        Side("horovod", "horovod_side.py", "horovod", variables=ONE_THREAD),
        Side("bigdl", "bigdl_side.py", "bigdl", variables=ONE_THREAD),
        Side(
            "torch-distributor",
            "torch_distributor_side.py",
            "torch",
            workloads=("lenet", "dense"),
            why_not="not written for PyTorch",
            variables=ONE_THREAD,
        ),
    )
}


def cell_of(text: str) -> list[tuple[str, int]]:
    """`"lenet:128"`, or `"lenet"` for all its batches."""
    name, _, batch = text.partition(":")
    if name not in WORKLOADS or (batch and not batch.isdigit()):
        raise argparse.ArgumentTypeError(f"no workload {text!r}; there are {sorted(WORKLOADS)}")
    return [(name, int(batch))] if batch else [(name, n) for n in WORKLOADS[name].batches]


class Results:
    """The files of results, written after every unit.

    Args:
        folder: of the files.
        machine: where units are measured; None where none will be.
        resume: keep the units that are there, which must be of this machine.
    """

    def __init__(self, folder: Path, machine: Mapping[str, Any] | None, resume: bool):
        folder.mkdir(parents=True, exist_ok=True)
        self._json, self._folder = folder / "compare.json", folder
        self._content: dict[str, Any] = {"machine": machine or {}, "units": []}
        if resume and self._json.exists():
            self._content = json.loads(self._json.read_text())
            known = self._content["machine"]
            if machine is not None and known != machine:
                raise SystemExit(
                    f"A table is of one machine. Received: units of {known} in {self._json}, and "
                    f"{machine} to go on with. Take another folder (--out), or leave out --resume."
                )

    @property
    def units(self) -> list[dict[str, Any]]:
        """What was measured so far."""
        return self._content["units"]

    def has(self, workload: str, batch: int, side: str, repeat: int) -> bool:
        """Whether a unit is there."""
        wanted = (workload, batch, side, repeat)
        names = ("workload", "batch", "side", "repeat")
        return any(tuple(unit[name] for name in names) == wanted for unit in self.units)

    def add(self, unit: dict[str, Any]) -> None:
        """Keeps a unit."""
        self.units.append(unit)
        part = self._json.with_suffix(".part")
        part.write_text(json.dumps(self._content, indent=1) + "\n")
        part.replace(self._json)
        (self._folder / "compare.md").write_text(page(self._content))

    def publish(self, published: Path) -> None:
        """The picture, and the tables, also on the page of the documentation."""
        (self._folder / "compare.md").write_text(page(self._content))
        plot(self._content, self._folder / "compare.png")
        template = (HERE / "speed_page.md").read_text(encoding="utf-8")
        published.write_text(fill(template, {"tables": page(self._content)}), encoding="utf-8")


class Bench:
    """Measures sides between limits.

    Args:
        options: of the command.
        results: where units go, and which of them need not be measured again.
        run: how a process is run, as `processes.run_side`.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        results: Results,
        run: Callable[..., Outcome] = run_side,
    ):
        self._options, self._results, self._run_side = options, results, run
        self._broken: dict[str, str] = {}

    def cell(self, workload: str, batch: int, repeat: int) -> None:
        """All sides once, on one workload and batch."""
        limit = None
        for side in self._missing(workload, batch, repeat):
            key = {"workload": workload, "batch": batch, "side": side.name, "repeat": repeat}
            refused = self._refusal(side, workload)
            if refused:
                self._results.add({**key, "answer": None, "error": refused, "memory_mb": {}})
                continue
            before = limit or self._limit(workload, batch)
            unit = {**key, "load": os.getloadavg()[0]}
            outcome = self._run(side, workload, batch)
            unit.update(asdict(outcome))
            # After a failure, which may have taken minutes, the former limit is out of date.
            limit = self._limit(workload, batch) if outcome.answer else None
            if limit:
                unit["limits"] = [asdict(before), asdict(limit)]
                self._say(f"{'':6}{ratio(unit):.2f} of the limit")
            self._results.add(unit)

    def _missing(self, workload: str, batch: int, repeat: int) -> Iterator[Side]:
        for name in self._options.sides:
            if not self._results.has(workload, batch, name, repeat):
                yield SIDES[name]

    def _refusal(self, side: Side, workload: str) -> str | None:
        if side.workloads and workload not in side.workloads:
            return side.why_not
        if side.name not in self._broken:
            try:
                side.command()
                return None
            except CannotMakeError as error:
                self._say(str(error))
                self._broken[side.name] = str(error)
        return self._broken[side.name]

    def _limit(self, workload: str, batch: int) -> Outcome:
        outcome = self._run(SIDES[LIMIT], workload, batch)
        if outcome.answer is None:
            raise SystemExit(
                f"Plain TensorFlow failed, so nothing can be compared.\n{outcome.error}"
            )
        return outcome

    def _run(self, side: Side, workload: str, batch: int) -> Outcome:
        options = self._options
        arguments = {
            "workload": workload,
            "batch": batch,
            "workers": options.workers,
            "seconds": options.seconds,
            # There are two limits for each side.
            "blocks": max(2, options.blocks - 1) if side.name == LIMIT else options.blocks,
        }
        command = [*side.command()]
        for name, value in arguments.items():
            command += [f"--{name}", str(value)]
        outcome = self._run_side(command, side.environ(), options.time_limit)
        if outcome.answer:
            said = "{rows_per_second:,.0f} rows/s, one model: {equal_weights}".format(
                **outcome.answer
            )
        else:
            said = f"failed: {outcome.error}"
        self._say(f"{workload}:{batch} {side.name}: {said} ({outcome.seconds:.0f} s)")
        return outcome

    @staticmethod
    def _say(text: str) -> None:
        print(f"{datetime.datetime.now():%H:%M:%S} {text}", flush=True)


def main() -> None:
    """Measures, prints tables, writes JSON, Markdown and PNG."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    others = [name for name in SIDES if name != LIMIT]
    parser.add_argument(
        "--workloads",
        nargs="+",
        type=cell_of,
        metavar="NAME[:BATCH]",
        help=f"default: {' '.join(DEFAULT_CELLS)}; a name alone means all its batches",
    )
    parser.add_argument(
        "--sides", nargs="+", choices=others, metavar="SIDE", help=f"of {', '.join(others)}"
    )
    parser.add_argument("--repeats", type=int, default=1, help="units of each side (1)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a block (3)")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of a unit (3)")
    parser.add_argument("--workers", type=int, default=2, help="workers, of one thread (2)")
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds of a side (300)")
    parser.add_argument("--quick", action="store_true", help="LeNet at batch 128 and 512 only")
    parser.add_argument("--resume", action="store_true", help="keep what the folder has")
    parser.add_argument("--plot-only", action="store_true", help="from the folder's JSON")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--page", type=Path, help="docs/speed.md, where --out is not given")
    options = parser.parse_args()
    options.sides = options.sides or others
    if options.out == HERE / "results":
        options.page = options.page or HERE.parent / "docs/speed.md"
    cells_wanted = options.workloads or [
        cell_of(text) for text in (DEFAULT_CELLS[:2] if options.quick else DEFAULT_CELLS)
    ]
    here = None if options.plot_only else machine(options)
    results = Results(options.out, here, options.resume or options.plot_only)
    started = time.monotonic()
    # So that the sides end with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Terminated."))
    try:
        if not options.plot_only:
            bench = Bench(options, results)
            # Repeats outside, so that a drift of the machine meets all alike.
            for repeat in range(options.repeats):
                for workload, batch in itertools.chain(*cells_wanted):
                    bench.cell(workload, batch, repeat)
    finally:
        for (workload, batch), units in cells(results.units).items():
            print(f"\n{workload}, batch {batch}\n{table(rows(units))}")
        results.publish(options.page or options.out / "speed.md")
    print(f"\n{time.monotonic() - started:.0f} s; written to {options.out}")


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cores": os.cpu_count(),
        "workers": options.workers,
        "system": platform.system(),
        "processor": processor(),
        "python": platform.python_version(),
    }


def processor() -> str:
    """Its name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
