"""Messages between ranks as a stream of bytes: what `frames.py` is to Spark, without a copy.

On a stream a message is `magic, header length, payload length, JSON header, raw arrays`. Arrays are
sent from where they lie and received into the place where they belong. One that lies in memory that
both ranks share (`shared.py`) does not travel: the header says where it is. Nothing is pickled, and
nothing is allocated before the lengths have been checked.
"""

from __future__ import annotations

import json
import math
import struct
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, TypeAlias

import ml_dtypes  # noqa: F401  (makes bfloat16 known to np.dtype)
import numpy as np

from tfspark._aligned import aligned_empty
from tfspark.errors import InvalidInputError, TrainingError
from tfspark.sync.frames import Message
from tfspark.sync.shared import Reference

MAGIC = b"TFG1"
MAX_HEADER_BYTES = 1 << 24
MAX_PAYLOAD_BYTES = 1 << 36

Place: TypeAlias = Callable[[int, str, str, np.dtype, tuple[int, ...]], "np.ndarray | None"]
Refuse: TypeAlias = Callable[[str], TrainingError]
_Entry: TypeAlias = "tuple[str, np.dtype, tuple[int, ...], Reference | None]"

_PREFIX = struct.Struct("<4sIQ")
# NumPy 1 makes no array of more dimensions.
_MOST_DIMENSIONS = 32
# A list, not `np.dtype(name)`: that would also make objects and records of what a peer sends.
_NAMES = """bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64
bfloat16 float8_e4m3fn float8_e5m2 complex64 complex128"""
_DTYPES = {name: np.dtype(name) for name in _NAMES.split()}


Share: TypeAlias = Callable[[np.ndarray], "Reference | None"]
Shared: TypeAlias = Callable[[Reference, np.dtype, "tuple[int, ...]", int], np.ndarray]


def encode(message: Message, share: Share | None = None) -> deque[memoryview]:
    """The bytes of a message, the arrays where they lie.

    Args:
        message: to send.
        share: lays an array where the receiver can read it, or returns None: then it is sent.
    """
    entries: list[tuple[Any, ...]] = []
    payload: list[memoryview] = []
    for name, array in message.arrays.items():
        dtype = _DTYPES.get(array.dtype.name)
        if dtype is None:
            raise InvalidInputError(
                f"Arrays of ranks are of: {', '.join(_DTYPES)}. Received: {name!r} of "
                f"{array.dtype}."
            )
        lain = share(array) if share and array.dtype == dtype else None
        entries.append((name, dtype.name, array.shape, *(lain or ())))
        if lain is None:
            payload.append(_bytes(np.asarray(array, dtype, order="C")))
    header = json.dumps([message.kind, message.source, dict(message.meta), entries]).encode()
    if len(header) > MAX_HEADER_BYTES:
        raise InvalidInputError(
            f"The header of a message has at most {MAX_HEADER_BYTES} bytes. Received: "
            f"{len(header)}. Send what is large as an array."
        )
    prefix = _PREFIX.pack(MAGIC, len(header), sum(view.nbytes for view in payload))
    return deque(view for view in (memoryview(prefix + header), *payload) if view.nbytes)


def decode(
    source: int, place: Place | None, shared: Shared | None, refuse: Refuse
) -> Generator[list[memoryview], None, Message]:
    """Yields the memory that the next bytes belong into; returns the message.

    Args:
        source: the rank that sends it.
        place: see `Links.exchange`.
        shared: gives the arrays that the source has laid where this rank can read them.
        refuse: makes the error of what is no message of this source.
    """
    prefix = bytearray(_PREFIX.size)
    yield [memoryview(prefix)]
    magic, header_bytes, payload_bytes = _PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise refuse(f"A message starts with {MAGIC!r}. Received: {magic!r}.")
    if header_bytes > MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        raise refuse(
            f"A message has at most {MAX_HEADER_BYTES} bytes of header and {MAX_PAYLOAD_BYTES} "
            f"of arrays. Received: lengths of {header_bytes} and {payload_bytes}."
        )
    header = bytearray(header_bytes)
    yield [memoryview(header)]
    kind, meta, entries = _parse(header, source, payload_bytes, refuse)
    arrays, sent = {}, []
    for name, dtype, shape, reference in entries:
        array = place(source, kind, name, dtype, shape) if place else None
        if array is not None:
            _check_place(name, array, dtype, shape, refuse)
        if reference is None:
            arrays[name] = aligned_empty(shape, dtype) if array is None else array
            sent.append(_bytes(arrays[name]))
            continue
        lain = _lain(name, dtype, shape, reference, shared, refuse)
        arrays[name] = lain if array is None else array
        if array is not None:
            np.copyto(array, lain)
    yield sent
    return Message(kind, source, meta, arrays)


