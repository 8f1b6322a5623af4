"""Steps of the engine `gang` on Spark, timed, and the bytes and processor time that they take.

Bytes and processor time are differences between a long and a short training, so that what a
training costs once (stores, start, the way home of the weights) is in neither.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
from pyspark import BarrierTaskContext, SparkContext

from tfspark import MaxIteration, TFDataset, TFOptimizer, TrainSummary

PHASES = ("data", "gradient", "update", "exchange")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class GangSteps:
    """A step of `num_ranks` ranks.

    Attributes:
        num_ranks, weights: N and P.
        step_s: seconds, as rank 0 sees it; median.
        phase_s: of it by phase; data and gradient are the slowest rank's.
        cpu_s: seconds of one rank's processor.
        sent_bytes: of one rank, from the counters of the loopback device: headers are in it, and
            so is what other processes of the machine send meanwhile.
        round_fixed_s: seconds of a round that are not steps; median.
    """

    num_ranks: int
    weights: int
    step_s: float
    phase_s: dict[str, float]
    cpu_s: float
    sent_bytes: float
    round_fixed_s: float


def matrix(width: int) -> tuple[keras.Model, np.ndarray, np.ndarray]:
    """`width`² weights, each of them used once for a row: a model that computes next to nothing."""
    model = keras.Sequential(
        [keras.Input((width,)), keras.layers.Dense(width, use_bias=False)], name=f"matrix{width}"
    )
    model.compile(keras.optimizers.SGD(1e-4), "mse")
    rows = np.random.default_rng(0).normal(size=(64, width)).astype("float32")
    return model, rows, rows


def start_workers(context: SparkContext, count: int) -> None:
    """So many of Spark's Python workers with TensorFlow loaded.

    Ranks wait for each other for a limited time, in which on few cores not many can load it.
    """

    def load(rows: Iterable[int]) -> Iterator[str]:  # in here: workers cannot import this file
        import tensorflow

        yield f"{list(rows)} {tensorflow.__version__}"
        # All end at the same time, so that none is idle while others still load.
        BarrierTaskContext.get().barrier()

    context.parallelize(range(count), count).barrier().mapPartitions(load).count()


class Gang:
    """One model trained by so many ranks; goes on where it was."""

    def __init__(
        self, model: keras.Model, x: np.ndarray, y: np.ndarray, batch: int, num_ranks: int
    ):
        self._logs = tempfile.TemporaryDirectory()
        dataset = TFDataset.from_ndarrays((x, y), batch_size=batch)
        self._optimizer = TFOptimizer.from_keras(
            model, dataset, engine="gang", num_ranks=num_ranks, progress=False
        )
        self._batch = batch
        self._summary = TrainSummary(self._logs.name, "gang")
        self._optimizer.set_train_summary(self._summary)
        self.num_ranks, self.weights = num_ranks, model.count_params()

    def measure(self, seconds: float) -> GangSteps:
        """Two trainings, of about `seconds` together."""
        self._train(2)
        step_s = self._train(4).sum(axis=1).mean()
        short = max(3, int(seconds / step_s / 5))
        before = _sent_bytes(), _workers_cpu_s()
        self._train(short)
        between = _sent_bytes(), _workers_cpu_s()
        phases = self._train(4 * short)
        after = _sent_bytes(), _workers_cpu_s()
        sent, cpu = (
            (c - b - (b - a)) / (3 * short) / self.num_ranks
            for a, b, c in zip(before, between, after, strict=True)
        )
        return GangSteps(
            self.num_ranks,
            self.weights,
            float(np.median(phases.sum(axis=1))),
            dict(zip(PHASES, np.median(phases, axis=0).tolist(), strict=True)),
            cpu,
            sent,
            self._round_fixed_s(phases),
        )

    def phases(self, num_steps: int) -> dict[str, float]:
        """Median seconds by phase of so many more steps."""
        return dict(zip(PHASES, np.median(self._train(num_steps), axis=0).tolist(), strict=True))

    def close(self) -> None:
        """Frees Spark's memory for the next model."""
        self._optimizer.close()
        self._logs.cleanup()

    def _train(self, num_steps: int) -> np.ndarray:
        """Seconds of the next steps, `[steps, phases]`."""
        self._optimizer.optimize(MaxIteration(self._optimizer.step + num_steps))
        return self._last([f"Phase/{phase}" for phase in PHASES], num_steps)

    def _last(self, tags: Sequence[str], count: int) -> np.ndarray:
        self._summary.flush()
        return np.stack([self._summary.read_scalar(tag)[-count:, 1] for tag in tags], axis=1)

    def _round_fixed_s(self, phases: np.ndarray) -> float:
        # All steps of a round have its rows per second: a run of equal values is a round.
        rate = self._last(["Throughput"], len(phases))[:, 0]
        rounds = np.split(np.arange(len(rate)), np.flatnonzero(np.diff(rate)) + 1)
        lasting = [len(own) * self._batch / rate[own[0]] for own in rounds]
        in_steps = [phases[own].sum() for own in rounds]
        return float(np.median(np.subtract(lasting, in_steps)))


def _sent_bytes() -> int:
    """Through the loopback device, of all processes."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise RuntimeError("Linux lists its loopback device as lo in /proc/net/dev.")


def _workers_cpu_s() -> float:
    """Processor seconds of all Python processes below this one: Spark's workers."""
    parent, name, cpu = {}, {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue  # it has ended
        # The name stands in brackets and may hold any character.
        head, _, tail = text.rpartition(")")
        fields = tail.split()
        number = int(path.parent.name)
        parent[number], name[number] = int(fields[1]), head.partition("(")[2]
        cpu[number] = (int(fields[11]) + int(fields[12])) / _TICKS
    total = 0.0
    for number in cpu:
        above = parent[number]
        while above in parent and above != os.getpid():
            above = parent[above]
        if above == os.getpid() and name[number].startswith("python"):
            total += cpu[number]
    return total
