"""Where an embedded Spark keeps the states of ranks between rounds."""

from pathlib import Path

import keras
import numpy as np
import pytest

from tfspark import MaxIteration, TFDataset, TFOptimizer
from tfspark.errors import TrainingError
from tfspark.sync import wire

ELEMENTS = 300 * 301  # of the model below


def stored_bytes(sc):
    """What Spark holds of persisted RDDs, in memory and on disk."""
    found = sc._jsc.sc().getRDDStorageInfo()
    return sum(info.memSize() + info.diskSize() for info in found)


def files(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("engine", ["shuffle", "gang"])
def test_weights_lie_in_files_and_not_in_the_jvm(sc, engine):
    folder = Path(wire.scratch_folder(sc))
    files_before, bytes_before = files(folder), stored_bytes(sc)
    model = keras.Sequential([keras.Input((300,)), keras.layers.Dense(300)])
    x = np.ones((32, 300), "float32")
    training = TFOptimizer.from_keras(
        model, TFDataset.from_ndarrays((x, x), batch_size=8), loss="mse",
        optimizer=keras.optimizers.Adam(), engine=engine, num_ranks=2, progress=False,
    )  # fmt: skip
    training.optimize(MaxIteration(3))
    training.optimize(MaxIteration(5))
    (initial,) = [f for f in files(folder) - files_before if f.parts[-3].startswith("initial-")]
    commit = files(folder) - files_before - {initial} - set(folder.glob("*"))
    # One of the commits before has gone; the last has weights and two slots of every element.
    states = [path for path in commit if path.name == "state-commit"]
    size = sum(path.stat().st_size for path in states if path.parent.name.startswith("5-"))
    assert size == pytest.approx(3 * 4 * ELEMENTS, rel=0.02)
    assert {path.parent.name for path in states} <= {"3-0", "3-1", "5-0", "5-1"}
    assert stored_bytes(sc) - bytes_before < 20_000
    training.close()
    assert not {path for path in files(folder) - files_before if "commit" in path.name}
    assert not initial.exists()


def test_a_commit_that_was_deleted_is_told(sc):
    folder = Path(wire.scratch_folder(sc))
    before = files(folder)
    model = keras.Sequential([keras.Input((300,)), keras.layers.Dense(300)])
    x = np.ones((32, 300), "float32")
    training = TFOptimizer.from_keras(
        model, TFDataset.from_ndarrays((x, x), batch_size=8), loss="mse",
        optimizer=keras.optimizers.Adam(), engine="shuffle", num_ranks=2, progress=False,
    )  # fmt: skip
    training.optimize(MaxIteration(3))
    for path in files(folder) - before:
        if path.name == "state-commit":
            path.unlink()
    with pytest.raises(TrainingError, match="Keep other programs from deleting files there"):
        training.optimize(MaxIteration(5))
    training.close()
