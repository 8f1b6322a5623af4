"""Rows per second of DataFrame prediction, against plain Keras and Spark's `predict_batch_udf`.

The limit is `model.predict` in one process of all cores, with the rows in memory as an array.
tfspark and `predict_batch_udf` predict a cached DataFrame in an embedded Spark with a task of one
thread for each core. All three take turns, after a run that does not count; medians are compared.

    python benchmarks/prediction.py                        # ten minutes; writes docs/prediction.md
    python benchmarks/prediction.py --models medium --repeats 3 --out /tmp/prediction
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pages import fill

HERE = Path(__file__).resolve().parent
CORES = os.cpu_count() or 1
LIMIT = "model.predict"
THREADS = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
SIDES = (LIMIT, "tfspark", "predict_batch_udf")


@dataclass(frozen=True)
class Workload:
    """A model and rows for it.

    Attributes:
        name: of the model.
        shape: of a row.
        rows: how many.
        batch_size: rows of one call.
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    batch_size: int

    def model(self) -> Any:
        """The model, with random weights."""
        import keras

        layers = keras.layers
        keras.utils.set_random_seed(0)
        if self.name == "tiny":
            return keras.Sequential(
                [keras.Input(self.shape), layers.Dense(16, "relu"), layers.Dense(3, "softmax")]
            )
        if self.name == "medium":
            return keras.Sequential(
                [
                    keras.Input(self.shape),
                    layers.Conv2D(32, 3, activation="relu"),
                    layers.MaxPooling2D(),
                    layers.Conv2D(64, 3, activation="relu"),
                    layers.MaxPooling2D(),
                    layers.Flatten(),
                    layers.Dense(128, "relu"),
                    layers.Dense(10, "softmax"),
                ]
            )
        return keras.applications.MobileNetV2(self.shape, weights=None, classes=10)

    def data(self) -> np.ndarray:
        """The rows."""
        return np.random.default_rng(0).normal(size=(self.rows, *self.shape)).astype(np.float32)


WORKLOADS = {
    "tiny": Workload("tiny", (10,), 400_000, 1024),
    "medium": Workload("medium", (28, 28, 1), 12_000, 256),
    "large": Workload("large", (96, 96, 3), 768, 64),
}


@dataclass
class Result:
    """What was measured of one model.

    Attributes:
        name, weights, rows, batch_size: of the workload.
        seconds: of each side, one per repeat.
    """

    name: str
    weights: int
    rows: int
    batch_size: int
    seconds: dict[str, list[float]]

    def rate(self, side: str) -> float:
        """Rows per second: the median."""
        return self.rows / statistics.median(self.seconds[side])


