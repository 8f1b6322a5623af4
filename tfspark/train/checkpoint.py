"""Checkpoints: shards written by the executors, made one checkpoint by the driver.

The contract, and who may call what:

1. driver: `begin(step)` opens an attempt, a data folder with a name of its own, and removes what
   unfinished attempts left behind. One driver at a time writes to a `model_dir`.
2. every rank, in its task: `write_shard(attempt, rank, arrays)`. It may be called again for the
   same rank (a task that Spark runs twice writes the same bytes twice).
3. driver: `commit(attempt, manifest, shards)` writes the manifest in one atomic act. Readers see
   manifests only, so a checkpoint is either whole or not there.
4. anyone: `list`, `latest`, `latest_whole`, and the `read_…` methods.

```
model_dir/
  step-00000120.json               the manifest, see manifest.py
  step-00000120-5f3a9c01/          the data folder of the attempt that was committed
    rank-00000.bin  rank-00001.bin …
```

`model_dir` is a path or any URL that fsspec opens (`hdfs://`, `s3://`, `gs://`, …); every executor
must reach it. Local folders are made private (0700), local files too (0600).

Example:
    >>> store = CheckpointStore("/data/model")  # doctest: +SKIP
    >>> attempt = store.begin(step=120)  # doctest: +SKIP
    >>> arrays = {"weights/0": np.zeros(3, np.float32)}
    >>> shards = [store.write_shard(attempt, 0, arrays)]  # doctest: +SKIP
    >>> store.commit(attempt, manifest, shards)  # doctest: +SKIP
"""

from __future__ import annotations

import math
import os
import re
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import fsspec
import numpy as np

from tfspark.errors import CheckpointError, InvalidInputError
from tfspark.train import files
from tfspark.train.manifest import (
    FOLDER,
    ArrayInfo,
    Manifest,
    ShardInfo,
    numpy_dtype,
    slot_key,
    state_key,
    weights_key,
)

