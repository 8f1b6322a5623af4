"""Seeded faults under trainings on a real cluster: what they cost, and whether the bits are right.

Each run trains a small model with validations and checkpoints on three executors, and a fault
strikes it once, at a random moment of its whole life. Then its weights are compared, bit by bit,
with those of runs that nothing disturbed, which are taken in turns with the others. A fault that
stays has to end the run with one clear error; when it is lifted, a new training goes on from the
newest checkpoint, to the same bits.

    python benchmarks/faults.py                                   # two hours; see --help
    python benchmarks/faults.py --cluster standalone --engines gang --faults 20 --out /tmp/faults

Clusters: `local-cluster`, or `standalone`: Spark's own master and workers, which as root on Linux
live in network namespaces of their own, so that cables can be pulled.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import fault_bench
import reliability
from fault_bench import CLUSTERS, ENGINES, STEPS, Bench, Trained, bench_on
from fault_kinds import Fault, Lasting, Scene, name_of

HERE = Path(__file__).resolve().parent

UNDISTURBED = 4
"""Runs without a fault before the first one with a fault."""

UNDISTURBED_EVERY = 6
"""One of so many runs after that has no fault, so that times are compared within minutes."""

LASTING_TIMES = 2
"""Runs of each fault that stays, on each cluster, by each engine."""

MOST_RUN_S = 600.0
"""A run that has not ended after so long hangs."""


@dataclass
class Run:
    """One training.

    Attributes:
        cluster, engine, seed: which.
        fault, moment_s, details: what struck it when; empty of an undisturbed one.
        stays: whether the fault stayed until the run had ended.
        struck: whether the fault came before the end, and if ordered was obeyed.
        seconds: from making the optimizer to the weights.
        digest: of the weights; after a fault that stayed, of those of the training that went on.
        error: that left `optimize`, or "".
        error_s: from the strike to the error.
        redone_steps: that the engine took again, as far as it told of them.
        decisions: of the failure policy.
    """

    cluster: str
    engine: str
    seed: int
    fault: str = ""
    moment_s: float = 0.0
    details: str = ""
    stays: bool = False
    struck: bool = False
    seconds: float = 0.0
    digest: str = ""
    error: str = ""
    error_s: float = 0.0
    redone_steps: int = 0
    decisions: list[str] = field(default_factory=list)


def undisturbed_run(bench: Bench, run: Run) -> None:
    """One training that nothing strikes."""
    model_dir = _begin(bench)
    _train(bench, run, model_dir)
    shutil.rmtree(model_dir)


def disturbed_run(bench: Bench, run: Run, within_s: float) -> None:
    """One training with a fault at a random moment within so many seconds."""
    draw, ended = random.Random(f"{run.engine} {run.seed}"), threading.Event()
    fault = draw.choice(bench.faults(run.engine))
    run.fault, run.moment_s = name_of(fault), draw.uniform(0, within_s)
    scene, model_dir = bench.scene(draw, ended), _begin(bench)
    striker = threading.Thread(target=_strike, args=(fault, scene, run), daemon=True)
    striker.start()
    _train(bench, run, model_dir)
    ended.set()
    striker.join(60)
    run.struck &= not scene.order.exists()  # if it does, nobody came by
    shutil.rmtree(model_dir)


def lasting_run(bench: Bench, run: Run, fault: Lasting, within_s: float) -> None:
    """One training with a fault that stays, and another one that goes on when it is lifted."""
    draw, ended = random.Random(f"{run.engine} {run.seed} {fault}"), threading.Event()
    run.fault, run.stays, run.moment_s = name_of(fault), True, draw.uniform(0, within_s)
    scene, model_dir = bench.scene(draw, ended), _begin(bench)
    lifted = threading.Event()
    striker = threading.Thread(target=_stay, args=(fault, scene, run, lifted), daemon=True)
    striker.start()
    started = time.monotonic()
    _train(bench, run, model_dir)
    ended.set()
    run.error_s = time.monotonic() - started - run.moment_s if run.error else 0.0
    lifted.set()
    striker.join(120)
    if run.error:
        bench.wait_until_whole()
        rest = Run(run.cluster, run.engine, run.seed)
        _train(bench, rest, model_dir)
        run.digest = rest.digest
        run.error += f"\n\nThen: {rest.error}" if rest.error else ""
    shutil.rmtree(model_dir)


def _begin(bench: Bench) -> str:
    bench.wait_until_whole()
    bench.decisions()
    return bench.new_folder()


def _train(bench: Bench, run: Run, model_dir: str) -> None:
    from tfspark.errors import TFSparkError

    training: Trained | None = None
    started = time.monotonic()
    try:
        training = bench.trained(run.engine, model_dir)
        training.train_to(STEPS[run.engine])
        run.digest = training.digest()
    except TFSparkError as error:
        run.error = f"{type(error).__name__}: {error}"
    finally:
        if training is not None:
            run.redone_steps = training.redone_steps
            training.close()
    run.seconds = time.monotonic() - started
    run.decisions = bench.decisions()


def _strike(fault: Fault, scene: Scene, run: Run) -> None:
    if not scene.ended.wait(run.moment_s):
        run.struck = True
        run.details = fault(scene)


def _stay(fault: Lasting, scene: Scene, run: Run, lifted: threading.Event) -> None:
    if not scene.ended.wait(run.moment_s):
        run.struck = True
        with fault(scene) as run.details:
            lifted.wait()


# What came of it


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
        text = json.dumps([asdict(each) for each in self.runs], indent=1)
        self._path.write_text(fault_bench.without_places(text))


def undisturbed(runs: Sequence[Run]) -> list[Run]:
    """Those without a fault; the first one starts workers and is passed over."""
    return [run for run in runs if not run.fault][1:]


def is_right(run: Run, runs: Sequence[Run]) -> bool:
    """Whether its weights are those of the undisturbed ones among the runs."""
    return {run.digest} == {other.digest for other in undisturbed(runs)}


def table(runs: Sequence[Run]) -> str:
    """Faults of one cluster that pass, by kind: how many, survived, steps redone, seconds lost."""
    lines = [
        "| engine | fault | struck | same bits | error | steps redone (median, worst) "
        "| seconds lost (median, worst) |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for engine, own, struck in _by_engine(runs, stays=False):
        typical_s = statistics.median(run.seconds for run in undisturbed(own))
        for kind, some in _by_kind(struck):
            lost = [run.seconds - typical_s for run in some]
            redone = [run.redone_steps for run in some]
            lines.append(
                f"| {engine} | {kind} | {len(some)} | {sum(is_right(run, own) for run in some)} | "
                f"{sum(bool(run.error) for run in some)} | {statistics.median(redone):.0f}, "
                f"{max(redone)} | {statistics.median(lost):.1f}, {max(lost):.1f} |"
            )
    return "\n".join(lines)


def lasting_table(runs: Sequence[Run]) -> str:
    """Faults of one cluster that stay, by kind: errors, seconds to them, and what went on."""
    lines = [
        "| engine | fault that stays | struck | ended with | ended well before it mattered "
        "| seconds to the error (median, worst) | went on to the same bits |",
        "|---|---|---:|---|---:|---:|---:|",
    ]
    for engine, own, struck in _by_engine(runs, stays=True):
        for kind, some in _by_kind(struck):
            failed = [run for run in some if run.error]
            names = sorted({run.error.split(":")[0] for run in failed})
            seconds = [run.error_s for run in failed] or [0.0]
            lines.append(
                f"| {engine} | {kind} | {len(some)} | {', '.join(names)} | "
                f"{len(some) - len(failed)} | {statistics.median(seconds):.1f}, "
                f"{max(seconds):.1f} | {sum(is_right(run, own) for run in some)} |"
            )
    return "\n".join(lines)


def _by_engine(runs: Sequence[Run], stays: bool) -> list[tuple[str, list[Run], list[Run]]]:
    found = []
    for engine in dict.fromkeys(run.engine for run in runs):
        own = [run for run in runs if run.engine == engine]
        found.append((engine, own, [run for run in own if run.struck and run.stays == stays]))
    return found


def _by_kind(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    kinds = sorted({run.fault for run in runs})
    found = [(kind, [run for run in runs if run.fault == kind]) for kind in kinds]
    return [*found, ("**all**", list(runs))] if runs else []


def page(runs: Sequence[Run]) -> str:
    """All tables."""
    parts = []
    for cluster in CLUSTERS:
        own = [run for run in runs if run.cluster == cluster]
        if own:
            parts += [f"On `{cluster}`:", table(own)]
        if any(run.stays for run in own):
            parts.append(lasting_table(own))
    return "\n\n".join(parts)


# How it is measured


class Measurement:
    """Runs of an engine on a cluster, as many as were asked for.

    Args:
        bench: the cluster.
        cluster, engine: which.
        seed: of the first run.
        results: where runs are kept; what is there is not done again.
    """

    def __init__(self, bench: Bench, cluster: str, engine: str, seed: int, results: Results):
        self._bench, self._cluster, self._engine = bench, cluster, engine
        self._seed, self._results = seed, results

    def undisturbed(self) -> None:
        """The first runs, without a fault."""
        while len(undisturbed(self._mine())) < UNDISTURBED - 1:
            self._take(self._seed, undisturbed_run)

    def passing(self, faults: int) -> None:
        """Until so many a fault that passes has struck."""
        done = {run.seed for run in self._mine() if run.fault and not run.stays}
        seed = self._seed
        while sum(run.struck for run in self._mine() if not run.stays) < faults:
            seed += 1
            if seed in done:
                continue
            self._take(seed, lambda bench, run: disturbed_run(bench, run, self._shortest_s()))
            if seed % UNDISTURBED_EVERY == 0:
                self._take(seed, undisturbed_run)

    def lasting(self, times: int) -> None:
        """Each fault that stays, so many times."""
        for fault in self._bench.lasting_faults():
            done = [run for run in self._mine() if run.stays and run.fault == name_of(fault)]
            for number in range(len(done), times):
                # At most half of a run: later nothing may need what is broken.
                self._take(
                    self._seed + number,
                    lambda bench, run, fault=fault: lasting_run(  # type: ignore[misc]
                        bench, run, fault, self._shortest_s() / 2
                    ),
                )

    def _mine(self) -> list[Run]:
        return self._results.of(self._cluster, self._engine)

    def _shortest_s(self) -> float:
        return min(run.seconds for run in undisturbed(self._mine()))

    def _take(self, seed: int, make: Callable[[Bench, Run], None]) -> None:
        run = Run(self._cluster, self._engine, seed)
        make(self._bench, run)
        self._results.add(run)
        say(run)


def say(run: Run) -> None:
    """One line of progress."""
    print(
        f"{time.strftime('%H:%M:%S')} {run.cluster} {run.engine} {run.seed}: "
        f"{run.fault or 'undisturbed'} {run.details} at {run.moment_s:.1f} s"
        f"{'' if run.struck or not run.fault else ' (missed)'}: {run.seconds:.1f} s, "
        f"{run.digest[:8]} {run.error[:200]}, {len(run.decisions)} decisions",
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
    parser.add_argument(
        "--lasting", type=int, default=LASTING_TIMES, help="runs of each fault that stays (2)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="keep what the folder has")
    parser.add_argument("--table-only", action="store_true", help="from the folder's JSON")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    results = Results(options.out / "faults.json", options.resume or options.table_only)
    if not options.table_only:
        threading.Thread(target=_end_if_it_hangs, args=(results,), daemon=True).start()
        for cluster in [options.cluster] if options.cluster else CLUSTERS:
            with bench_on(cluster) as bench:
                for engine in options.engines:
                    measurement = Measurement(bench, cluster, engine, options.seed, results)
                    measurement.undisturbed()
                    measurement.passing(options.faults)
                    measurement.lasting(options.lasting)
    text = page(results.runs)
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
