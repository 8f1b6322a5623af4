"""What it gains to exchange a gradient in buckets while it is computed, on a link of a given rate.

Two ranks of `gang` as plain processes, without Spark, linked over loopback. The kernel paces what
their connections send (`SO_MAX_PACING_RATE` of Linux) to the rate of a network; ranks share no
memory, as on two hosts. All numbers of buckets are measured in turns, by the same processes.

    python benchmarks/overlap.py  # a quarter of an hour; benchmarks/results/overlap.json
    python benchmarks/overlap.py --workloads lenet:128 --gigabits 1 --out /tmp/quick
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bare_exchange import on_ranks
from workloads import LEARNING_RATE, WORKLOADS

HERE = Path(__file__).parent
RANKS = 2
BUCKETS = (1, 2, 4, 8)
CELLS = ("lenet:128", "mobilenet:128", "dense:1024")

_PACING = 47  # SO_MAX_PACING_RATE of Linux's asm-generic/socket.h; bytes per second
_PATIENCE_S = 600.0


@dataclass(frozen=True)
class Point:
    """Steps of one model with one number of buckets; medians over all blocks.

    Attributes:
        workload, batch: what is trained, and rows of a global batch.
        gigabits: of the link each way, a second; None: as fast as loopback is.
        asked, buckets: the most buckets there may be, and how many there are.
        step_s, gradient_s, exchange_s: of a step; what is exchanged early is in `gradient_s`.
        ratio: of the time of a step with one bucket to this one's, within a block; the median.
    """

    workload: str
    batch: int
    gigabits: float | None
    asked: int
    buckets: int
    step_s: float
    gradient_s: float
    exchange_s: float
    ratio: float


def measure(
    workload: str, batch: int, gigabits: float | None, blocks: int, seconds: float
) -> list[Point]:
    """All numbers of buckets in turns, in `blocks` blocks of about `seconds` each."""
    with tempfile.TemporaryDirectory() as folder:
        runs, flat, handles = _prepare(workload, batch, folder)
        by_rank = on_ranks(RANKS, _train, runs, flat, handles, gigabits, blocks, seconds)
    found = np.max(by_rank, axis=0)  # [blocks, buckets, (step, gradient, exchange)]
    return [
        Point(
            workload,
            batch,
            gigabits,
            asked,
            len(runs[index].layout.buckets),
            *np.median(found[:, index], axis=0).tolist(),
            ratio=statistics.median(found[:, 0, 0] / found[:, index, 0]),
        )
        for index, asked in enumerate(BUCKETS)
    ]


def _prepare(workload: str, batch: int, folder: str) -> tuple[list[Any], np.ndarray, list[Any]]:
    """A run for each number of buckets, the initial weights, and the handle of each rank's rows."""
    import keras

    from tfspark.data.order import BatchOrder
    from tfspark.data.spec import Field, RowSpec
    from tfspark.data.store import StoreWriter
    from tfspark.graph.clipping import Clipping
    from tfspark.graph.from_keras import program_from_keras
    from tfspark.graph.update import update_program
    from tfspark.sync.engine import Run

    features, labels = WORKLOADS[workload].rows(2 * batch)
    columns = [*features, labels]
    fields = [
        Field(f"column{index}", column.dtype.name, column.shape[1:])
        for index, column in enumerate(columns)
    ]
    inputs = fields[0] if len(features) == 1 else tuple(fields[:-1])
    spec = RowSpec.of((inputs, fields[-1]))
    handles = []
    for rank in range(RANKS):
        with StoreWriter(f"{folder}/rank-{rank}.arrow", spec, rank=rank) as writer:
            writer.append_columns(tuple(column[rank::RANKS] for column in columns))
        handles.append(writer.handle)
    bound = program_from_keras(
        WORKLOADS[workload].model(keras),
        spec,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    order = BatchOrder(tuple(handle.rows for handle in handles), batch, seed=1, shuffle=True)
    runs = [
        Run(
            run_id=f"buckets-{buckets}",
            program=bound.program,
            updates=(update_program(keras.optimizers.Adam(LEARNING_RATE)),),
            clippings=(Clipping(),),
            order=order,
            mapping=None,
            seed=0,
            state=bound.state,
            num_ranks=RANKS,
            gradient_buckets=buckets,
        )
        for buckets in BUCKETS
    ]
    return runs, bound.flat, handles


def _train(
    rank: int,
    sockets: Mapping[int, socket.socket],
    runs: list[Any],
    flat: np.ndarray,
    handles: list[Any],
    gigabits: float | None,
    blocks: int,
    seconds: float,
) -> list[list[tuple[float, float, float]]]:
    """Seconds of (step, gradient, exchange) by block and run."""
    from tfspark.graphdef.loader import configure_threads

    configure_threads(1, hands_over=True)

    from tfspark.data.batches import BatchReader
    from tfspark.sync.collectives import all_gather_small
    from tfspark.sync.engine import RankState, RoundPlan
    from tfspark.sync.gang import rank_class
    from tfspark.sync.gang_rank import Patience
    from tfspark.sync.links import Links
    from tfspark.sync.rank import RankProgram
    from tfspark.sync.tasks import memory_kept

    if gigabits is not None:
        for connection in sockets.values():
            connection.setsockopt(socket.SOL_SOCKET, _PACING, int(gigabits * 1e9 / 8))

    with Links(rank, sockets) as links, memory_kept():
        programs = [RankProgram(run) for run in runs]
        readers = [BatchReader(handles[rank], run.order) for run in runs]
        states = [RankState.initial(run, flat, rank) for run in runs]

        def steps(index: int, count: int) -> tuple[float, float, float]:
            run, state = runs[index], states[index].settled()
            gang = rank_class(run)(programs[index], readers[index], links, Patience())
            plan = RoundPlan(state.step, ((LEARNING_RATE,),) * count)
            started = time.perf_counter()
            states[index] = state = gang.take_steps(state, plan)
            took = (time.perf_counter() - started) / count
            phases = [
                statistics.median(record.seconds[phase] for record in state.records)
                for phase in ("gradient", "exchange")
            ]
            return took, phases[0], phases[1]

        for index in range(len(runs)):
            steps(index, 2)  # compiles
        own_s = max(steps(index, 3)[0] for index in range(len(runs)))
        at = {"phase": "count", "step": 0, "timeout_s": _PATIENCE_S}
        count = max(3, int(seconds / max(all_gather_small(links, own_s, **at))))
        return [[steps(index, count) for index in range(len(runs))] for _ in range(blocks)]


def table(points: list[Point]) -> str:
    """Markdown: a row for every model and link, the time of a step for every number of buckets."""
    lines = [
        "| model, batch | link | "
        + " | ".join(f"up to {n} buckets" if n > 1 else "1 bucket, ms" for n in BUCKETS)
        + " |",
        "|---" * (2 + len(BUCKETS)) + "|",
    ]
    cells: dict[tuple[str, int, float | None], list[Point]] = {}
    for point in points:
        cells.setdefault((point.workload, point.batch, point.gigabits), []).append(point)
    for (workload, batch, gigabits), row in cells.items():
        link = f"{gigabits:g} Gbit/s" if gigabits else "loopback"
        texts = [f"{row[0].step_s * 1e3:.0f}"] + [
            f"× {point.ratio:.2f} ({point.buckets})" for point in row[1:]
        ]
        lines.append(f"| {workload}, {batch} | {link} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", default=CELLS, metavar="NAME:BATCH")
    parser.add_argument("--gigabits", nargs="+", type=float, default=[1.0, 5.0, 0.0])
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    points: list[Point] = []
    for cell in options.workloads:
        workload, batch = cell.split(":")
        for gigabits in options.gigabits:
            points += measure(
                workload, int(batch), gigabits or None, options.blocks, options.seconds
            )
            print(table(points).splitlines()[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"points": [asdict(point) for point in points], "table": table(points)}
    (options.out / "overlap.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
