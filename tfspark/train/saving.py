"""From a commit to a checkpoint and back: which array of a rank's state is called what."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from pyspark import Broadcast, SparkContext

import tfspark
from tfspark.errors import CheckpointError
from tfspark.graph.program import Program, StateSlot, UpdateProgram
from tfspark.sync.carriers import FileCarrier, message_of
from tfspark.sync.engine import Engine, RankState, Run
from tfspark.sync.frames import Message
from tfspark.sync.jobs import Jobs
from tfspark.train.checkpoint import Attempt, CheckpointStore
from tfspark.train.manifest import (
    GroupEntry,
    Manifest,
    ShardInfo,
    slot_key,
    state_key,
    tensor_entries,
    weights_key,
)
from tfspark.train.triggers import Progress

logger = logging.getLogger("tfspark")

WEIGHTS = "flat"
"""The name of the flat vector among initial values; no slot of an optimizer is called so."""


def save(
    store: CheckpointStore,
    engine: Engine,
    run: Run,
    commit: Any,
    progress: Progress,
    training: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> Manifest:
    """Writes a commit as the checkpoint of its step; every rank writes its own shard.

    Args:
        store: where to.
        engine: that made the commit.
        run, commit, progress: what is saved.
        training: what the driver needs to go on, as JSON.
        metrics: of the last validation.
    """
    merged: Sequence[np.ndarray] = ()
    first: Sequence[np.ndarray] = ()
    if run.program.state:
        parts = engine.map_states(commit, _model_state)
        merged, first = [mean for mean, _ in parts], parts[0][1]
    attempt = store.begin(progress.step)
    shards = engine.map_states(commit, _WriteShard(store, attempt, tuple(merged), tuple(first)))
    return store.commit(attempt, _manifest(run, progress, training, metrics), shards)


def newest_whole(store: CheckpointStore, context: SparkContext | None) -> Manifest | None:
    """The newest whole checkpoint, or None; says which newer ones were passed over.

    Every shard is read once to check it: by Spark tasks, where there is a SparkContext.
    """

    def problems(manifest: Manifest) -> Iterable[str]:
        if context is None:
            return store.problems(manifest)
        ranks = context.parallelize(range(manifest.num_ranks), manifest.num_ranks)
        with Jobs(context).job():
            found = ranks.map(partial(store.shard_problem, manifest)).collect()
        return [problem for problem in found if problem]

    found = store.latest_whole(problems)
    for step, reason in found.skipped:
        logger.warning(
            "The checkpoint of step %d is not whole and is passed over: %s", step, reason
        )
    return found.manifest


@dataclass(frozen=True)
class FromValues:
    """Makes the state of a rank before the first step, from the initial weights.

    Attributes:
        held: holds arrays by name: the flat vector `[P]` as `WEIGHTS`, and where the optimizer is
            not a new one, its slots by theirs; see `Slots`.
    """

    held: Broadcast | InFile | Here

    def __call__(self, run: Run, rank: int) -> RankState:
        arrays = self.held.value
        state = RankState.initial(run, arrays[WEIGHTS], rank)
        for group, update in enumerate(run.updates):
            for index, slot in enumerate(update.slots):
                if slot.name not in arrays:
                    continue
                value = arrays[slot.name]
                if slot.kind == "vector":
                    value = run.layout.shard(value, rank, padding=slot.initial)
                    value = value[run.layout.group_slice(group)]
                state.slots[group][index] = np.array(value)
        return state

    def release(self) -> None:
        """Frees what holds them, once no commit is computed from them any more."""
        self.held.destroy()


@dataclass(frozen=True)
class Here:
    """A value in this process, where a broadcast would be too much."""

    value: Any

    def destroy(self) -> None:
        """Nothing that a broadcast would have to free."""


@dataclass(frozen=True)
class InFile:
    """Arrays in a file that all ranks can map, where a broadcast would pass the JVM.

    Attributes:
        folder: of its own.
        frame: of a `FileCarrier`.
    """

    folder: str
    frame: bytes

    @classmethod
    def write(cls, arrays: Mapping[str, np.ndarray], parent: str) -> InFile:
        """Writes arrays into a new folder in `parent`."""
        folder = tempfile.mkdtemp(prefix="initial-", dir=parent)
        message = Message("initial", 0, {}, dict(arrays))
        return cls(folder, FileCarrier(folder).pack(message, 0, "all"))

    @property
    def value(self) -> Mapping[str, np.ndarray]:
        """The arrays, read-only."""
        return message_of(self.frame).arrays

    def destroy(self) -> None:
        """Deletes the file."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class FromCheckpoint:
    """Makes the state of a rank from a checkpoint, whatever the number of ranks was.

    The run must have been built with the checkpoint's model state (`read_state`).
    """

    store: CheckpointStore
    manifest: Manifest

    def release(self) -> None:
        """Nothing is held."""

    def __call__(self, run: Run, rank: int) -> RankState:
        state = RankState.initial(run, np.zeros(run.layout.size, run.layout.dtype), rank)
        state.step = self.manifest.step
        if _same_layout(self.manifest, run):
            self._read_own(run, state)
        else:
            self._read_segments(run, state)
        return state

    def _read_own(self, run: Run, state: RankState) -> None:
        arrays = self.store.read_shard(self.manifest, state.rank)
        for group, update in enumerate(run.updates):
            state.shard[run.layout.group_slice(group)] = arrays[weights_key(group)]
            state.slots[group] = [arrays[slot_key(group, slot.name)] for slot in update.slots]

    def _read_segments(self, run: Run, state: RankState) -> None:
        entries = {entry.name: entry for entry in self.manifest.tensors}
        for segment in run.layout.segments(state.rank):
            weight = run.program.weights[segment.tensor]
            entry = entries[weight.name]
            base = run.layout.group_slice(weight.group).start
            # Counted in the tensor, then in the group it was saved in.
            begin = segment.offset + entry.offset - self.manifest.groups[entry.group].offset
            end = begin + segment.stop - segment.start
            state.shard[segment.start : segment.stop] = self.store.read_flat_range(
                self.manifest, entry.group, begin, end
            )
            for slot, values in zip(
                run.updates[weight.group].slots, state.slots[weight.group], strict=True
            ):
                read = self.store.read_slot_range(self.manifest, entry.group, slot.name, begin, end)
                if slot.kind == "vector":
                    values[segment.start - base : segment.stop - base] = read
        for group in range(run.layout.num_groups):
            self._read_scalars(run, state, group, entries)

    def _read_scalars(
        self, run: Run, state: RankState, group: int, entries: Mapping[str, Any]
    ) -> None:
        # A rank may own nothing of a group, but keeps the group's scalars like every other.
        name = next(weight.name for weight in run.program.weights if weight.group == group)
        for index, slot in enumerate(run.updates[group].slots):
            if slot.kind == "scalar":
                state.slots[group][index] = self.store.read_slot_range(
                    self.manifest, entries[name].group, slot.name, 0, 1
                )


