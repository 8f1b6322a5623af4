"""One long training with a fault every minute: memory, disk, descriptors and step time stay flat.

On a local-cluster of three executors. A training of endless steps, with validations and
checkpoints, and every minute another of the faults of `faults.py` strikes. Every few seconds all
processes are looked at.

    python benchmarks/soak.py                             # an hour for each engine
    python benchmarks/soak.py --engines gang --minutes 10 --out /tmp/soak
    python benchmarks/soak.py --engines gang              # the other one stays as it was
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fault_bench
import reliability
from fault_bench import ENGINES, STEPS, Bench, Trained, bench_on
from fault_kinds import name_of

from tfspark.errors import TFSparkError

HERE = Path(__file__).resolve().parent
SECTION = """\
## A fault every minute

`python benchmarks/soak.py`: one training of each engine on a local-cluster of three executors;
every minute another of these faults strikes. First and last third are of the minutes after the
first two, in which workers load programs.

{table}

![Steps a second, memory, disk, descriptors and threads over time](images/soak.png)"""

LOOK_S = 5.0
FAULT_EVERY_S = 60.0
LEAST_MINUTES = 5.0
WARM_S = 120.0
"""At first workers load programs and caches fill; growth is looked for after that."""


@dataclass
class Look:
    """All processes of the application at one time.

    Attributes:
        seconds: since the start.
        step: finished steps.
        driver_mb, heap_mb: anonymous memory of the driver's Python, and used heap of its JVM.
        workers_mb: anonymous memory of the largest Python worker.
        workers: how many there are.
        disk_mb: in Spark's folders.
        descriptors: of the driver's Python and JVM.
        threads: of the driver's Python.
    """

    seconds: float
    step: int
    driver_mb: float
    heap_mb: float
    workers_mb: float
    workers: int
    disk_mb: float
    descriptors: int
    threads: int


@dataclass
class Soak:
    """One training.

    Attributes:
        engine: which.
        looks: in order of time.
        faults: (seconds, kind, details).
        decisions: lines of the failure policy.
        steps: that it took.
        digest, expected: of the weights, and of an undisturbed training of as many steps.
        error: that ended it, or "".
    """

    engine: str
    looks: list[Look] = field(default_factory=list)
    faults: list[tuple[float, str, str]] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)
    steps: int = 0
    digest: str = ""
    expected: str = ""
    error: str = ""


def soak(bench: Bench, engine: str, minutes: float, seed: int, folder: Path) -> Soak:
    """Trains for so long under faults."""
    result = Soak(engine)
    ended = threading.Event()
    started = time.monotonic()
    bench.wait_until_whole()
    training = bench.trained(engine, str(folder / f"soak-{engine}"))
    striker = threading.Thread(
        target=_strike, args=(bench, engine, seed, result, ended, started), daemon=True
    )
    looker = threading.Thread(
        target=_look, args=(bench, training, result, ended, started), daemon=True
    )
    striker.start()
    looker.start()
    try:
        # The clock is asked between rounds, by the driver alone, so that the steps are a number.
        while time.monotonic() - started < minutes * 60:
            training.train_to(training.step + STEPS[engine])
        result.digest = training.digest()
    except TFSparkError as error:
        result.error = f"{type(error).__name__}: {error}"
    ended.set()
    striker.join(60)
    looker.join(60)
    result.steps = training.step
    training.close()
    result.decisions = bench.decisions()
    return result


def check(bench: Bench, result: Soak, folder: Path) -> None:
    """Trains as many steps once more, in this process, where nothing disturbs them."""
    undisturbed = bench.trained("local", str(folder / f"undisturbed-{result.engine}"))
    undisturbed.train_to(result.steps)
    result.expected = undisturbed.digest()
    undisturbed.close()


def _strike(
    bench: Bench,
    engine: str,
    seed: int,
    result: Soak,
    ended: threading.Event,
    started: float,
) -> None:
    draw = random.Random(f"soak {engine} {seed}")
    scene = bench.scene(draw, ended)
    while not ended.wait(FAULT_EVERY_S):
        fault = draw.choice(bench.faults(engine))
        at = time.monotonic() - started
        result.faults.append((at, name_of(fault), fault(scene)))
        print(f"{at:6.0f} s {engine}: {' '.join(result.faults[-1][1:])}", flush=True)


def _look(
    bench: Bench,
    training: Trained,
    result: Soak,
    ended: threading.Event,
    started: float,
) -> None:
    while not ended.wait(LOOK_S):
        seconds = time.monotonic() - started
        result.looks.append(Look(seconds, training.step, **bench.look()))  # type: ignore[arg-type]


def per_minute(looks: Sequence[Look], name: str) -> list[float]:
    """Medians of a figure over each minute."""
    minutes: dict[int, list[float]] = {}
    for look in looks:
        minutes.setdefault(int(look.seconds // 60), []).append(getattr(look, name))
    return [statistics.median(values) for _, values in sorted(minutes.items())]


def steps_per_s(looks: Sequence[Look]) -> list[float]:
    """Steps a second in each minute, faults and what they cost included."""
    last: dict[int, Look] = {}
    for look in looks:
        last[int(look.seconds // 60)] = look
    ends = [last[minute] for minute in sorted(last)]
    return [(b.step - a.step) / (b.seconds - a.seconds) for a, b in itertools.pairwise(ends)]


def table(soaks: Sequence[Soak]) -> str:
    """First and last third of each figure."""
    names = {
        "driver_mb": "driver, MB",
        "heap_mb": "driver's heap, MB",
        "workers_mb": "largest worker, MB",
        "workers": "Python workers",
        "disk_mb": "disk, MB",
        "descriptors": "descriptors of the driver",
        "threads": "threads of the driver",
    }
    lines = [
        "| engine | minutes | faults | decisions | same bits | figure | first third | last third |",
        "|---|---:|---:|---:|---|---|---:|---:|",
    ]
    for each in soaks:
        warm = [look for look in each.looks if look.seconds > WARM_S]
        figures = {label: per_minute(warm, name) for name, label in names.items()}
        figures["steps a second"] = steps_per_s(warm)
        kinds = Counter(kind for _, kind, _ in each.faults)
        right = "yes" if each.digest and each.digest == each.expected else f"no {each.error[:80]}"
        front = f"{each.engine} | {each.looks[-1].seconds / 60:.0f} | {kinds.total()} | "
        front += f"{len(each.decisions)} | {right}"
        for label, values in figures.items():
            third = max(1, len(values) // 3)
            first, last = (statistics.median(part) for part in (values[:third], values[-third:]))
            lines.append(f"| {front} | {label} | {first:,.1f} | {last:,.1f} |")
            front = " | | | | "
    return "\n".join(lines)


def plot(soaks: Sequence[Soak], path: Path) -> None:
    """Figures over time, with a line for each fault."""
    from matplotlib import pyplot

    rows = ("steps", "memory", "disk", "descriptors")
    figure, axes = pyplot.subplots(
        len(rows), len(soaks), figsize=(6 * len(soaks), 9), sharex=True, squeeze=False
    )
    for column, each in enumerate(soaks):
        looks, top = each.looks, axes[0][column]
        minutes = [look.seconds / 60 for look in looks]
        rates = [(b.step - a.step) / (b.seconds - a.seconds) for a, b in itertools.pairwise(looks)]
        top.plot(minutes[1:], rates, linewidth=0.8)
        top.set_title(f"engine {each.engine}")
        axes[0][0].set_ylabel("steps a second")
        for name, label in (
            ("driver_mb", "driver"),
            ("heap_mb", "driver's heap"),
            ("workers_mb", "largest worker"),
        ):
            axes[1][column].plot(minutes, [getattr(look, name) for look in looks], label=label)
        axes[1][column].legend(loc="lower right", fontsize=8)
        axes[1][0].set_ylabel("MB")
        axes[2][column].plot(minutes, [look.disk_mb for look in looks])
        axes[2][0].set_ylabel("MB on disk")
        axes[3][column].plot(minutes, [look.descriptors for look in looks], label="descriptors")
        axes[3][column].plot(minutes, [look.threads for look in looks], label="threads")
        axes[3][column].legend(loc="lower right", fontsize=8)
        axes[3][0].set_ylabel("of the driver")
        axes[3][column].set_xlabel("minutes")
        for axis in axes[:, column]:
            axis.set_ylim(bottom=0)
            for at, _, _ in each.faults:
                axis.axvline(at / 60, color="grey", linewidth=0.4, alpha=0.5)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Soaks, prints the table, writes JSON, picture and page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--minutes", type=float, default=60.0, help="of each engine (60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot-only", action="store_true", help="from the folder's JSON")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if options.minutes < LEAST_MINUTES:
        parser.error(f"growth takes {LEAST_MINUTES:g} minutes to see, not {options.minutes:g}")
    path = options.out / "soak.json"
    found = [read(each) for each in json.loads(path.read_text())] if path.exists() else []
    by_engine = {each.engine: each for each in found}
    if not options.plot_only:
        with bench_on("local-cluster") as bench, tempfile.TemporaryDirectory() as folder:
            for engine in options.engines:
                result = soak(bench, engine, options.minutes, options.seed, Path(folder))
                by_engine[engine] = result
                _write(by_engine, path)  # before more can go wrong
                check(bench, result, Path(folder))
                _write(by_engine, path)
    soaks = list(by_engine.values())
    text = table(soaks)
    print(text)
    images = HERE.parent / "docs/images" if options.out == HERE / "results" else options.out
    plot(soaks, images / "soak.png")
    if options.out == HERE / "results":
        reliability.write_page(options.out, soak=SECTION.format(table=text))
    if any(each.digest != each.expected for each in soaks):
        sys.exit("A training did not end with the bits of an undisturbed one.")


def _write(soaks: dict[str, Soak], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(each) for each in soaks.values()], indent=1)
    path.write_text(fault_bench.without_places(text))


def read(entry: dict[str, Any]) -> Soak:
    """From JSON."""
    looks = [Look(**look) for look in entry["looks"]]
    struck = [(at, kind, details) for at, kind, details in entry["faults"]]
    return Soak(**{**entry, "looks": looks, "faults": struck})


if __name__ == "__main__":
    main()
