"""Memory that ranks on one host share, so that large arrays need not pass a socket.

The sender copies an array into memory of its own (`Outbox`) and says in a message where; the
receiver (`Inbox`) reads it there. That is one copy instead of the two into and out of the kernel.
The message itself still goes over the socket: whoever has received it may read.

What every rank changes a part of and reads the whole of need not be copied at all: it lies once, in
memory that all of them write to (`Common`).

The memory is a `memfd` of Linux: it has no name that could clash or be left behind, the kernel
frees it when the last process that maps it has gone, and only processes of the same user can open
it, by way of `/proc`. Where that does not work (another host, another container, another system),
ranks notice it in `Links.share_memory` and arrays go over the socket.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import mmap
import os
import secrets
import stat
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from tfspark._aligned import ALIGNMENT

LEAST_BYTES = 1 << 15
"""Smaller arrays go over the socket, along with the header."""

_NAME = "tfspark"
_NONCE_BYTES = 32
_SEALS = 2 | 4  # F_SEAL_SHRINK and F_SEAL_GROW, which `fcntl` knows on Linux only
_serials = itertools.count(1)


class Reference(NamedTuple):
    """Where an array lies in the memory of the rank that sent it.

    Attributes:
        serial: of the segment; a rank uses each number once.
        descriptor: of the segment in the process that made it.
        offset: bytes from the start of the segment.
    """

    serial: int
    descriptor: int
    offset: int


def is_supported() -> bool:
    """Whether this system has memory of this kind."""
    return hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")


class _Segment:
    """Memory of this process that others may read; its size never changes."""

    def __init__(self, num_bytes: int):
        self.serial = next(_serials)
        self.descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, num_bytes)
            # A reader of memory that was cut off would be killed by the system.
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
            self.memory = np.frombuffer(mmap.mmap(self.descriptor, num_bytes), np.uint8)
        except OSError:
            os.close(self.descriptor)
            raise

    def close(self) -> None:
        os.close(self.descriptor)


class Probe:
    """What a rank shows its peers, for them to find out whether they can read its memory."""

    def __init__(self) -> None:
        self._segment = _Segment(mmap.PAGESIZE)
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._segment.memory[:_NONCE_BYTES] = np.frombuffer(self._nonce, np.uint8)

    @property
    def description(self) -> dict[str, Any]:
        """For `can_read`, as JSON holds it."""
        return {
            "process": os.getpid(),
            "descriptor": self._segment.descriptor,
            "nonce": self._nonce.hex(),
        }

    def close(self) -> None:
        """After all peers have tried."""
        self._segment.close()


def can_read(description: Any) -> bool:
    """Whether this process can read the memory that a `Probe` of another one describes."""
    match description:
        case {"process": int() as process, "descriptor": int() as descriptor, "nonce": str() as n}:
            with contextlib.suppress(OSError, ValueError):
                memory = _mapped(process, descriptor)
                return memory[:_NONCE_BYTES].tobytes().hex() == n
    return False


class Outbox:
    """Where a rank lays the arrays that peers read. What lies there is overwritten two turns later.

    So an array is good until the reader's exchange after the one that brought it: only when every
    reader has begun that one can the sender be two turns ahead.
    """

    def __init__(self) -> None:
        self._segments: list[_Segment | None] = [None, None]
        self._turn = 0
        self._end = 0
        self._placed: dict[int, Reference] = {}

    def begin(self, arrays: Iterable[np.ndarray]) -> None:
        """Starts a turn in which these arrays, and no others, may be `put`."""
        self._turn = 1 - self._turn
        self._end, self._placed = 0, {}
        sizes = {id(array): _padded(array.nbytes) for array in arrays if is_large(array)}
        needed = sum(sizes.values())
        segment = self._segments[self._turn]
        if segment is None or len(segment.memory) < needed:
            if segment is not None:
                segment.close()
            self._segments[self._turn] = _Segment(needed) if needed else None

    def put(self, array: np.ndarray) -> Reference | None:
        """Copies an array to where peers can read it, once however often it is put in a turn.

        Returns:
            where it lies; None if it is small.
        """
        if not is_large(array):
            return None
        known = self._placed.get(id(array))
        if known is None:
            segment = self._segments[self._turn]
            assert segment is not None, "begin() was told of every array"
            lain = segment.memory[self._end : self._end + array.nbytes].view(array.dtype)
            np.copyto(lain.reshape(array.shape), array)
            known = Reference(segment.serial, segment.descriptor, self._end)
            self._placed[id(array)] = known
            self._end += _padded(array.nbytes)
        return known

    def close(self) -> None:
        """Lets the memory go as soon as nobody maps it; may be called again."""
        for segment in self._segments:
            if segment is not None:
                segment.close()
        self._segments = [None, None]


class Common:
    """Memory that one rank makes and all ranks on its host read and write. It starts as zeros.

    Args:
        num_bytes: of it; greater than 0.
    """

    def __init__(self, num_bytes: int):
        self._segment = _Segment(num_bytes)
        self.memory = self._segment.memory

    @property
    def description(self) -> dict[str, Any]:
        """For `joined`, as JSON holds it."""
        return {"process": os.getpid(), "descriptor": self._segment.descriptor}

    @staticmethod
    def joined(description: Any, num_bytes: int) -> np.ndarray | None:
        """The memory that a `Common` of another process describes; None where it cannot be had."""
        match description:
            case {"process": int() as process, "descriptor": int() as descriptor}:
                with contextlib.suppress(OSError, ValueError):
                    memory = _mapped(process, descriptor, writable=True)
                    return memory if len(memory) == num_bytes else None
        return None

    def close(self) -> None:
        """After all others have joined: the memory stays until the last array of it has gone."""
        self._segment.close()


class Inbox:
    """The memory of one peer, as this rank reads it.

    Args:
        process: of the peer.
    """

    def __init__(self, process: int):
        self._process = process
        self._mapped: dict[int, np.ndarray] = {}  # by serial

    def array(
        self, reference: Reference, dtype: np.dtype, shape: tuple[int, ...], num_bytes: int
    ) -> np.ndarray:
        """The array that a peer refers to; it cannot be written to.

        Raises:
            OSError: the peer is gone.
            ValueError: there are not so many bytes.
        """
        memory = self._mapped.get(reference.serial)
        if memory is None:
            memory = _mapped(self._process, reference.descriptor)
            while len(self._mapped) > 1:  # a peer has two
                del self._mapped[min(self._mapped)]
            self._mapped[reference.serial] = memory
        stop = reference.offset + num_bytes
        if not 0 <= reference.offset <= stop <= len(memory) or reference.offset % ALIGNMENT:
            raise ValueError(f"{num_bytes} bytes at {reference.offset} of {len(memory)}")
        return memory[reference.offset : stop].view(dtype).reshape(shape)


def is_large(array: np.ndarray) -> bool:
    """Whether an array is worth sharing."""
    return array.nbytes >= LEAST_BYTES


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _mapped(process: int, descriptor: int, *, writable: bool = False) -> np.ndarray:
    """The memory behind a descriptor of another process.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is something else.
    """
    path = f"/proc/{process}/fd/{descriptor}"
    # The number may belong to anything: what is opened must not block, nor be changed by that.
    if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
        raise ValueError(f"{path} is no memory of a rank")
    opened = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        status = os.fstat(opened)
        sealed = fcntl.fcntl(opened, fcntl.F_GET_SEALS)
        if not stat.S_ISREG(status.st_mode) or sealed & _SEALS != _SEALS:
            raise ValueError(f"{path} could change its size")
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return np.frombuffer(mmap.mmap(opened, status.st_size, prot=access), np.uint8)
    finally:
        os.close(opened)
