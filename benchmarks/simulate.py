"""Steps of `gang` on 16 to 512 hosts with links of 10 and 25 Gbit/s, simulated from measured costs.

Reads what `scaling.py` and `overlap.py` measured on one machine, checks the simulation against the
points of the former, and writes docs/scaling.md: `scaling_page.md` with its tables filled in, and
its pictures.

    python benchmarks/simulate.py  # a minute or two
    python benchmarks/simulate.py --ranks 16 64 --out /tmp/quick --page /tmp/scaling.md
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from bare_exchange import sum_of_bytes
from cluster import (
    Cluster,
    Direct,
    Exchange,
    Steps,
    Wire,
    Workload,
    next_first,
    rank_order,
    ring,
    simulate,
)
from costs import WEIGHT_BYTES, Costs, Point, fit
from pages import fill
from scaling import BARE_COSTS, GANG_COSTS

from tfspark.train.pacing import Pacing

ROOT = Path(__file__).parent.parent

# Ethernet frames of 1500 bytes carry 1448 bytes of a TCP stream in 1538 bytes of wire.
_GOODPUT = 1448 / 1538
NETWORKS = {f"{gigabits} Gbit/s": gigabits * 1e9 / 8 * _GOODPUT for gigabits in (10, 25)}
LATENCY_S = 50e-6
CORES_PER_RANK = 1  # the exchange is one thread

# A host that sustains 2 TFLOP/s in float32. ResNet-50: 32 images of 8.2 GFLOP, three times that
# with the backward pass. 100 M weights: 32 rows of 128 tokens, 6 FLOP a token and weight.
FLOPS = 2e12
SPREAD = 0.05
MODELS = (
    Workload("ResNet-50, 25.6 M weights", 25_600_000, 32 * 3 * 8.2e9 / FLOPS, SPREAD),
    Workload("100 M weights", 100_000_000, 6 * 100e6 * 32 * 128 / FLOPS, SPREAD),
)
LAUNCH_S = 5e-3
"""Seconds of the driver for each rank of a round: to start its task, to let it meet the others."""

LIMIT = 0.35
"""How far a simulated point may be from the measured one."""

OVERLAPPED = "gradients sent while others are computed, at best"


@dataclass(frozen=True)
class Variant:
    """One way to exchange."""

    name: str
    exchange: Exchange
    wire: Wire
    color: str


@dataclass(frozen=True)
class Outcome:
    """One simulated training.

    Attributes:
        model, network, variant: names.
        num_ranks: N.
        steps: without commits.
        commit_s: of a round's fixed cost, the share of a step.
        efficiency: a rank's rows per second, against one that neither exchanges nor waits.
    """

    model: str
    network: str
    variant: str
    num_ranks: int
    steps: Steps
    commit_s: float
    efficiency: float


def variants(cast_s: float) -> tuple[Variant, ...]:
    """What is compared; the first one is what `gang` does."""
    full, half = Wire("float32", 4), Wire("bfloat16", 2, cast_s)
    return (
        Variant("direct, next rank first", Direct(next_first), full, "tab:blue"),
        Variant("direct, rank 0 first", Direct(rank_order), full, "tab:red"),
        Variant("direct, next rank first, bfloat16", Direct(next_first), half, "tab:green"),
        Variant("ring", ring, full, "tab:gray"),
    )


def check(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The measured points of one machine beside simulated ones.

    A point with `held_out` is simulated with costs that are fitted to at most 4 ranks.
    """
    found = []
    cores = content["machine"]["cores"]
    for kind, points, names, measured in _measured(content):
        every = fit(points, names)
        few = fit([point for point in points if point.num_ranks <= 4], names)
        for (num_ranks, weights), step_s in measured.items():
            held_out = num_ranks > 4
            one_host = Cluster(num_ranks, ranks_per_host=num_ranks, cores=cores)
            simulated = [
                _steps(one_host, costs, Workload("", weights, 0.0), Direct(next_first)).step_s
                for costs in (every, few)
            ]
            found.append(
                {
                    "kind": kind,
                    "weights": weights,
                    "num_ranks": num_ranks,
                    "measured_s": step_s,
                    "simulated_s": simulated[0],
                    "error": simulated[0] / step_s - 1,
                    "held_out_error": simulated[1] / step_s - 1 if held_out else None,
                }
            )
    return found


