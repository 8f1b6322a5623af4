"""What the comparison found, as a table and a picture.

A *unit* is one measurement of a side with the limit (plain TensorFlow) measured before and after
it, as `compare.py` writes them. Machines drift and have moods, so a side's ratio is its rows per
second over the mean of the two limits beside it, and a figure is the median over units.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = "tf.function"
PHASES = ("data", "gradient", "update", "exchange")
_OWN = "tfspark"
_NAMES_ERROR = re.compile(r"[\w.]*(Error|Exception)\b")


@dataclass(frozen=True)
class Row:
    """A side on one workload and batch; medians over its units, None where it does not say.

    Attributes:
        side: its name.
        units: how many were measured.
        rows_per_second: steady.
        ratio: to the limit.
        spread: least and greatest ratio.
        first_step_s: from the start of the process to the end of the first step.
        memory_mb: peaks of `driver`, `worker` and `all`, see `processes.Family`.
        wire_mb: sent over the loopback device in a step.
        own_wire_mb: what a rank sends in a step by the layout of the weights.
        phases: shares of a step, adding up to 1.
        equal_weights: see `sides/protocol.answer`.
        problem: why there are no figures.
    """

    side: str
    units: int = 0
    rows_per_second: float | None = None
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    first_step_s: float | None = None
    memory_mb: Mapping[str, float] | None = None
    wire_mb: float | None = None
    own_wire_mb: float | None = None
    phases: Mapping[str, float] | None = None
    equal_weights: str | None = None
    problem: str | None = None


def ratio(unit: Mapping[str, Any]) -> float:
    """A unit's rows per second over the mean of the limits around it."""
    limits = [limit["answer"]["rows_per_second"] for limit in unit["limits"]]
    return unit["answer"]["rows_per_second"] / statistics.mean(limits)


