"""Steps per second of tfspark's engines on Spark against plain Keras, in one run.

Dense networks of 10 thousand, 1 million and 10 million weights, Adam, one global batch size.
Blocks of steps alternate (Keras, shuffle, gang, Keras, …), so that a machine whose speed drifts
slows all alike; the figures are medians over blocks. Keras has all cores in one process; tfspark
has as many ranks as there are cores, one thread each.

    python benchmarks/step_time.py  # some six minutes; writes benchmarks/results/step_time.*
    python benchmarks/step_time.py --blocks 1 --seconds 2 --out /tmp/quick
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from tfspark import MaxIteration, TFDataset, TFOptimizer, TrainSummary, init_nncontext
from tfspark.slots import slots

WIDTHS = {"10 k": (32, 92, 68), "1 M": (64, 960, 960), "10 M": (256, 3020, 3020)}
CLASSES = 10
PHASES = ("data", "gradient", "update", "exchange")
ENGINES = ("shuffle", "gang")


@dataclass(frozen=True)
class Row:
    """One model's result with one engine; seconds are medians."""

    model: str
    weights: int
    engine: str
    keras_steps_per_second: float
    steps_per_second: float
    ratio: float
    phase_seconds: dict[str, float]


def network(inputs: int, *hidden: int) -> keras.Model:
    """A dense classifier."""
    layers = [keras.layers.Dense(width, "relu") for width in hidden]
    model = keras.Sequential([keras.Input((inputs,)), *layers, keras.layers.Dense(CLASSES)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss)
    return model


class KerasSide:
    """Plain Keras `fit` in this process."""

    def __init__(self, model: keras.Model, x: np.ndarray, y: np.ndarray, batch: int):
        data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x)).repeat().batch(batch)
        self._model, self._data = model, data.prefetch(tf.data.AUTOTUNE)

    def steps(self, count: int) -> float:
        """Seconds of so many steps."""
        started = time.perf_counter()
        self._model.fit(self._data, steps_per_epoch=count, epochs=1, verbose=0)
        return time.perf_counter() - started


class SparkSide:
    """tfspark with one engine; goes on where it was."""

    def __init__(
        self,
        engine: str,
        model: keras.Model,
        x: np.ndarray,
        y: np.ndarray,
        batch: int,
        log_dir: str,
    ):
        dataset = TFDataset.from_ndarrays((x, y), batch_size=batch)
        self._optimizer = TFOptimizer.from_keras(model, dataset, engine=engine, progress=False)
        self.summary = TrainSummary(log_dir, f"{model.count_params()}-{engine}")
        self._optimizer.set_train_summary(self.summary)

    def steps(self, count: int) -> float:
        """Seconds of so many steps, the way home of the weights left out."""
        before = self._optimizer.step
        self._optimizer.optimize(MaxIteration(before + count))
        # Rows per second of each step is written as the round's rows over its seconds.
        throughput = self.summary.read_scalar("Throughput")
        return float(np.sum(self._batch / throughput[-count:, 1]))

    @property
    def _batch(self) -> int:
        return self._optimizer.batch_size

    def phases(self, last: int) -> dict[str, float]:
        """Median seconds of each phase of the last steps."""
        return {
            phase: float(np.median(self.summary.read_scalar(f"Phase/{phase}")[-last:, 1]))
            for phase in PHASES
        }

    def close(self) -> None:
        """Frees Spark's memory for the next model."""
        self._optimizer.close()


def measure(name: str, options: argparse.Namespace) -> list[Row]:
    """One model, all sides in turn."""
    inputs, *hidden = WIDTHS[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(options.batch * 64, inputs)).astype("float32")
    y = rng.integers(0, CLASSES, len(x)).astype("int32")
    weights = network(inputs, *hidden).count_params()
    plain = KerasSide(network(inputs, *hidden), x, y, options.batch)
    with tempfile.TemporaryDirectory() as logs:
        engines = [
            SparkSide(engine, network(inputs, *hidden), x, y, options.batch, logs)
            for engine in ENGINES
        ]
        # Warm up, and find out how many steps fill a block.
        counts = []
        for side in (plain, *engines):
            side.steps(3)
            counts.append(max(2, int(options.seconds / (side.steps(6) / 6))))
        rates: list[list[float]] = [[] for _ in counts]
        for _ in range(options.blocks):
            for side, count, found in zip((plain, *engines), counts, rates, strict=True):
                found.append(count / side.steps(count))
        rows = [
            Row(
                name,
                weights,
                engine,
                statistics.median(rates[0]),
                statistics.median(found),
                statistics.median(s / k for k, s in zip(rates[0], found, strict=True)),
                side.phases(count * options.blocks),
            )
            for engine, side, count, found in zip(
                ENGINES, engines, counts[1:], rates[1:], strict=True
            )
        ]
        for side in engines:
            side.close()
    return rows


def table(rows: list[Row]) -> str:
    """A Markdown table."""
    lines = [
        "| weights | engine | Keras steps/s | steps/s | ratio | "
        + " | ".join(f"{phase} ms" for phase in PHASES)
        + " |",
        "|---" * (5 + len(PHASES)) + "|",
    ]
    for row in rows:
        phases = " | ".join(f"{row.phase_seconds[phase] * 1e3:.1f}" for phase in PHASES)
        lines.append(
            f"| {row.model} | `{row.engine}` | {row.keras_steps_per_second:.1f} | "
            f"{row.steps_per_second:.1f} | {row.ratio:.3f} | {phases} |"
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Where a step's time goes, next to a step of plain Keras."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(WIDTHS), figsize=(10, 4.2), layout="constrained")
    colors = dict(zip(PHASES, ("tab:green", "tab:blue", "tab:purple", "tab:gray"), strict=True))
    for axis, model in zip(axes, WIDTHS, strict=True):
        found = [row for row in rows if row.model == model]
        axis.bar(["Keras"], [1e3 / found[0].keras_steps_per_second], color="tab:orange")
        for row in found:
            bottom = 0.0
            for phase in PHASES:
                height = row.phase_seconds[phase] * 1e3
                label = phase if row is found[0] else None
                axis.bar([row.engine], [height], bottom=bottom, color=colors[phase], label=label)
                bottom += height
        ratios = ", ".join(f"{row.engine} {row.ratio:.2f}" for row in found)
        axis.set(title=f"{model} weights\nratio: {ratios}", ylabel="ms per step")
    # Below the panels: there is no room in them beside the bars.
    named = axes[0].get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=len(PHASES))
    figure.suptitle("A step of each engine on Spark against plain Keras, same batch")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures, prints a table, writes JSON, Markdown and PNG."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256, help="rows of a global batch")
    parser.add_argument("--blocks", type=int, default=5, help="blocks of each side")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a block")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    context = init_nncontext("step time", master="local[*]")
    machine = {
        "cores": slots(context),
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "spark": context.version,
        "batch": options.batch,
    }
    rows = [row for name in WIDTHS for row in measure(name, options)]
    text = table(rows)
    print(text)
    content = {"machine": machine, "rows": [asdict(row) for row in rows]}
    (options.out / "step_time.json").write_text(json.dumps(content, indent=1) + "\n")
    (options.out / "step_time.md").write_text(f"{machine}\n\n{text}\n")
    plot(rows, options.out / "step_time.png")


if __name__ == "__main__":
    main()