def _measured(
    content: dict[str, Any],
) -> list[tuple[str, list[Point], tuple[str, ...], dict[Any, float]]]:
    """(kind, points, names of their costs, wall-clock seconds by N and P) of each kind."""
    bare = [
        Point(one["num_ranks"], one["weights"], 1, 0, sums, 0.5, one[name])
        for one in content["exchanges"]
        for sums, name in ((1, "scatter_cpu_s"), (0, "gather_cpu_s"))
    ]
    steps = [
        Point(one["num_ranks"], one["weights"], 2, 1, 1, 1, one["cpu_s"])
        for one in content["steps"]
    ]
    return [
        (
            kind,
            points,
            names,
            {(one["num_ranks"], one["weights"]): one["step_s"] for one in content[key]},
        )
        for kind, points, names, key in (
            ("bare exchange", bare, BARE_COSTS, "exchanges"),
            ("gang on Spark", steps, GANG_COSTS, "steps"),
        )
    ]


def cluster_costs(content: dict[str, Any]) -> Costs:
    """What a rank's processor costs that has no other rank on its host.

    Sockets cost what the bare exchange says, all that is not exchange what `gang` says: where the
    ranks of one machine share memory, the bytes of `gang` pass no sockets.
    """
    sockets = Costs(**content["costs"]["bare exchange"])
    gang = Costs(**content["costs"]["gang on Spark"])
    # The costs of `gang` hold those of two exchanges and, as far as they passed sockets, of the
    # bytes of each weight's two transfers.
    passed = statistics.median(
        one["sent_bytes"] / sum_of_bytes(one["num_ranks"], one["weights"])
        for one in content["steps"]
        if one["num_ranks"] > 1
    )
    moving_s = min(max(passed, 0.0), 1.0) * 2 * WEIGHT_BYTES * sockets.byte_s
    return replace(
        sockets,
        step_s=max(0.0, gang.step_s - 2 * sockets.exchange_s),
        others_s=max(sockets.others_s, gang.others_s - moving_s),
        shard_s=gang.shard_s,
    )


def train(
    costs: Costs,
    cluster: Cluster,
    workload: Workload,
    variant: Variant,
    network: str,
    fixed_s: float,
) -> Outcome:
    """Simulated steps, and the commits between them as `Pacing` lays them."""
    steps = _steps(cluster, costs, workload, variant.exchange, variant.wire)
    fixed_s += LAUNCH_S * cluster.num_ranks
    commit_s = fixed_s / Pacing().steps((), steps.step_s, fixed_s)
    return Outcome(
        workload.name,
        network,
        variant.name,
        cluster.num_ranks,
        steps,
        commit_s,
        workload.compute_s / (steps.step_s + commit_s),
    )


