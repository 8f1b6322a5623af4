"""What a step costs N = 1, 2, 4, 8, 16 ranks on one machine, and what its exchange costs 2.

Three things are measured, one after the other, with models that compute next to nothing for each
weight: the bare exchange in plain processes, whole steps of the engine `gang` on Spark, and, for a
dense net of 25 M weights, the exchange of `gang` in turn with the same bytes over one raw socket
pair and through shared memory. The processor time of a rank is then explained by a fixed part,
messages, bytes and weights (`costs.py`).

    python benchmarks/scaling.py  # some five minutes; writes benchmarks/results/scaling.*
    python benchmarks/scaling.py --ranks 1 2 4 --seconds 1 --out /tmp/quick
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

# Spark and TensorFlow come later: every process of the bare exchange imports this file.
from bare_exchange import Exchange, bare, bare_shared, raw_pair, shared_copy, sum_of_bytes
from costs import Costs, Point, fit

if TYPE_CHECKING:
    from gang_steps import GangSteps
    from pyspark import SparkContext

WIDTHS = {"0.26 M": 512, "4.2 M": 2048}
COLORS = {"0.26 M": "tab:blue", "4.2 M": "tab:red"}
DENSE_BATCH = 128

BARE_COSTS = ("exchange_s", "message_s", "byte_s", "others_s", "shard_s")
# Whole steps always have two exchanges, and move each of the others' weights twice: the costs of an
# exchange are part of the step's, those of bytes of the others'.
GANG_COSTS = ("message_s", "step_s", "others_s", "shard_s")


@dataclass(frozen=True)
class Dense:
    """A step's exchange of the dense net on 2 ranks, in one block of alternating ones; seconds."""

    weights: int
    gang_s: float
    sockets_s: float
    memory_s: float
    raw_pair_s: float
    shared_copy_s: float


def exchange_points(found: list[Exchange]) -> list[Point]:
    """What `costs.fit` needs of the bare exchange.

    The gather sums nothing; each exchange copies the own shard once, of two times a step.
    """
    return [
        Point(one.num_ranks, one.weights, 1, 0, sums, 0.5, cpu_s)
        for one in found
        for sums, cpu_s in ((1, one.scatter_cpu_s), (0, one.gather_cpu_s))
    ]


def gang_points(found: list[GangSteps]) -> list[Point]:
    """What `costs.fit` needs of whole steps."""
    return [Point(one.num_ranks, one.weights, 2, 1, 1, 1, one.cpu_s) for one in found]


def cast_s() -> float:
    """Seconds of one core to convert a float32 to bfloat16 or back; the mean of both."""
    numbers = np.ones(1 << 20, np.float32)
    halves = numbers.astype(ml_dtypes.bfloat16)
    begun = time.process_time()
    for _ in range(10):
        halves[:] = numbers
        numbers[:] = halves
    return (time.process_time() - begun) / 20 / len(numbers)


def measure_gang(context: SparkContext, ranks: list[int], seconds: float) -> list[GangSteps]:
    """Steps of `gang` for each number of ranks and each model."""
    from gang_steps import Gang, matrix, start_workers

    found = []
    for num_ranks in ranks:
        for width in WIDTHS.values():
            # Right before they are used: Spark ends those that have been idle for a minute.
            start_workers(context, num_ranks)
            # A row for each rank.
            gang = Gang(*matrix(width), batch=num_ranks, num_ranks=num_ranks)
            found.append(gang.measure(seconds))
            gang.close()
            _say(found[-1])
    return found


def measure_dense(blocks: int, seconds: float) -> list[Dense]:
    """The dense net's exchange and what its bytes cost otherwise, in turns."""
    import keras
    from gang_steps import Gang
    from workloads import LEARNING_RATE, WORKLOADS

    workload = WORKLOADS["dense"]
    model = workload.model(keras)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(LEARNING_RATE), loss)
    (features,), labels = workload.rows(8 * DENSE_BATCH)
    gang = Gang(model, features, labels, batch=DENSE_BATCH, num_ranks=2)
    gang.phases(3)
    slice_bytes = gang.weights // 2 * 4
    found = []
    for _ in range(blocks):
        found.append(
            Dense(
                gang.weights,
                gang.phases(16)["exchange"],
                bare(2, [gang.weights], seconds)[0].step_s,
                bare_shared(2, [gang.weights], seconds)[0].step_s,
                raw_pair(slice_bytes, seconds),
                shared_copy(slice_bytes, seconds),
            )
        )
        _say(found[-1])
    gang.close()
    return found


