"""The manifest: all that a checkpoint says about itself, as one JSON document.

A checkpoint is one folder of shard files plus this document, and exists from the moment the
document does. The document says where every number lies, so that the weights can be read with
NumPy and nothing else:

```python
import json, numpy as np

manifest = json.load(open("model/step-00000120.json"))
shards = [
    (shard, np.fromfile(f"model/{manifest['folder']}/{shard['file']}", dtype=np.uint8))
    for shard in manifest["shards"]
]


def array(shard, content, name):
    entry = shard["arrays"][name]
    dtype = np.dtype(entry["dtype"]).newbyteorder("<")
    count = int(np.prod(entry["shape"], dtype=int))
    return np.frombuffer(content, dtype, count, entry["offset"]).reshape(entry["shape"])


weights = {}
for index, group in enumerate(manifest["groups"]):
    parts = [array(shard, content, f"weights/{index}") for shard, content in shards]
    buckets, offset = [], 0
    for size in group["buckets"]:
        share = -(-size // len(parts))
        bucket = np.concatenate([part[offset : offset + share] for part in parts])
        buckets.append(bucket[:size])  # what follows is padding
        offset += share
    vector = np.concatenate(buckets)
    for tensor in manifest["tensors"]:
        if tensor["group"] == index:
            start = tensor["offset"] - group["offset"]
            size = int(np.prod(tensor["shape"], dtype=int))
            weights[tensor["name"]] = vector[start : start + size].reshape(tensor["shape"])
```

Arrays of a shard file are raw, C-ordered, little-endian, and called

* `weights/G`, the rank's slices of the padded buckets of group G, `[shard_size]`;
* `slots/G/NAME`, a slot of the optimizer of group G, `[shard_size]` or `[]`;
* `state/I`, tensor I of the model state, in the file of rank 0 only.

`bfloat16` is written as its 16 bits (the upper half of a float32). A non-finite number (of the
metrics) is written as Python's `json` does: `NaN`, `Infinity`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from tfspark.errors import CheckpointError
from tfspark.graph.program import StateSlot, UpdateSlot, Weight

FORMAT_VERSION = 1
"""Raised when a reader of the former format would misread the new one."""

FOLDER = re.compile(r"step-(\d{8,})-[0-9a-f]{8}")
"""Names of data folders: the step, and a random number for the attempt."""

_FILE = re.compile(r"rank-\d{5,}\.bin")


def weights_key(group: int) -> str:
    """The array name of a group's weights in a shard file."""
    return f"weights/{group}"


def slot_key(group: int, name: str) -> str:
    """The array name of an optimizer slot in a shard file."""
    return f"slots/{group}/{name}"


def state_key(index: int) -> str:
    """The array name of a model state tensor in the file of rank 0."""
    return f"state/{index}"


def numpy_dtype(name: str) -> np.dtype:
    """The little-endian dtype of an array in a shard file."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name).newbyteorder("<")


@dataclass(frozen=True)
class ArrayInfo:
    """Where one array lies in its shard file; `offset` in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class ShardInfo:
    """One shard file: its size in bytes, its CRC-32 (as of `zlib`), the arrays in it."""

    rank: int
    file: str
    bytes: int
    crc32: int
    arrays: Mapping[str, ArrayInfo]