def _steps(
    cluster: Cluster,
    costs: Costs,
    workload: Workload,
    exchange: Exchange,
    wire: Wire | None = None,
) -> Steps:
    # The more ranks, the less the slowest one differs from step to step. The same random numbers
    # for all that is compared.
    count = max(4, 640 // cluster.num_ranks)
    random = np.random.default_rng(cluster.num_ranks)
    return simulate(cluster, costs, workload, exchange, wire or Wire(), count, random)


def remedies(
    costs: Costs, num_ranks: int, ways: tuple[Variant, ...], fixed_s: float
) -> list[tuple[str, str, float]]:
    """What helps on the slowest network with so many ranks: (model, remedy, efficiency)."""
    network, link = next(iter(NETWORKS.items()))
    direct, half = ways[0], ways[2]
    found = []
    for model in MODELS:
        cluster = Cluster(num_ranks, 1, CORES_PER_RANK, link, LATENCY_S)
        # Eight steps of one rank take eight draws, whose mean spreads less.
        local = replace(model, compute_s=8 * model.compute_s, spread=model.spread / 8**0.5)
        larger = replace(model, compute_s=4 * model.compute_s)
        packed = Cluster(num_ranks, 8, 8 * CORES_PER_RANK, link, LATENCY_S)
        leaders = replace(cluster, num_ranks=num_ranks // 8)
        rows = (
            ("as it is", cluster, model, direct),
            ("bfloat16 on the wire", cluster, model, half),
            ("4 times as many rows per rank", cluster, larger, direct),
            ("local SGD, an average every 8 steps", cluster, local, direct),
            (f"8 ranks on each of {num_ranks // 8} hosts", packed, model, direct),
            ("and one of each host exchanges for all 8", leaders, model, direct),
        )
        for name, hosts, workload, way in rows:
            outcome = train(costs, hosts, workload, way, network, fixed_s)
            found.append((model.name, name, outcome.efficiency))
            if name == "as it is":
                found.append((model.name, OVERLAPPED, overlapped(model, outcome)))
    return found


def overlapped(model: Workload, outcome: Outcome) -> float:
    """The efficiency if the exchange of gradients, half of all, were hidden by their computing."""
    hidden_s = min(outcome.steps.exchange_s / 2, model.compute_s)
    return model.compute_s / (outcome.steps.step_s + outcome.commit_s - hidden_s)


def check_table(found: list[dict[str, Any]]) -> str:
    """A Markdown table of the check."""
    lines = [
        "| | weights | N | measured ms | simulated ms | error | error of costs from N ≤ 4 |",
        "|---" * 7 + "|",
    ]
    for one in found:
        held_out = one["held_out_error"]
        lines.append(
            f"| {one['kind']} | {one['weights'] / 1e6:.2f} M | {one['num_ranks']} | "
            f"{one['measured_s'] * 1e3:.2f} | {one['simulated_s'] * 1e3:.2f} | "
            f"{one['error']:+.0%} | {'–' if held_out is None else f'{held_out:+.0%}'} |"
        )
    errors = [abs(one["error"]) for one in found]
    beyond = sum(error > LIMIT for error in errors)
    lines += [
        "",
        f"Median error {statistics.median(errors):.0%}, largest {max(errors):.0%}; "
        f"{beyond} of {len(errors)} points are further off than {LIMIT:.0%}.",
    ]
    return "\n".join(lines)


def outcome_table(found: list[Outcome]) -> str:
    """A Markdown table: efficiency of every variant against N."""
    names = list(dict.fromkeys(one.variant for one in found))
    ranks = sorted({one.num_ranks for one in found})
    lines = [
        "| model | network | N | step ms | waiting ms | exchange ms | sum, update ms | "
        "in one queue MB | " + " | ".join(names) + " |",
        "|---" * (8 + len(names)) + "|",
    ]
    for model in dict.fromkeys(one.model for one in found):
        for network in NETWORKS:
            for num_ranks in ranks:
                own = [
                    one
                    for one in found
                    if (one.model, one.network, one.num_ranks) == (model, network, num_ranks)
                ]
                steps = own[0].steps
                lines.append(
                    f"| {model} | {network} | {num_ranks} | {steps.step_s * 1e3:.0f} | "
                    f"{steps.wait_s * 1e3:.0f} | {steps.exchange_s * 1e3:.0f} | "
                    f"{steps.besides_s * 1e3:.0f} | "
                    f"{steps.queue_bytes / 1e6:.0f} | "
                    + " | ".join(f"{one.efficiency:.2f}" for one in own)
                    + " |"
                )
    return "\n".join(lines)


def remedy_table(found: list[tuple[str, str, float]]) -> str:
    """A Markdown table: efficiency of every remedy."""
    models = [model.name for model in MODELS]
    lines = ["| | " + " | ".join(models) + " |", "|---" * (1 + len(models)) + "|"]
    for name in dict.fromkeys(name for _, name, _ in found):
        own = [f"{value:.2f}" for _, other, value in found if other == name]
        lines.append(f"| {name} | " + " | ".join(own) + " |")
    return "\n".join(lines)


def plot_efficiency(found: list[Outcome], ways: tuple[Variant, ...], path: Path) -> None:
    """Efficiency against N, a panel for each model and network."""
    figure, panels = _panels((11, 7.6))
    for (model, network), axis in panels.items():
        ends = {}
        for way in ways:
            own = _of(found, model, network, way.name)
            ranks, values = [one.num_ranks for one in own], [one.efficiency for one in own]
            axis.plot(ranks, values, "o-", color=way.color, lw=1.8, ms=4)
            ends[way.name] = (values[-1], way.color)
        _label_ends(axis, ranks[-1], ends, gap=0.055)
        axis.set(ylim=(0, 1.02), ylabel="scaling efficiency")
        axis.set_title(f"{model}, {network}", fontsize=10)
    _rank_axes(panels, ranks)
    figure.suptitle("Simulated: rows per second and rank, against a rank that needs no others")
    figure.savefig(path, dpi=150)


def plot_steps(found: list[Outcome], way: Variant, path: Path) -> None:
    """Where a step's time goes against N, a panel for each model and network."""
    figure, panels = _panels((11, 7.0))
    for (model, network), axis in panels.items():
        own = _of(found, model, network, way.name)
        places, bottom = np.arange(len(own)), np.zeros(len(own))
        parts = {
            "compute": ([one.steps.compute_s for one in own], "tab:blue"),
            "wait for the slowest": ([one.steps.wait_s for one in own], "tab:orange"),
            "exchange": ([one.steps.exchange_s for one in own], "tab:red"),
            "sum, update": ([one.steps.besides_s for one in own], "tab:purple"),
            "commits": ([one.commit_s for one in own], "tab:gray"),
        }
        ends = {}
        for name, (values, color) in parts.items():
            heights = np.array(values) * 1e3
            axis.bar(places, heights, bottom=bottom, color=color, width=0.72)
            ends[name] = (float((bottom + heights / 2)[-1]), color)
            bottom += heights
        axis.set(ylabel="ms per step", ylim=(0, bottom.max() * 1.08))
        axis.set_xticks(places, [str(one.num_ranks) for one in own])
        axis.set_xlabel("hosts, one rank each")
        axis.set_xlim(-0.6, len(own) + 1.5)
        _label_ends(axis, len(own) - 0.65, ends, gap=bottom.max() * 0.06)
        axis.set_title(f"{model}, {network}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Simulated: where a step's time goes ({way.name}, {way.wire.name})")
    figure.savefig(path, dpi=150)


def _panels(size: tuple[float, float]) -> tuple[Any, dict[tuple[str, str], Any]]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(NETWORKS), len(MODELS), figsize=size, layout="constrained")
    return figure, {
        (model.name, network): axes[row][column]
        for row, network in enumerate(NETWORKS)
        for column, model in enumerate(MODELS)
    }


def _rank_axes(panels: dict[tuple[str, str], Any], ranks: list[int]) -> None:
    for axis in panels.values():
        axis.set_xscale("log", base=2)
        axis.set_xticks(ranks, [str(n) for n in ranks])
        axis.set_xlim(ranks[0] * 0.85, ranks[-1] * 9)
        axis.set_xlabel("hosts, one rank each")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)