def _lain(
    name: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
    reference: Reference,
    shared: Shared | None,
    refuse: Refuse,
) -> np.ndarray:
    try:
        if shared is None:
            raise ValueError("no memory is shared with it")
        return shared(reference, dtype, shape, math.prod(shape) * dtype.itemsize)
    except (OSError, ValueError) as error:
        raise refuse(
            f"Array {name!r} lies in memory that the peer shares. Received: {error}. It died, or "
            "runs another version of tfspark."
        ) from error


def _parse(
    header: bytearray, source: int, payload_bytes: int, refuse: Refuse
) -> tuple[str, dict[str, Any], list[_Entry]]:
    try:
        kind, sender, meta, listed = json.loads(header)
        entries = [
            (name, _DTYPES[dtype], tuple(shape), Reference(*lain) if lain else None)
            for name, dtype, shape, *lain in listed
        ]
        names = {name for name, *_ in entries}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise refuse(
            "The header of a message is JSON: kind, source, meta, and name, dtype, shape and "
            f"place of each array. Received: {bytes(header[:200])!r} "
            f"({type(error).__name__}: {error})."
        ) from error
    if type(sender) is not int or sender != source:
        raise refuse(f"A message names its sender, rank {source}. Received: {sender!r}.")
    if (
        not isinstance(kind, str)
        or not isinstance(meta, dict)
        or not all(isinstance(name, str) for name in names)
        or len(names) < len(entries)
        or not all(type(n) is int for *_, lain in entries for n in lain or ())
    ):
        raise refuse(
            "A message has a kind, an object of meta, and arrays of different names. Received: "
            f"{bytes(header[:200])!r}."
        )
    total_bytes = 0
    for name, dtype, shape, reference in entries:
        if (
            len(shape) > _MOST_DIMENSIONS
            or not all(type(size) is int and 0 <= size <= MAX_PAYLOAD_BYTES for size in shape)
            # Also of an array without elements: NumPy multiplies the sides that are not 0.
            or math.prod(max(size, 1) for size in shape) * dtype.itemsize > MAX_PAYLOAD_BYTES
        ):
            raise refuse(
                f"Array {name!r} has at most {_MOST_DIMENSIONS} dimensions and "
                f"{MAX_PAYLOAD_BYTES} bytes. Received: shape {str(shape)[:200]}."
            )
        if reference is None:
            total_bytes += math.prod(shape) * dtype.itemsize
    if total_bytes != payload_bytes:
        raise refuse(
            f"The arrays of a {kind!r} message have the announced {payload_bytes} bytes. "
            f"Received: shapes of {total_bytes} bytes."
        )
    return kind, meta, entries


def _check_place(
    name: str,
    array: np.ndarray,
    dtype: np.dtype,
    shape: tuple[int, ...],
    refuse: Refuse,
) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise refuse(
            f"Array {name!r} is expected as {array.dtype} {list(array.shape)}. Received: {dtype} "
            f"{list(shape)}. All ranks must run the same model and settings."
        )
    if not (array.flags.c_contiguous and array.flags.writeable):
        raise refuse(
            f"Array {name!r} is received into writable memory in one piece. Received: a place "
            f"with strides {array.strides}, writable: {array.flags.writeable}."
        )


def _bytes(array: np.ndarray) -> memoryview:
    """The memory of a C-contiguous array."""
    return array.reshape(-1).view(np.uint8).data