def step_table(
    found: list[Exchange] | list[GangSteps],
    cpu_s: Callable[[Any], float],
    moved_bytes: Callable[[Any], float],
    costs: Costs,
    cores: int,
) -> str:
    """A Markdown table: bytes and seconds of every point beside what explains them."""
    lines = [
        "| weights | N | MB per rank | of 2·(N−1)/N·P·4 | step ms | processor ms per rank "
        "| explained ms per rank | × N / cores |",
        "|---" * 8 + "|",
    ]
    for name, width in WIDTHS.items():
        for one in (one for one in found if one.weights == width**2):
            expected = sum_of_bytes(one.num_ranks, one.weights)
            share = f"{moved_bytes(one) / expected:.3f}" if expected else "–"
            explained = costs.step(one.num_ranks, one.weights)
            in_turns = explained * max(1.0, one.num_ranks / cores)
            lines.append(
                f"| {name} | {one.num_ranks} | {moved_bytes(one) / 1e6:.2f} | {share} | "
                f"{one.step_s * 1e3:.2f} | {cpu_s(one) * 1e3:.2f} | {explained * 1e3:.2f} | "
                f"{in_turns * 1e3:.2f} |"
            )
    return "\n".join(lines)


def dense_table(found: list[Dense]) -> str:
    """A Markdown table: medians over blocks, ratios within blocks."""

    def middle(value: Callable[[Dense], float]) -> float:
        return statistics.median(map(value, found))

    names = {
        "`gang` on Spark": lambda one: one.gang_s,
        "bare exchange through shared memory": lambda one: one.memory_s,
        "bare exchange over sockets": lambda one: one.sockets_s,
        "one raw loopback socket pair": lambda one: one.raw_pair_s,
        "copies through shared memory": lambda one: one.shared_copy_s,
    }
    lines = ["| what | ms | `gang` takes × that |", "|---" * 3 + "|"]
    lines += [
        f"| {name} | {middle(value) * 1e3:.1f} | "
        f"{middle(lambda one, value=value: one.gang_s / value(one)):.2f} |"
        for name, value in names.items()
    ]
    return "\n".join(lines)


def costs_table(rows: dict[str, Costs]) -> str:
    """A Markdown table of fitted costs."""
    lines = [
        "| | exchange µs | message µs | byte ns | step µs | others ns | shard ns |",
        "|---" * 7 + "|",
    ]
    lines += [
        f"| {name} | {own.exchange_s * 1e6:.0f} | {own.message_s * 1e6:.1f} | "
        f"{own.byte_s * 1e9:.3f} | {own.step_s * 1e6:.0f} | "
        f"{own.others_s * 1e9:.2f} | {own.shard_s * 1e9:.2f} |"
        for name, own in rows.items()
    ]
    return "\n".join(lines)