def measure(spark: Any, workload: Workload, repeats: int) -> Result:
    """All sides in turns, on the same rows."""
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql import types as T

    from tfspark import register_model_udf

    model, data = workload.model(), workload.data()
    frame = _cached(spark, data)
    ours = register_model_udf(spark, "predicted", model, batch_size=workload.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.keras"
        model.save(path)
        # How many arrays a model returns is fixed by the kind of the column.
        theirs = predict_batch_udf(
            _maker(path),
            return_type=T.ArrayType(T.FloatType()),
            batch_size=workload.batch_size,
            input_tensor_shapes=[list(workload.shape)],
        )

        def written(column: Any) -> None:
            # All rows are computed, and nothing is kept.
            frame.select(column.alias("p")).write.format("noop").mode("overwrite").save()

        runs: dict[str, Callable[[], Any]] = {
            LIMIT: lambda: model.predict(data, batch_size=workload.batch_size, verbose=0),
            "tfspark": lambda: written(ours("x")),
            "predict_batch_udf": lambda: written(theirs("x")),
        }
        for function in (ours, theirs):
            rows = frame.limit(100).select("x", function("x").alias("p")).collect()
            x = np.array([row.x for row in rows], np.float32).reshape(-1, *workload.shape)
            expected = model.predict(x, verbose=0)
            np.testing.assert_allclose([row.p for row in rows], expected, rtol=1e-3, atol=1e-5)
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for repeat in range(repeats + 1):
            for side in SIDES:
                started = time.perf_counter()
                runs[side]()
                if repeat:  # the first one starts workers and compiles
                    seconds[side].append(time.perf_counter() - started)
            print(workload.name, repeat, {s: round(v[-1], 2) for s, v in seconds.items() if v})
    frame.unpersist()
    return Result(workload.name, model.count_params(), workload.rows, workload.batch_size, seconds)


def _cached(spark: Any, data: np.ndarray) -> Any:
    """The rows as a DataFrame in memory, one flat array of floats each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = data.reshape(len(data), -1)
    offsets = pa.array(np.arange(len(flat) + 1, dtype=np.int32) * flat.shape[1])
    table = pa.table({"x": pa.ListArray.from_arrays(offsets, pa.array(flat.reshape(-1)))})
    with tempfile.TemporaryDirectory() as folder:
        for part in range(CORES):
            low, high = (len(flat) * bound // CORES for bound in (part, part + 1))
            pq.write_table(table.slice(low, high - low), f"{folder}/{part}.parquet")
        frame = spark.read.parquet(*(f"{folder}/{part}.parquet" for part in range(CORES)))
        frame = frame.coalesce(CORES).cache()
        frame.count()
    return frame


def _maker(path: str) -> Callable[[], Callable[[np.ndarray], np.ndarray]]:
    """What `predict_batch_udf` calls once in every task's worker."""

    def make() -> Callable[[np.ndarray], np.ndarray]:
        import keras

        loaded = keras.models.load_model(path, compile=False)
        return lambda inputs: loaded.predict_on_batch(inputs)

    return make


def table(results: Sequence[Result]) -> str:
    """Rows per second, and as a part of the limit."""
    lines = [
        "| model | weights | rows of a call | " + " | ".join(f"{s}, rows/s" for s in SIDES) + " | "
        "tfspark / limit | predict_batch_udf / limit |",
        "|---|---:|---:|" + "---:|" * (len(SIDES) + 2),
    ]
    for each in results:
        rates = {side: each.rate(side) for side in SIDES}
        parts = [f"{rates[side]:,.0f}" for side in SIDES]
        ratios = [f"{rates[side] / rates[LIMIT]:.2f}" for side in SIDES[1:]]
        row = [each.name, f"{each.weights:,}", f"{each.batch_size:,}", *parts, *ratios]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def plot(results: Sequence[Result], path: Path) -> None:
    """Rows per second as parts of the limit."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3.5))
    width = 0.8 / len(SIDES)
    for number, side in enumerate(SIDES):
        places = [index + (number - 1) * width for index in range(len(results))]
        values = [each.rate(side) / each.rate(LIMIT) for each in results]
        bars = axis.bar(places, values, width * 0.95, label=side)
        axis.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=8)
    axis.axhline(1.0, color="grey", linewidth=0.6)
    axis.set_xticks(range(len(results)), [f"{each.name}\n{each.weights:,}" for each in results])
    axis.set_ylabel("rows per second / model.predict")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Measures, prints the table, writes JSON, picture and page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    from pyspark.sql import SparkSession

    from tfspark import init_nncontext

    # For the workers, which are started from here; this process uses all cores.
    os.environ |= dict.fromkeys(THREADS, "1")
    context = init_nncontext(
        {"spark.driver.memory": "4g", "spark.ui.enabled": False}, master=f"local[{CORES}]"
    )
    for name in THREADS:
        del os.environ[name]
    spark = SparkSession(context)
    results = [measure(spark, WORKLOADS[name], options.repeats) for name in options.models]
    context.stop()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "prediction.json").write_text(
        json.dumps([asdict(each) for each in results], indent=1)
    )
    text = f"cores {CORES}, processor {platform.processor() or platform.machine()}, python "
    text += f"{platform.python_version()}.\n\n{table(results)}"
    print(text)
    if options.out == HERE / "results":
        plot(results, HERE.parent / "docs/images/prediction.png")
        page = (HERE / "prediction_page.md").read_text(encoding="utf-8")
        target = HERE.parent / "docs/prediction.md"
        target.write_text(fill(page, {"table": text}), encoding="utf-8")
    else:
        plot(results, options.out / "prediction.png")


if __name__ == "__main__":
    main()
