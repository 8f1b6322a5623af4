"""What the tasks of engines on Spark share, on the side of the worker.

A worker keeps programs and readers between tasks, and must be able to lose them at any time.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from tfspark.data.batches import BatchReader
from tfspark.data.store import Handle
from tfspark.errors import TrainingError
from tfspark.graphdef.loader import configure_threads
from tfspark.sync.carriers import message_of, shard_frame
from tfspark.sync.engine import Run
from tfspark.sync.frames import Message
from tfspark.sync.rank import RankProgram, rank_program

_frozen_modules = 0  # of this worker
_READERS: dict[tuple[str, Handle], BatchReader] = {}


# Of mallopt(3), and what they are by default.
_M_TRIM_THRESHOLD, _TRIM_THRESHOLD = -1, 128 * 1024
_M_MMAP_MAX, _MMAP_MAX = -4, 65536
_LARGEST_INT = 2**31 - 1
_OF_USERS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


@contextmanager
def memory_kept() -> Iterator[None]:
    """Has malloc reuse the memory of large arrays, in this process, until the block ends.

    Otherwise it gives arrays above 32 MiB back to the system as they are freed. A step of a large
    model makes and frees the same ones every time, and the system clears every page of them anew.
    Where the user has told malloc what to do with them (mallopt(3)), this does nothing.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    glibc = hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")  # musl has none
    if not glibc or any(name in os.environ for name in _OF_USERS):
        yield
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_MAX, _MMAP_MAX)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
        # A worker that is idle, or has other tasks, must not hold what a round needed.
        libc.malloc_trim(0)


def program_of(run: Run) -> RankProgram:
    """The programs of a run in this worker, loaded by its first task."""
    configure_threads(run.task_threads, hands_over=run.exchanges_early)
    _freeze_modules()
    return rank_program(run)


def _freeze_modules() -> None:
    """Takes what this worker has imported since the last time out of the garbage collection.

    PySpark's daemon collects garbage after every task. With TensorFlow imported that took 200 ms,
    several times as long as the rest of the task; frozen objects are not looked at.

    Nothing is unfrozen again, not even for a new run: what was frozen before the fork lies in pages
    that are shared until somebody looks (see daemon.py). So programs are loaded afterwards, or they
    would stay for good; those of MobileNetV2 are 20,000 objects, and looked at in 3 ms. Programs of
    an earlier run, if this worker still has them when modules are new, do stay: as often as modules
    come, which ends.
    """
    global _frozen_modules
    if len(sys.modules) > _frozen_modules:
        gc.collect()
        gc.freeze()
        _frozen_modules = len(sys.modules)


def reader_of(run: Run, handle: Handle) -> BatchReader:
    """The reader of a store in this worker.

    Raises:
        TrainingError: the store holds other rows than when training started.
    """
    key = (run.run_id, handle)
    if key not in _READERS:
        if run.digests and handle.digest != run.digests[handle.rank]:
            raise TrainingError(
                "A data set must give the same rows in the same order each time it is computed. "
                "Received: other rows, when a lost store was rebuilt. Persist or checkpoint the "
                "RDD or DataFrame that it is made of, or sort it."
            )
        while len(_READERS) >= 8:
            _READERS.pop(next(iter(_READERS)))
        _READERS[key] = BatchReader(handle, run.order, run.mapping)
    return _READERS[key]


def handle_first(pairs: Iterable[tuple[bytes, bytes]]) -> tuple[Handle, Iterator[bytes]]:
    """The handle of this partition, and the frames of all ranks, which may still be coming."""
    remaining = iter(pairs)
    handle_frame, frame = next(remaining)
    return pickle.loads(handle_frame), chain([frame], (frame for _, frame in remaining))


def by_source(frames: Iterable[bytes]) -> list[Message]:
    """Messages by rank."""
    return sorted(map(message_of, frames), key=lambda message: message.source)


@dataclass(frozen=True)
class Scatter:
    """A task that sends the shard of a rank's part of a commit to every rank."""

    num_targets: int

    def __call__(self, rank: int, frames: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
        (frame,) = frames
        shard = shard_frame(frame)
        for target in range(self.num_targets):
            yield target, shard