def _label_ends(axis: Any, x: float, ends: dict[str, tuple[float, str]], gap: float) -> None:
    """Names beside the ends of lines, at least `gap` apart."""
    height = -np.inf
    for name, (value, color) in sorted(ends.items(), key=lambda item: item[1][0]):
        height = max(value, height + gap)
        axis.annotate(
            name,
            (x, height),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=8,
        )


def _of(found: list[Outcome], model: str, network: str, variant: str) -> list[Outcome]:
    return [
        one for one in found if (one.model, one.network, one.variant) == (model, network, variant)
    ]


def main() -> None:
    """Checks, simulates, and writes JSON, pictures and the tables of the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=Path, default=ROOT / "benchmarks/results/scaling.json")
    parser.add_argument("--overlap", type=Path, default=ROOT / "benchmarks/results/overlap.json")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/scaling.md")
    options = parser.parse_args()
    content = json.loads(options.points.read_text())
    checked = check(content)
    print(check_table(checked))
    costs, ways = cluster_costs(content), variants(content["cast_s"])
    fixed_s = max(one["round_fixed_s"] for one in content["steps"] if one["num_ranks"] <= 2)
    found = []
    for model in MODELS:
        for network, link in NETWORKS.items():
            for num_ranks in options.ranks:
                cluster = Cluster(num_ranks, 1, CORES_PER_RANK, link, LATENCY_S)
                found += [train(costs, cluster, model, way, network, fixed_s) for way in ways]
    helped = remedies(costs, options.ranks[-1], ways, fixed_s)
    tables = {
        **content["tables"],
        "overlap": json.loads(options.overlap.read_text())["table"],
        "check": check_table(checked),
        "simulated": outcome_table(found),
        "remedies": remedy_table(helped),
    }
    print(tables["simulated"], tables["remedies"], sep="\n\n")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "simulation.json").write_text(
        json.dumps(
            {"check": checked, "costs": asdict(costs), "outcomes": [asdict(one) for one in found]},
            indent=1,
        )
        + "\n"
    )
    images = options.page.parent / "images"
    images.mkdir(exist_ok=True)
    plot_efficiency(found, ways, images / "scaling-efficiency.png")
    plot_steps(found, ways[0], images / "scaling-step-time.png")
    template = (ROOT / "benchmarks/scaling_page.md").read_text(encoding="utf-8")
    options.page.write_text(fill(template, tables), "utf-8")
    if any(abs(one["error"]) > LIMIT for one in checked):
        raise SystemExit(f"Simulated points must be within {LIMIT:.0%} of the measured ones.")


if __name__ == "__main__":
    main()