_MANIFEST = re.compile(r"step-(\d{8,})\.json")
# Arrays start on cache lines, so that a memory map of the file gives aligned arrays.
_ALIGNMENT = 64
_BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Attempt:
    """An open attempt to write the checkpoint of a step; it pickles."""

    step: int
    folder: str


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay.

    Attributes:
        keep_last: this many of the newest.
        keep_every: and those whose step is a multiple of this.
    """

    keep_last: int = 5
    keep_every: int | None = None

    def __post_init__(self) -> None:
        if self.keep_last < 1 or (self.keep_every is not None and self.keep_every < 1):
            raise InvalidInputError(
                "Retention keeps at least the newest checkpoint, and every n-th with n at least 1. "
                f"Received: keep_last={self.keep_last}, keep_every={self.keep_every}."
            )

    def kept(self, steps: Sequence[int]) -> set[int]:
        """The steps that stay."""
        every = self.keep_every
        milestones = {step for step in steps if every is not None and step % every == 0}
        return set(sorted(steps)[-self.keep_last :]) | milestones


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint, or none, and why newer ones were passed over."""

    manifest: Manifest | None
    skipped: tuple[tuple[int, str], ...]  # (step, reason), newest first


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one `model_dir`; it pickles, so that tasks can write to it.

    Args:
        model_dir: a path or a URL that fsspec opens. A relative path becomes absolute here, on
            the driver.
        storage_options: passed to fsspec, for example credentials.

    Raises:
        InvalidInputError: the URL's protocol is unknown or its package is not installed.
    """

    model_dir: str
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            fs, path = fsspec.core.url_to_fs(os.fspath(self.model_dir), **self.storage_options)
        except (ValueError, ImportError, TypeError) as error:
            raise InvalidInputError(
                "model_dir is a path or a URL that fsspec opens. "
                f"Received: {self.model_dir!r} ({error}). Install the package that serves the "
                "protocol, for example s3fs for s3://."
            ) from error
        object.__setattr__(self, "model_dir", fs.unstrip_protocol(path))

    # -- writing --------------------------------------------------------------------------------

    def check_writable(self) -> None:
        """Writes and removes a small file, so that a bad `model_dir` shows before training.

        Raises:
            CheckpointError: it cannot be written.
        """
        fs, root = self._open()
        with self._explained("model_dir must be a folder that can be written"):
            files.make_folder(fs, root)
        probe = self.write_probe("driver")
        self.take_probes([probe])

    def write_probe(self, writer: str) -> str:
        """Writes a small file, from any machine, and returns its name.

        Raises:
            CheckpointError: it cannot be written.
        """
        fs, root = self._open()
        name = f".{writer}.{uuid.uuid4().hex[:8]}.part"  # if it stays, `begin` clears it away
        with self._explained(f"model_dir must be a folder that can be written by the {writer}"):
            files.write(fs, f"{root}/{name}", [b"tfspark"])
        return name

    def take_probes(self, names: Iterable[str]) -> list[str]:
        """Removes what `write_probe` wrote; the names that are not seen from here.

        Raises:
            CheckpointError: one cannot be removed.
        """
        fs, root = self._open()
        seen, wanted = set(files.list_names(fs, root)), list(names)
        with self._explained("model_dir must be a folder that can be written"):
            for name in seen.intersection(wanted):
                fs.rm_file(f"{root}/{name}")
        return [name for name in wanted if name not in seen]

    def begin(self, step: int) -> Attempt:
        """Opens an attempt for the checkpoint of a step; called on the driver.

        Raises:
            CheckpointError: `model_dir` cannot be written.
        """
        fs, root = self._open()
        attempt = Attempt(step, f"step-{step:08d}-{uuid.uuid4().hex[:8]}")
        with self._explained("model_dir must be a folder that can be written"):
            files.make_folder(fs, root)
            self._remove_leftovers()
            files.make_folder(fs, f"{root}/{attempt.folder}")
        return attempt

    def write_shard(
        self, attempt: Attempt, rank: int, arrays: Mapping[str, np.ndarray]
    ) -> ShardInfo:
        """Writes the arrays of one rank to its shard file; called in the rank's task.

        Args:
            attempt: of `begin`.
            rank: the rank.
            arrays: by array name (see manifest.py); any numeric dtype, any shape.

        Returns:
            What `commit` needs to know of the file.

        Raises:
            CheckpointError: the file cannot be written, or an array holds Python objects.
        """
        fs, root = self._open()
        entries: dict[str, ArrayInfo] = {}
        chunks: list[bytes | memoryview] = []
        offset = 0
        for name, array in arrays.items():
            array = np.asarray(array)
            if array.dtype.hasobject:
                raise CheckpointError(
                    f"A checkpoint holds numbers. Received: {name!r} with dtype {array.dtype}.",
                    rank=rank,
                    step=attempt.step,
                )
            dtype = array.dtype.name
            padding = -offset % _ALIGNMENT
            content = np.ascontiguousarray(array, numpy_dtype(dtype))
            entries[name] = ArrayInfo(dtype, array.shape, offset + padding)
            chunks += [bytes(padding), content.reshape(-1).view(np.uint8).data]
            offset += padding + content.nbytes
        file = f"rank-{rank:05d}.bin"
        with self._explained("Every executor must be able to write to model_dir", rank=rank):
            files.write(fs, f"{root}/{attempt.folder}/{file}", chunks)
        crc32 = 0
        for chunk in chunks:
            crc32 = zlib.crc32(chunk, crc32)
        return ShardInfo(rank, file, offset, crc32, entries)

    def commit(self, attempt: Attempt, manifest: Manifest, shards: Iterable[ShardInfo]) -> Manifest:
        """Makes the shards of an attempt a checkpoint, in one atomic act; called on the driver.

        A checkpoint of the same step is replaced.

        Returns:
            The manifest as written, with folder and shards.

        Raises:
            CheckpointError: a shard is missing or cannot be seen from here, an array that the
                manifest promises is missing, or the manifest cannot be written. The checkpoints
                committed before are untouched.
        """
        fs, root = self._open()
        ordered = tuple(sorted(shards, key=lambda shard: shard.rank))
        manifest = replace(manifest, folder=attempt.folder, shards=ordered)
        missing = manifest.missing()
        if missing or manifest.step != attempt.step:
            raise CheckpointError(
                "A checkpoint has one shard of every rank with every array that the manifest "
                "promises, in its shape, all of its own step. Received: step "
                f"{manifest.step} with {missing or 'all of them'}.",
                step=attempt.step,
            )
        for shard in ordered:
            problem = self._size_problem(fs, root, manifest, shard)
            if problem:
                raise CheckpointError(
                    "The driver must see the files that the executors wrote. Received: "
                    f"{problem}. Use a model_dir that all machines share.",
                    rank=shard.rank,
                    step=attempt.step,
                )
        with self._explained("The driver must be able to write the manifest", step=attempt.step):
            files.write(fs, self._manifest_path(root, attempt.step), [manifest.to_json().encode()])
        return manifest

    def retain(self, policy: Retention) -> tuple[int, ...]:
        """Removes the checkpoints that the policy does not keep, each manifest before its data.

        Returns:
            The steps removed.
        """
        fs, root = self._open()
        steps = self.list()
        kept = policy.kept(steps)
        removed = tuple(step for step in steps if step not in kept)
        with self._explained("Retention must be able to remove checkpoints"):
            for step in removed:
                fs.rm_file(self._manifest_path(root, step))
            if removed:
                # Without their manifests the data folders are leftovers like any other; an
                # attempt that is being written while this runs has a newer step.
                self._remove_leftovers(up_to=max(removed))
        return removed

    # -- reading --------------------------------------------------------------------------------

    def list(self) -> tuple[int, ...]:
        """The steps with a committed checkpoint, in ascending order; empty without a folder."""
        fs, root = self._open()
        matches = (_MANIFEST.fullmatch(name) for name in files.list_names(fs, root))
        return tuple(sorted(int(match[1]) for match in matches if match))

    def latest(self) -> Manifest | None:
        """The manifest of the newest checkpoint; its files are not looked at."""
        steps = self.list()
        return self.read(steps[-1]) if steps else None

    def read(self, step: int) -> Manifest:
        """The manifest of a step.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        fs, root = self._open()
        try:
            text = fs.cat_file(self._manifest_path(root, step))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"There is no checkpoint of step {step} in {self.model_dir}. "
                f"Received: step {step}; available: {list(self.list())}."
            ) from error
        return Manifest.from_json(text)

    def latest_whole(self, problems: Callable[[Manifest], Iterable[str]] | None = None) -> Found:
        """The newest checkpoint all of whose files are there, of the right size and CRC-32.

        Args:
            problems: what is wrong with a checkpoint. By default `self.problems`, which reads
                every file here, block by block; an engine can spread `shard_problem` over tasks.
        """
        problems = problems or self.problems
        skipped = []
        for step in reversed(self.list()):
            try:
                manifest = self.read(step)
            except CheckpointError as error:
                skipped.append((step, str(error)))
                continue
            found = list(problems(manifest))
            if not found:
                return Found(manifest, tuple(skipped))
            skipped.append((step, "; ".join(found)))
        return Found(None, tuple(skipped))

    def problems(self, manifest: Manifest) -> Iterator[str]:
        """What is wrong with the files of a checkpoint; nothing, if it is whole."""
        for shard in manifest.shards:
            problem = self.shard_problem(manifest, shard.rank)
            if problem:
                yield problem

    def shard_problem(self, manifest: Manifest, rank: int) -> str | None:
        """What is wrong with one shard file: missing, truncated, changed. `None`: it is whole."""
        fs, root = self._open()
        shard = manifest.shards[rank]
        problem = self._size_problem(fs, root, manifest, shard)
        if problem:
            return problem
        crc32 = 0
        with fs.open(f"{root}/{manifest.folder}/{shard.file}", "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                crc32 = zlib.crc32(block, crc32)
        if crc32 != shard.crc32:
            return (
                f"{manifest.folder}/{shard.file} is damaged: its CRC-32 is {crc32:08x}, "
                f"the manifest says {shard.crc32:08x}"
            )
        return None

    def read_shard(self, manifest: Manifest, rank: int) -> dict[str, np.ndarray]:
        """All arrays of one rank, by array name; size and CRC-32 are checked.

        Raises:
            CheckpointError: the file is missing, truncated or changed.
        """
        fs, root = self._open()
        shard = manifest.shards[rank]
        problem = self._size_problem(fs, root, manifest, shard)
        if problem is None:
            content = fs.cat_file(f"{root}/{manifest.folder}/{shard.file}")
            if zlib.crc32(content) == shard.crc32:
                return {
                    name: _array(content, entry, entry.offset)
                    for name, entry in shard.arrays.items()
                }
            problem = f"{manifest.folder}/{shard.file} is damaged: its CRC-32 differs"
        raise CheckpointError(
            f"A shard is read whole or not at all. Received: {problem}. "
            "latest_whole() finds the newest checkpoint without damage.",
            rank=rank,
            step=manifest.step,
        )

    def read_flat_range(self, manifest: Manifest, group: int, start: int, stop: int) -> np.ndarray:
        """Elements `[start, stop)` of a group's weights, whatever the number of ranks was.

        Only the bytes of the range are read, so their CRC-32 is not checked: `latest_whole` did.
        Beyond the group's size there are zeros, so a padded shard can be asked for as it is.
        """
        return self._read_range(manifest, group, weights_key(group), start, stop)

    def read_slot_range(
        self, manifest: Manifest, group: int, slot: str, start: int, stop: int
    ) -> np.ndarray:
        """Elements `[start, stop)` of an optimizer slot, as `read_flat_range`.

        Of a scalar slot, its value `[]`; beyond the group's size, the slot's initial value.
        """
        infos = {info.name: info for info in manifest.groups[group].slots}
        if slot not in infos:
            raise CheckpointError(
                f"The optimizer of group {group} ({manifest.groups[group].optimizer}) has the "
                f"slots {list(infos)}. Received: {slot!r}.",
                step=manifest.step,
            )
        key = slot_key(group, slot)
        if infos[slot].kind == "scalar":
            return self._read_elements(manifest, 0, key, 0, 1).reshape(())
        return self._read_range(manifest, group, key, start, stop, infos[slot].initial)

    def read_weights(self, manifest: Manifest) -> dict[str, np.ndarray]:
        """All trainable tensors by name, on this machine."""
        vectors = [
            self.read_flat_range(manifest, index, 0, group.size)
            for index, group in enumerate(manifest.groups)
        ]
        weights = {}
        for tensor in manifest.tensors:
            start = tensor.offset - manifest.groups[tensor.group].offset
            stop = start + math.prod(tensor.shape)
            weights[tensor.name] = vectors[tensor.group][start:stop].reshape(tensor.shape)
        return weights

    def read_state(self, manifest: Manifest) -> tuple[np.ndarray, ...]:
        """The model state, in the order of `manifest.state`."""
        return tuple(
            self._read_elements(manifest, 0, state_key(index), 0, math.prod(slot.shape)).reshape(
                slot.shape
            )
            for index, slot in enumerate(manifest.state)
        )

    # -- inside ---------------------------------------------------------------------------------

    def _open(self) -> tuple[Any, str]:
        fs, root = fsspec.core.url_to_fs(self.model_dir, **self.storage_options)
        return fs, root.rstrip("/")

    def _explained(self, rule: str, **where: Any) -> files.Explained:
        return files.Explained(f"{rule}. Received: model_dir={self.model_dir!r}", where)

    @staticmethod
    def _manifest_path(root: str, step: int) -> str:
        return f"{root}/step-{step:08d}.json"

    @staticmethod
    def _size_problem(fs: Any, root: str, manifest: Manifest, shard: ShardInfo) -> str | None:
        name = f"{manifest.folder}/{shard.file}"
        try:
            size = fs.size(f"{root}/{name}")
        except FileNotFoundError:
            return f"{name} is missing"
        if size != shard.bytes:
            return f"{name} is truncated or changed: {size} bytes instead of {shard.bytes}"
        return None

    def _remove_leftovers(self, up_to: int | None = None) -> None:
        """Removes data folders that no manifest names, and temporary files."""
        fs, root = self._open()
        named, unreadable = set(), set()
        for step in self.list():
            try:
                named.add(self.read(step).folder)
            except CheckpointError:
                # Its data may be all that is left to rescue; a person should decide.
                unreadable.add(step)
        for name in files.list_names(fs, root):
            match = FOLDER.fullmatch(name)
            if match and name not in named and int(match[1]) not in unreadable:
                if up_to is None or int(match[1]) <= up_to:
                    fs.rm(f"{root}/{name}", recursive=True)
            elif files.TEMPORARY.fullmatch(name):
                fs.rm_file(f"{root}/{name}")

    def _read_elements(
        self, manifest: Manifest, rank: int, key: str, start: int, stop: int
    ) -> np.ndarray:
        """Elements `[start, stop)` of one array of one shard file, flat."""
        fs, root = self._open()
        shard = manifest.shards[rank]
        problem = self._size_problem(fs, root, manifest, shard)
        if problem is None and key not in shard.arrays:
            problem = f"{manifest.folder}/{shard.file} has no array {key!r}"
        if problem:
            raise CheckpointError(
                f"A checkpoint holds every array its manifest names. Received: {problem}. "
                "latest_whole() finds the newest checkpoint without damage.",
                rank=rank,
                step=manifest.step,
            )
        entry = shard.arrays[key]
        itemsize = numpy_dtype(entry.dtype).itemsize
        first = entry.offset + start * itemsize
        last = entry.offset + stop * itemsize
        content = fs.cat_file(f"{root}/{manifest.folder}/{shard.file}", first, last)
        return _array(content, replace(entry, shape=(stop - start,)), 0)

    def _read_range(
        self,
        manifest: Manifest,
        group: int,
        key: str,
        start: int,
        stop: int,
        beyond: float = 0.0,
    ) -> np.ndarray:
        info = manifest.groups[group]
        if not 0 <= start <= stop:
            raise InvalidInputError(f"A range goes upwards from 0. Received: [{start}, {stop}).")
        dtype = numpy_dtype(manifest.shards[0].arrays[key].dtype).newbyteorder("=")
        result = np.full(stop - start, beyond, dtype)
        for position, rank, within, count in info.pieces(start, stop, manifest.num_ranks):
            result[position - start : position - start + count] = self._read_elements(
                manifest, rank, key, within, within + count
            )
        return result


def _array(content: bytes, entry: ArrayInfo, offset: int) -> np.ndarray:
    """A writable array in native byte order from the bytes of a shard file."""
    dtype = numpy_dtype(entry.dtype)
    count = math.prod(entry.shape)
    array = np.frombuffer(content, dtype, count, offset if count else 0)
    return array.astype(dtype.newbyteorder("=")).reshape(entry.shape)
