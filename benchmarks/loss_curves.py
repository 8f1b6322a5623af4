"""How large batches, local steps and a rounded wire change the curve of a training, on real digits.

A small convolutional network on MNIST's digits (9,000 to train on, 1,000 to test), engine `gang`,
four ranks. Every curve starts from the same weights and sees the same rows in the same order.

    python benchmarks/loss_curves.py  # some ten minutes; writes docs/images and results/
    python benchmarks/loss_curves.py --epochs 2 --out /tmp/quick
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
from mnist import load_mnist

from tfspark import (
    LARS,
    SGD,
    EveryEpoch,
    Lamb,
    LinearScaling,
    MaxEpoch,
    TFDataset,
    TFOptimizer,
    TrainSummary,
    ValidationSummary,
    init_nncontext,
)

HERE = Path(__file__).parent
RANKS = 4
# What a batch of 64 rows learns well with, and 16 times that rate can still be borne.
BASE_RATE, BASE_BATCH = 0.005, 64


@dataclass(frozen=True)
class Curve:
    """One training.

    Attributes:
        panel, label: where it is drawn, and as what.
        batch: rows of a global batch.
        optimizer: makes it.
        settings: of `TFOptimizer`.
    """

    panel: str
    label: str
    batch: int
    optimizer: Callable[[], Any]
    settings: dict[str, Any] = field(default_factory=dict)


def sgd(rate: Any = BASE_RATE) -> Any:
    """The rule of all curves but two."""
    return SGD(rate, momentum=0.9)


LARGE, LOCAL, WIRE = "large batches", "local steps (batch 256)", "rounded wire (batch 64)"
CURVES = (
    Curve(LARGE, "64, SGD", 64, sgd),
    Curve(LARGE, "1024, SGD, the same rate", 1024, sgd),
    Curve(
        LARGE,
        "1024, SGD, linear scaling",
        1024,
        lambda: sgd(LinearScaling(BASE_RATE, BASE_BATCH, 2)),
    ),
    # Biases take the rate as it is, so it is that of SGD, and the ratio of kernels is made for it.
    Curve(
        LARGE,
        "1024, LARS",
        1024,
        lambda: LARS(LinearScaling(BASE_RATE, BASE_BATCH, 2), trust_coefficient=0.2),
    ),
    Curve(
        LARGE,
        "1024, LAMB",
        1024,
        lambda: Lamb(LinearScaling(5e-3, BASE_BATCH, warmup_epochs=2, power=0.5)),
    ),
    *(
        Curve(
            LOCAL,
            "every step" if every == 1 else f"every {every} steps",
            256,
            lambda: sgd(0.05),
            {"average_every": every},
        )
        for every in (1, 4, 16)
    ),
    *(
        Curve(WIRE, dtype or "float32", 64, lambda: sgd(0.02), {"wire_dtype": dtype})
        for dtype in (None, "bfloat16", "float16")
    ),
)


def network() -> keras.Model:
    """61,000 weights, the same initial ones every time."""
    keras.utils.set_random_seed(3)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(8, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(16, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10),
        ]
    )


def train(curve: Curve, epochs: int, data: Any) -> dict[str, Any]:
    """The losses of all steps, and the accuracy on the test rows after every epoch."""
    (images, labels), test = data
    dataset = TFDataset.from_ndarrays((images, labels), batch_size=curve.batch, val_tensors=test)
    optimizer = TFOptimizer.from_keras(
        network(),
        dataset,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        optimizer=curve.optimizer(),
        engine="gang",
        num_ranks=RANKS,
        progress=False,
        **curve.settings,
    )
    with tempfile.TemporaryDirectory() as folder:
        train_summary, test_summary = TrainSummary(folder, "c"), ValidationSummary(folder, "c")
        optimizer.set_train_summary(train_summary).set_val_summary(test_summary)
        optimizer.optimize(MaxEpoch(epochs), validation_trigger=EveryEpoch())
        losses = train_summary.read_scalar("Loss")[:, 1]
        accuracy = test_summary.read_scalar("accuracy")[:, 1]
    optimizer.close()
    return {
        "panel": curve.panel,
        "label": curve.label,
        "rows_per_step": curve.batch,
        "losses": losses.tolist(),
        "accuracy": accuracy.tolist(),
    }


def plot(found: list[dict[str, Any]], rows: int, path: Path) -> None:
    """Training loss above, test accuracy below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys(each["panel"] for each in found))
    figure, axes = plt.subplots(2, len(panels), figsize=(13, 7), layout="constrained")
    for column, panel in enumerate(panels):
        top, bottom = axes[:, column]
        for each in (each for each in found if each["panel"] == panel):
            losses = np.array(each["losses"])
            epochs = np.arange(1, len(losses) + 1) * each["rows_per_step"] / rows
            # A mean over half an epoch, or the curve of small batches hides all others.
            width = max(1, rows // each["rows_per_step"] // 2)
            smooth = np.convolve(losses, np.ones(width) / width, "valid")
            top.plot(epochs[width - 1 :], smooth, label=each["label"])
            accuracy = np.array(each["accuracy"])
            places = np.arange(1, len(accuracy) + 1)
            bottom.plot(places, 100 * accuracy, marker=".", label=each["label"])
        top.set(title=panel, yscale="log", xlabel="epochs", ylabel="training loss")
        bottom.legend(loc="lower right", fontsize=8)  # curves above leave no room
        bottom.set(xlabel="epochs", ylabel="test accuracy, %", ylim=(80, 100))
        for axis in (top, bottom):
            axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def table(found: list[dict[str, Any]]) -> str:
    """What each training reached, as Markdown."""
    lines = ["| | training | loss of the last epoch | test accuracy |", "|---|---|---|---|"]
    for each in found:
        last = max(1, len(each["losses"]) // len(each["accuracy"]))
        loss = float(np.mean(each["losses"][-last:]))
        accuracy = 100 * each["accuracy"][-1]
        lines.append(f"| {each['panel']} | {each['label']} | {loss:.4f} | {accuracy:.1f} % |")
    return "\n".join(lines)


def main() -> None:
    """Trains, prints a table, writes JSON, Markdown and PNG."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, help="one folder for all that is written")
    options = parser.parse_args()
    results = options.out or HERE / "results"
    images = options.out or HERE.parent / "docs" / "images"
    for folder in (results, images):
        folder.mkdir(parents=True, exist_ok=True)
    init_nncontext("loss curves", master=f"local[{RANKS}]")
    data, found = load_mnist(), []
    for curve in CURVES:
        found.append(train(curve, options.epochs, data))
        print(table(found).splitlines()[-1], flush=True)
    (results / "loss_curves.json").write_text(json.dumps(found) + "\n")
    (results / "loss_curves.md").write_text(table(found) + "\n")
    plot(found, len(data[0][1]), images / "loss_curves.png")


if __name__ == "__main__":
    main()