@dataclass(frozen=True)
class Trained:
    """Selects what goes home after training: the weights.

    Attributes:
        with_slots: whether the optimizer's slots go, too.
        averaged: the parameter groups whose weights are replaced by their moving average, as
            Keras does at the end of `fit` for an optimizer with `use_ema`.
    """

    averaged: frozenset[int]
    with_slots: bool = False

    def __call__(self, run: Run, state: RankState) -> RankState:
        shard = np.array(state.shard)
        for group in self.averaged:
            names = [slot.name for slot in run.updates[group].slots]
            shard[run.layout.group_slice(group)] = state.slots[group][names.index("average")]
        slots = state.slots if self.with_slots else []
        return replace(state, shard=shard, slots=slots, records=[])


def slots_of(run: Run, ranks: Sequence[Sequence[Sequence[np.ndarray]]]) -> dict[str, np.ndarray]:
    """The slots of all ranks as those of the whole optimizer; see `Slots`.

    Args:
        run: whose parameter groups have slots of the same names.
        ranks: by rank, group and slot.
    """
    found: dict[str, np.ndarray] = {}
    for index, slot in enumerate(run.updates[0].slots):
        parts = [[group[index] for group in groups] for groups in ranks]
        if slot.kind == "vector":
            shards = [np.concatenate(part) for part in parts]
            found[slot.name] = run.layout.join(shards).astype(slot.dtype, copy=False)
        else:
            found[slot.name] = np.asarray(parts[0][0])
    return found


