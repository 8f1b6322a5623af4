"""Messages between ranks, and their bytes.

A frame is `magic, header length, JSON header, padding, raw arrays`. The arrays are not copied when
a frame is decoded: they are views of the received bytes. Nothing is pickled.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from mmap import mmap
from typing import Any

import ml_dtypes  # noqa: F401  (makes bfloat16 known to np.dtype)
import numpy as np

from tfspark.errors import TrainingError

MAGIC = b"TFS1"
_HEADER = struct.Struct("<4sI")
_ALIGNMENT = 64


@dataclass(frozen=True)
class Message:
    """What one rank tells another in one phase of a step.

    Attributes:
        kind: the phase: "shard", "gradient", "sums", "state".
        source: the rank that sent it.
        meta: small values that JSON holds.
        arrays: NumPy arrays by name.
    """

    kind: str
    source: int
    meta: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


def encode(message: Message) -> bytes:
    """The bytes of a message; one copy of each array."""
    return b"".join(chunks(message))


def chunks(message: Message) -> list[bytes | memoryview]:
    """The bytes of a message in pieces; arrays that are contiguous are not copied."""
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    arrays: list[bytes | memoryview] = []
    offset = 0
    for name, array in message.arrays.items():
        array = np.asarray(array, order="C")
        padding = -offset % _ALIGNMENT
        arrays.append(bytes(padding))
        # A zero-dimensional view has no buffer of its own kind for halfs: bytes of a flat view do.
        arrays.append(array.reshape(-1).view(np.uint8).data)
        entries.append((name, array.dtype.name, array.shape))
        offset += padding + array.nbytes
    header = json.dumps([message.kind, message.source, message.meta, entries]).encode()
    start = _HEADER.size + len(header)
    return [_HEADER.pack(MAGIC, len(header)), header, bytes(-start % _ALIGNMENT), *arrays]


def decode(frame: bytes | mmap) -> Message:
    """The message of a frame; its arrays are read-only views of `frame`.

    Raises:
        TrainingError: the bytes are not a whole frame.
    """
    if len(frame) < _HEADER.size:
        raise TrainingError(f"A frame has at least {_HEADER.size} bytes. Received: {len(frame)}.")
    magic, header_bytes = _HEADER.unpack_from(frame)
    if magic != MAGIC:
        raise TrainingError(f"A frame starts with {MAGIC!r}. Received: {magic!r}.")
    offset = _HEADER.size + header_bytes
    kind, source, meta, entries = json.loads(frame[_HEADER.size : offset])
    offset += -offset % _ALIGNMENT
    begin, arrays = offset, {}
    for name, dtype_name, shape in entries:
        dtype = np.dtype(dtype_name)
        count = int(np.prod(shape, dtype=np.int64))
        begin += (offset - begin) % _ALIGNMENT
        if begin + count * dtype.itemsize > len(frame):
            raise TrainingError(
                f"Array {name!r} of a {kind!r} frame ends at byte "
                f"{begin + count * dtype.itemsize}. Received: a frame of {len(frame)} bytes."
            )
        arrays[name] = np.frombuffer(frame, dtype, count, begin).reshape(shape)
        begin += count * dtype.itemsize
    return Message(kind, source, meta, arrays)