def cells(units: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    """Units by workload and batch: workloads in the order of their first units, then batches."""
    found: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for unit in units:
        found.setdefault((unit["workload"], unit["batch"]), []).append(unit)
    workloads = list(dict.fromkeys(workload for workload, _ in found))
    return {key: found[key] for key in sorted(found, key=lambda k: (workloads.index(k[0]), k[1]))}


def rows(units: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One workload and batch: the limit first, then the sides, the fastest first."""
    sides: dict[str, list[Mapping[str, Any]]] = {}
    for unit in units:
        sides.setdefault(unit["side"], []).append(unit)
    limits = [limit for unit in units for limit in unit.get("limits", ())]
    found = []
    for side, measured in sides.items():
        good = [unit for unit in measured if unit["answer"]]
        if good:
            found.append(_row(side, good, [ratio(unit) for unit in good]))
        else:
            found.append(Row(side, problem=_word(measured[-1]["error"])))
    # A ratio that does not count is no place in the order.
    found.sort(key=lambda row: (row.equal_weights in (None, "no"), -(row.ratio or 0.0)))
    return [_row(LIMIT, limits, [1.0]), *found] if limits else found


def _row(side: str, good: Sequence[Mapping[str, Any]], ratios: Sequence[float]) -> Row:
    answers = [unit["answer"] for unit in good]
    memories = [unit["memory_mb"] for unit in good if unit["memory_mb"]]
    phases = [answer["phase_seconds"] for answer in answers if "phase_seconds" in answer]
    equal = {answer["equal_weights"] for answer in answers}
    wire = _median(answer.get("loopback_bytes_per_step") for answer in answers)
    own_wire = _median(answer.get("bytes_per_rank_and_step") for answer in answers)
    return Row(
        side,
        units=len(good),
        rows_per_second=_median(answer["rows_per_second"] for answer in answers),
        ratio=statistics.median(ratios),
        spread=(min(ratios), max(ratios)),
        first_step_s=_median(answer["seconds_to_first_step"] for answer in answers),
        memory_mb={
            name: statistics.median(memory[name] for memory in memories) for name in memories[0]
        }
        if memories
        else None,
        wire_mb=None if wire is None else wire / 1e6,
        own_wire_mb=None if own_wire is None else own_wire / 1e6,
        phases=_shares(phases),
        equal_weights="no" if "no" in equal else ", ".join(sorted(equal)),
    )


def _median(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None


def _shares(phases: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    if not phases:
        return None
    seconds = {name: statistics.median(found[name] for found in phases) for name in PHASES}
    return {name: value / sum(seconds.values()) for name, value in seconds.items()}


def _word(error: str) -> str:
    """The line of an output that names the error, or its last, short enough for a table."""
    lines = error.strip().splitlines() or ["no word"]
    named = [line for line in lines if _NAMES_ERROR.match(line)]
    # What comes up while processes are ended is not the reason.
    last = lines[0] if lines[0].startswith("Ended after") else (named or lines)[-1]
    return last.strip()[:120].replace("|", "/")


def table(found: Sequence[Row]) -> str:
    """A Markdown table of one workload and batch."""
    lines = [
        "| side | rows/s | of the limit | least to most | data, gradient, update, exchange % | "
        "driver MB | worker MB | all MB | MB on the wire a step | first step s | one model |",
        "|---|" + "---:|" * 2 + "---|" * 2 + "---:|" * 5 + "---|",
    ]
    for row in found:
        name = f"**{row.side}**" if row.side.startswith(_OWN) else row.side
        if row.problem:
            lines.append(f"| {name} | {row.problem} |" + " |" * 9)
            continue
        assert row.rows_per_second is not None and row.ratio is not None and row.spread
        counts = row.equal_weights != "no"
        shares = row.phases and " ".join(f"{100 * row.phases[phase]:.0f}" for phase in PHASES)
        memory = row.memory_mb or {}
        wire = _number(row.wire_mb, ".2f")
        if row.own_wire_mb is not None:
            wire += f" ({row.own_wire_mb:.2f} a rank)"
        values = [
            f"{row.rows_per_second:,.0f}",
            f"{row.ratio:.2f}" if counts else f"({row.ratio:.2f})",
            "{:.2f}–{:.2f}".format(*row.spread) if row.spread[0] < row.spread[1] else "",
            shares or "",
            *(_number(memory.get(kind), ",.0f") for kind in ("driver", "worker", "all")),
            wire,
            _number(row.first_step_s, ".1f"),
            row.equal_weights or "",
        ]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None or value == 0 else format(value, form)


def page(content: Mapping[str, Any]) -> str:
    """All tables, with what they mean."""
    machine = ", ".join(f"{name} {value}" for name, value in content["machine"].items())
    parts = [
        f"{machine}.",
        "Ratios are to plain TensorFlow (`tf.function`) measured before and after each side: the "
        "median, and the least and the most where a side was measured several times. "
        "Memory is peak resident memory: of the driver with its JVMs, of the largest worker, and "
        "the largest sum of all processes at one time; what processes share counts once. In "
        "brackets: a ratio that does not count, because the workers ended with different weights.",
    ]
    for (workload, batch), units in cells(content["units"]).items():
        parts += [f"### {workload}, batch {batch}", table(rows(units))]
    return "\n\n".join(parts) + "\n"


def plot(content: Mapping[str, Any], path: Path) -> None:
    """Ratios to the limit as bars, one panel for each workload and batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {
        cell: [row for row in rows(units) if row.side != LIMIT]
        for cell, units in cells(content["units"]).items()
    }
    if not found:
        return
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    most = max(len(panel) for panel in found.values())
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(1.6 + 3.2 * columns, (0.26 * most + 0.9) * lines + 0.5),
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    for axis in grid.flat[len(found) :]:
        axis.set_visible(False)
    for axis, ((workload, batch), panel) in zip(grid.flat, found.items(), strict=False):
        _panel(axis, f"{workload}, batch {batch}", panel)
    if len({tuple(row.side for row in panel) for panel in found.values()}) == 1:
        for axis in grid[:, 1:].flat:
            axis.tick_params("y", labelleft=False)
    figure.suptitle("Rows per second, as a part of plain TensorFlow's (dashed) in the same minutes")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _panel(axis: Any, title: str, panel: Sequence[Row]) -> None:
    for place, row in enumerate(panel):
        if row.ratio is None or row.spread is None:
            axis.text(0.01, place, "does not run", va="center", fontsize=7, color="tab:gray")
            continue
        counts = row.equal_weights != "no"
        color = "tab:orange" if row.side.startswith(_OWN) else "tab:blue"
        low, high = row.spread
        axis.barh(
            place,
            row.ratio,
            color=color if counts else "lightgray",
            xerr=[[row.ratio - low], [high - row.ratio]] if row.units > 1 else None,
            error_kw={"elinewidth": 0.8, "ecolor": "black"},
        )
        text = f"{row.ratio:.2f}" if counts else f"{row.ratio:.2f}, not one model"
        # White, so that the line of the limit does not cross figures.
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axis.text(high + 0.02, place, text, va="center", fontsize=7, bbox=box)
    axis.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(panel)), [row.side for row in panel], fontsize=8)
    axis.set_ylim(len(panel) - 0.5, -0.5)
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params("x", labelsize=8, labelbottom=True)