def check_resumable(manifest: Manifest, program: Program, updates: Sequence[UpdateProgram]) -> None:
    """Checks that optimizers and model state of a checkpoint are those of a program.

    Raises:
        CheckpointError: names what differs. (Tensors are compared by `compare_tensors`.)
    """
    entries = {entry.name: manifest.groups[entry.group] for entry in manifest.tensors}
    for weight in program.weights:
        saved, wanted = entries[weight.name], updates[weight.group]
        if [slot.name for slot in saved.slots] != [slot.name for slot in wanted.slots]:
            raise CheckpointError(
                "A checkpoint resumes with the optimizer that wrote it. Received: "
                f"{wanted.name} with slots {[slot.name for slot in wanted.slots]} for "
                f"{weight.name!r}; saved: {saved.optimizer} with slots "
                f"{[slot.name for slot in saved.slots]}. Use the former optimizer, or another "
                "model_dir and load_weights()."
            )
    saved_state, wanted_state = map(_comparable, (manifest.state, program.state))
    if saved_state != wanted_state:
        differing = sorted({str(entry) for entry in set(saved_state) ^ set(wanted_state)})
        raise CheckpointError(
            "A checkpoint resumes the model that wrote it. Received: a model whose state (what "
            f"changes but is not trained) differs in {', '.join(differing) or 'its order'}."
        )


def _comparable(state: Sequence[StateSlot]) -> list[tuple[str, str, tuple[int, ...]]]:
    # Keras numbers its seed generators through the whole process, whatever the layers' names.
    return [
        ("seed" if slot.kind == "seed" else slot.name, slot.dtype, tuple(slot.shape))
        for slot in state
    ]


@dataclass(frozen=True)
class _WriteShard:
    """Writes the shard of a rank where it lies; rank 0 adds the model state."""

    store: CheckpointStore
    attempt: Attempt
    merged: tuple[np.ndarray, ...]
    first: tuple[np.ndarray, ...]

    def __call__(self, run: Run, state: RankState) -> ShardInfo:
        arrays: dict[str, np.ndarray] = {}
        for group, update in enumerate(run.updates):
            arrays[weights_key(group)] = state.shard[run.layout.group_slice(group)]
            for slot, values in zip(update.slots, state.slots[group], strict=True):
                arrays[slot_key(group, slot.name)] = values
        if state.rank == 0 and run.program.state:
            whole = run.state_layout.assemble(run.state, np.concatenate(self.merged), self.first)
            arrays.update({state_key(i): np.asarray(value) for i, value in enumerate(whole)})
        return self.store.write_shard(self.attempt, state.rank, arrays)


def _model_state(run: Run, state: RankState) -> tuple[np.ndarray, list[np.ndarray]]:
    return state.mean, state.first if state.rank == 0 else []


def _same_layout(manifest: Manifest, run: Run) -> bool:
    return (
        manifest.num_ranks == run.num_ranks
        and manifest.tensors == tensor_entries(run.program.weights, run.program.dtype)
        and [group.buckets for group in manifest.groups] == _buckets(run)
    )


def _buckets(run: Run) -> list[tuple[int, ...]]:
    """Elements of the buckets of each group."""
    sizes: list[list[int]] = [[] for _ in range(run.layout.num_groups)]
    for bucket in run.layout.buckets:
        sizes[bucket.group].append(bucket.stop - bucket.start)
    return [tuple(group) for group in sizes]


def _manifest(
    run: Run, progress: Progress, training: Mapping[str, Any], metrics: Mapping[str, float]
) -> Manifest:
    layout = run.layout
    return Manifest(
        step=progress.step,
        epoch=progress.epoch,
        rows=progress.rows,
        seed=run.order.seed,
        batch_size=run.order.batch_size,
        num_ranks=run.num_ranks,
        tensors=tensor_entries(run.program.weights, run.program.dtype),
        groups=tuple(
            GroupEntry(
                layout.group_offsets[group],
                layout.group_sizes[group],
                layout.slice_sizes[group],
                update.name,
                update.slots,
                buckets,
            )
            for group, (update, buckets) in enumerate(zip(run.updates, _buckets(run), strict=True))
        ),
        state=run.program.state,
        training=dict(training),
        metrics=dict(metrics),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    """Of tfspark and of what it runs on; what came without metadata (an archive) is left out."""
    versions = {"tfspark": tfspark.__version__}
    for name in ("tensorflow", "tensorflow-cpu", "keras", "pyspark"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