@dataclass(frozen=True)
class TensorEntry:
    """One trainable tensor; `offset` counts elements of the whole flat vector."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int
    offset: int


@dataclass(frozen=True)
class GroupEntry:
    """One parameter group: elements `[offset, offset + size)` of the flat vector.

    Attributes:
        offset, size: of the group.
        shard_size: elements that a rank keeps of it, padding included.
        optimizer: name of its rule.
        slots: of its rule.
        buckets: elements of the buckets that make up the group (see `Layout`); not given: it is
            one. Rank r keeps slice r of every bucket, each padded at the bucket's end.
    """

    offset: int
    size: int
    shard_size: int
    optimizer: str
    slots: tuple[UpdateSlot, ...]
    buckets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "buckets", tuple(self.buckets) or (self.size,))

    def pieces(self, start: int, stop: int, num_ranks: int) -> Iterator[tuple[int, int, int, int]]:
        """Where elements `[start, stop)` of the group lie.

        Yields:
            (element of the group, rank, place in the rank's shard of the group, elements).
        """
        begin = offset = 0
        for size in self.buckets:
            share = -(-size // num_ranks)
            position = max(start, begin)
            while position < min(stop, begin + size):
                rank, within = divmod(position - begin, share)
                count = min(share - within, min(stop, begin + size) - position)
                yield position, rank, offset + within, count
                position += count
            begin, offset = begin + size, offset + share


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds; `CheckpointStore.commit` fills in `folder` and `shards`.

    Attributes:
        step: steps done.
        epoch: epochs begun, counted from 0; `rows`: rows used so far.
        seed, batch_size: what the order of the rows follows from, with the step.
        num_ranks: number of shard files.
        tensors: the trainable tensors, in flat order.
        groups: the parameter groups, in flat order.
        state: the model state; its arrays lie in the file of rank 0.
        training: what the driver needs to go on: schedules, triggers. Anything JSON can hold.
        metrics: name to value, as of this step.
        versions: of tfspark and of what it ran on.
    """

    step: int
    epoch: int
    rows: int
    seed: int
    batch_size: int
    num_ranks: int
    tensors: tuple[TensorEntry, ...]
    groups: tuple[GroupEntry, ...]
    state: tuple[StateSlot, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""
    shards: tuple[ShardInfo, ...] = ()

    def to_json(self) -> str:
        """The document."""
        return json.dumps({"format": FORMAT_VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """The manifest that the document describes.

        Raises:
            CheckpointError: it is cut short, of a later format, or names files outside its folder.
        """
        try:
            entries = json.loads(text)
            version = entries.pop("format")
            if version != FORMAT_VERSION:
                raise CheckpointError(
                    f"This tfspark reads checkpoints of format {FORMAT_VERSION}. Received: format "
                    f"{version}. Use the release of tfspark that wrote it."
                )
            manifest = cls(
                **{
                    **entries,
                    "tensors": tuple(_entry(TensorEntry, entry) for entry in entries["tensors"]),
                    "groups": tuple(_group(entry) for entry in entries["groups"]),
                    "state": tuple(_entry(StateSlot, entry) for entry in entries["state"]),
                    "shards": tuple(_shard(entry) for entry in entries["shards"]),
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                "The manifest of a checkpoint is a JSON document as tfspark.train.manifest "
                f"describes it. Received: one that cannot be read ({type(error).__name__}: "
                f"{error})."
            ) from error
        if not _fits(manifest, Manifest):
            raise CheckpointError(
                "The values of a manifest have the types that tfspark.train.manifest names. "
                "Received: one of another type. The file is damaged."
            )
        names = [shard.file for shard in manifest.shards]
        if not FOLDER.fullmatch(manifest.folder) or not all(map(_FILE.fullmatch, names)):
            raise CheckpointError(
                "A manifest names files of its own data folder only. Received: folder "
                f"{manifest.folder!r}, files {names}."
            )
        problem = _contradiction(manifest)
        if problem:
            raise CheckpointError(
                f"The parts of a manifest fit together. Received: {problem}. The file is damaged; "
                "an older checkpoint may be whole."
            )
        return manifest

    def missing(self) -> str | None:
        """What a checkpoint of this manifest lacks: shards, or arrays in them; None if nothing."""
        ranks = [shard.rank for shard in self.shards]
        if ranks != list(range(self.num_ranks)):
            return f"shards of ranks {ranks} of {self.num_ranks}"
        expected: dict[str, tuple[int, ...]] = {}
        for index, group in enumerate(self.groups):
            expected[weights_key(index)] = (group.shard_size,)
            for slot in group.slots:
                shape = (group.shard_size,) if slot.kind == "vector" else ()
                expected[slot_key(index, slot.name)] = shape
        for shard in self.shards:
            promised = dict(expected)
            if shard.rank == 0:
                promised |= {state_key(i): tuple(slot.shape) for i, slot in enumerate(self.state)}
            shapes = {name: tuple(array.shape) for name, array in shard.arrays.items()}
            wrong = [name for name, shape in promised.items() if shapes.get(name) != shape]
            if wrong:
                listed = (f"{n}: {shapes.get(n)} instead of {promised[n]}" for n in wrong)
                return f"a shard of rank {shard.rank} with {', '.join(listed)}"
        return None


def tensor_entries(weights: Sequence[Weight], dtype: str) -> tuple[TensorEntry, ...]:
    """The entries of a program's weights, which lie in the flat vector in this order."""
    entries, offset = [], 0
    for weight in weights:
        entries.append(TensorEntry(weight.name, tuple(weight.shape), dtype, weight.group, offset))
        offset += weight.size
    return tuple(entries)


def compare_tensors(manifest: Manifest, weights: Sequence[Weight], dtype: str = "float32") -> None:
    """Checks that a checkpoint belongs to a model with these weights.

    The order of the weights and their groups may differ; names, shapes and dtypes may not.

    Raises:
        CheckpointError: names every tensor that is missing, left over or different.
    """
    _compare(
        manifest,
        {entry.name: (entry.dtype, entry.shape) for entry in manifest.tensors},
        {weight.name: (dtype, tuple(weight.shape)) for weight in weights},
    )


def compare_variables(
    manifest: Manifest, weights: Sequence[Weight], dtype: str, state: Sequence[StateSlot]
) -> None:
    """Like `compare_tensors`, for weights and model state together.

    So a weight may be trained here and frozen there. Where random draws stand is not compared.
    """
    _compare(
        manifest,
        {entry.name: (entry.dtype, entry.shape) for entry in manifest.tensors}
        | _shapes(manifest.state),
        {weight.name: (dtype, tuple(weight.shape)) for weight in weights} | _shapes(state),
    )


def _shapes(state: Sequence[StateSlot]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {slot.name: (slot.dtype, tuple(slot.shape)) for slot in state if slot.kind != "seed"}


def _compare(
    manifest: Manifest,
    saved: Mapping[str, tuple[str, tuple[int, ...]]],
    wanted: Mapping[str, tuple[str, tuple[int, ...]]],
) -> None:
    differences = [f"{name}: only in the model" for name in wanted if name not in saved] + [
        f"{name}: only in the checkpoint" for name in saved if name not in wanted
    ]
    for name in wanted:
        if name in saved and saved[name] != wanted[name]:
            differences.append(
                f"{name}: {wanted[name][0]} {wanted[name][1]} in the model, "
                f"{saved[name][0]} {saved[name][1]} in the checkpoint"
            )
    hint = ""
    if list(saved.values()) == list(wanted.values()):
        hint = (
            " Only the names differ: Keras numbers layers without a name through the whole "
            "process. Name them, or call keras.backend.clear_session() before building the model."
        )
    if differences:
        raise CheckpointError(
            "A checkpoint resumes the model that wrote it. Received: a checkpoint of step "
            f"{manifest.step} whose tensors differ ({'; '.join(differences)}). Use another "
            f"model_dir, or build the model that the checkpoint was written by.{hint}",
        )


def _entry(cls: type, entry: dict[str, Any]) -> Any:
    return cls(**{**entry, "shape": tuple(entry["shape"])})


def _group(entry: dict[str, Any]) -> GroupEntry:
    return GroupEntry(**{**entry, "slots": tuple(UpdateSlot(**slot) for slot in entry["slots"])})


def _shard(entry: dict[str, Any]) -> ShardInfo:
    arrays = {name: _entry(ArrayInfo, array) for name, array in entry["arrays"].items()}
    return ShardInfo(**{**entry, "arrays": arrays})


def _contradiction(manifest: Manifest) -> str | None:
    """What cannot be in a manifest that was read; None: it makes sense.

    Whoever reads arrays afterwards may count on sizes, offsets and dtypes.
    """
    if manifest.num_ranks < 1:
        return "no rank"
    for index, group in enumerate(manifest.groups):
        shares = sum(-(-size // manifest.num_ranks) for size in group.buckets)
        if (sum(group.buckets), shares) != (group.size, group.shard_size):
            return f"a group {index} that is not the sum of its buckets"
        if any(slot.kind not in ("vector", "scalar") for slot in group.slots):
            return f"a group {index} with a slot of another kind"
    for tensor in manifest.tensors:
        if tensor.group >= len(manifest.groups):
            return f"a tensor {tensor.name!r} of no group"
        group = manifest.groups[tensor.group]
        begin = tensor.offset - group.offset
        if begin < 0 or begin + math.prod(tensor.shape) > group.size:
            return f"a tensor {tensor.name!r} beyond its group"
    for shard in manifest.shards:
        for name, array in shard.arrays.items():
            if not _is_numeric(array.dtype):
                return f"an array {name!r} of {array.dtype!r}"
            end = array.offset + math.prod(array.shape) * numpy_dtype(array.dtype).itemsize
            if end > shard.bytes:
                return f"an array {name!r} beyond the end of its file"
    return manifest.missing()


def _is_numeric(name: str) -> bool:
    try:
        return name == "bfloat16" or np.dtype(name).kind in "biufc"
    except TypeError:
        return False


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; whole numbers but `seed` are not negative."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(each, arguments[0]) for each in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            isinstance(key, str) and _fits(each, arguments[1]) for key, each in value.items()
        )
    if isinstance(hint, type) and is_dataclass(hint):
        hints = get_type_hints(hint)
        return isinstance(value, hint) and all(
            type(getattr(value, name)) is int
            if name == "seed"
            else _fits(getattr(value, name), hints[name])
            for name in (field.name for field in fields(hint))
        )
    if hint is int:
        return type(value) is int and value >= 0
    if hint is float:
        return type(value) in (int, float)
    return isinstance(value, hint)