def plot(
    exchanges: list[Exchange],
    steps: list[GangSteps],
    costs: dict[str, Costs],
    cores: int,
    path: Path,
) -> None:
    """Step time and bytes against N: points measured, lines explained."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (times, volumes) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for name, width in WIDTHS.items():
        color = COLORS[name]
        for kind, found, marker, style in (
            ("gang on Spark", steps, "o", "-"),
            ("bare exchange", exchanges, "s", "--"),
        ):
            own = [one for one in found if one.weights == width**2]
            ranks = [one.num_ranks for one in own]
            times.plot(ranks, [one.step_s * 1e3 for one in own], marker, color=color)
            explained = [costs[kind].step(n, width**2) * max(1.0, n / cores) * 1e3 for n in ranks]
            times.plot(ranks, explained, style, color=color, lw=1.2)
            times.annotate(
                f"{name}, {kind}",
                (ranks[-1], explained[-1]),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color=color,
                fontsize=8,
            )
        own = [one for one in exchanges if one.weights == width**2 and one.num_ranks > 1]
        ranks = [one.num_ranks for one in own]
        volumes.plot(ranks, [one.received_bytes / 1e6 for one in own], "s", color=color)
        volumes.plot(ranks, [sum_of_bytes(n, width**2) / 1e6 for n in ranks], "--", color=color)
        volumes.annotate(
            f"{name} weights",
            (ranks[-1], own[-1].received_bytes / 1e6),
            xytext=(-4, 8),
            textcoords="offset points",
            ha="right",
            color=color,
            fontsize=9,
        )
    both = sorted({one.num_ranks for one in exchanges} | {one.num_ranks for one in steps})
    times.set(xscale="log", yscale="log", xlabel="ranks on one machine", ylabel="ms per step")
    times.set_title(f"Step time on {cores} cores\npoints: measured, lines: explained by the costs")
    volumes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="MB per step", ylim=(1, 100))
    volumes.set_title("Bytes that one rank receives\npoints: measured, lines: 2 (N - 1)/N · P · 4")
    for axis in (times, volumes):
        axis.set_xticks(both, [str(n) for n in both])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    times.set_xlim(0.9, both[-1] * 4)
    figure.savefig(path, dpi=150)


def _say(found: Any) -> None:
    print(_short(asdict(found)), flush=True)


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(part) for key, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    """Measures, prints tables, writes JSON, Markdown and PNG."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument(
        "--spark-ranks", type=int, nargs="+", help="on Spark; default: as --ranks. 0.6 GB each"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="of every measurement")
    parser.add_argument("--blocks", type=int, default=5, help="of the dense net; 0: leave it out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"Other processes use this machine (load {load:.1f}): steps will take longer.")
    sizes = [width**2 for width in WIDTHS.values()]
    exchanges = []
    for num_ranks in options.ranks:
        for one in bare(num_ranks, sizes, options.seconds / 2):
            exchanges.append(one)
            _say(one)
    cast = cast_s()

    import tensorflow as tf

    from tfspark import init_nncontext

    spark_ranks = options.spark_ranks or options.ranks
    slots = max(2, *spark_ranks)
    context = init_nncontext(
        {"spark.ui.enabled": False}, app_name="scaling", master=f"local[{slots}]"
    )
    steps = measure_gang(context, spark_ranks, options.seconds)
    dense = measure_dense(options.blocks, options.seconds / 4)
    machine = {
        "cores": cores,
        "load_before": load,
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "spark": context.version,
    }
    costs = {
        "bare exchange": fit(exchange_points(exchanges), BARE_COSTS),
        "gang on Spark": fit(gang_points(steps), GANG_COSTS),
    }
    parts = {
        "bare": step_table(
            exchanges,
            lambda one: one.scatter_cpu_s + one.gather_cpu_s,
            lambda one: one.received_bytes,
            costs["bare exchange"],
            cores,
        ),
        "gang": step_table(
            steps, lambda one: one.cpu_s, lambda one: one.sent_bytes, costs["gang on Spark"], cores
        ),
        "costs": costs_table(costs),
    }
    if dense:
        parts["dense"] = dense_table(dense)
    content = {
        "machine": machine,
        "exchanges": [asdict(one) for one in exchanges],
        "steps": [asdict(one) for one in steps],
        "dense": [asdict(one) for one in dense],
        "cast_s": cast,
        "costs": {name: asdict(own) for name, own in costs.items()},
        "tables": parts,
    }
    text = "\n\n".join(f"## {name}\n\n{table}" for name, table in parts.items())
    print(text)
    (options.out / "scaling.json").write_text(json.dumps(content, indent=1) + "\n")
    (options.out / "scaling.md").write_text(f"{machine}\n\n{text}\n")
    plot(exchanges, steps, costs, cores, options.out / "scaling.png")


if __name__ == "__main__":
    main()
