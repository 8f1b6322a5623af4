"""The connections of one rank to all others, and the one thing done over them: an exchange.

In an exchange a rank sends one message to each of some peers and receives one from each of them,
all at the same time: one thread, sockets that never block. So no two ranks can wait for each
other to read, whatever the sizes. Bytes go from arrays into sockets and from sockets into arrays,
with no copy in between.

On a stream a message is `magic, header length, payload length, JSON header, raw arrays`. Nothing is
pickled, and nothing is allocated before the lengths have been checked.
"""

from __future__ import annotations

import json
import math
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import ml_dtypes  # noqa: F401  (makes bfloat16 known to np.dtype)
import numpy as np

from tfspark.errors import InvalidInputError, PeerLostError, TrainingError
from tfspark.sync.frames import Message

MAGIC = b"TFG1"
MAX_HEADER_BYTES = 1 << 24
MAX_PAYLOAD_BYTES = 1 << 36

Place: TypeAlias = Callable[[int, str, str, np.dtype, tuple[int, ...]], "np.ndarray | None"]

_PREFIX = struct.Struct("<4sIQ")
# NumPy 1 makes no array of more dimensions.
_MOST_DIMENSIONS = 32
# Far below the limit of the system (1024 on Linux), and more than a message of a step has arrays.
_MOST_VIEWS = 64
# A list, not `np.dtype(name)`: that would also make objects and records of what a peer sends.
_NAMES = """bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64
bfloat16 float8_e4m3fn float8_e5m2 complex64 complex128"""
_DTYPES = {name: np.dtype(name) for name in _NAMES.split()}


class Links:
    """One rank's connections to all other ranks. For one thread.

    After an error the streams stand somewhere within a message: all that is left is `close`.

    Args:
        rank: of this process.
        sockets: connected stream sockets by peer; they become non-blocking and are closed by
            `close`.
        control: a socket that is watched while an exchange waits, such as the connection to the
            driver; stays the caller's.
        on_control: called whenever `control` can be read; has to read it. May raise, which ends
            the exchange; step and phase are added to a `TrainingError`.

    Example:
        >>> left, right = socket.socketpair()
        >>> with Links(0, {1: left}) as links, Links(1, {0: right}) as others:
        ...     links.rank, links.size, links.peers
        (0, 2, (1,))
    """

    def __init__(
        self,
        rank: int,
        sockets: Mapping[int, socket.socket],
        *,
        control: socket.socket | None = None,
        on_control: Callable[[], None] | None = None,
    ):
        self.rank = rank
        self._sockets = dict(sockets)
        self._control = control
        self._on_control = on_control
        for peer in self._sockets.values():
            keep_alive(peer)
            peer.setblocking(False)

    @property
    def size(self) -> int:
        """The number of ranks, this one included."""
        return len(self._sockets) + 1

    @property
    def peers(self) -> tuple[int, ...]:
        """All other ranks, in order."""
        return tuple(sorted(self._sockets))

    def exchange(
        self,
        outgoing: Mapping[int, Message],
        *,
        phase: str,
        step: int,
        timeout_s: float,
        place: Place | None = None,
    ) -> dict[int, Message]:
        """Sends one message to each given peer and receives one from each of them.

        The arrays must not change until this returns.

        Args:
            outgoing: messages of this rank, by peer.
            phase, step: named in errors.
            timeout_s: how long no byte may go to or come from any peer that is still owed one.
                A slow transfer of any length is no time-out.
            place: `place(source, kind, name, dtype, shape)` may give the array that is received
                into, writable and C-contiguous; None allocates one.

        Returns:
            the received messages, by peer in the order of `outgoing`.

        Raises:
            PeerLostError: a peer closed its connection, or all that are owed were silent.
            TrainingError: a peer sent what is no message of its own.
        """
        if not outgoing.keys() <= self._sockets.keys():
            raise InvalidInputError(
                f"Rank {self.rank} exchanges with ranks it is connected to: {list(self.peers)}. "
                f"Received: {sorted(outgoing)}."
            )
        where: dict[str, Any] = {"rank": self.rank, "step": step, "phase": phase}
        channels = {
            peer: _Channel(
                self._sockets[peer],
                _encode(message),
                _decode(peer, place, partial(TrainingError, **where, peer=peer)),
            )
            for peer, message in outgoing.items()
        }
        # poll, not epoll: no file descriptor and no system call to set it up for every exchange.
        with selectors.PollSelector() as selector:
            if self._control is not None:
                selector.register(self._control, selectors.EVENT_READ)
            for peer, channel in channels.items():
                _move(channel, selectors.EVENT_WRITE, where, peer)
                selector.register(channel.socket, channel.events, peer)
            unfinished = set(channels)
            deadline = time.monotonic() + timeout_s
            while unfinished:
                moved = False
                for key, events in selector.select(max(0.0, deadline - time.monotonic())):
                    if key.data is None:
                        self._hear(where)
                        continue
                    channel = channels[key.data]
                    moved |= _move(channel, events, where, key.data)
                    if not channel.events:
                        selector.unregister(channel.socket)
                        unfinished.remove(key.data)
                    elif channel.events != key.events:
                        selector.modify(channel.socket, channel.events, key.data)
                if moved:
                    deadline = time.monotonic() + timeout_s
                elif time.monotonic() >= deadline:
                    raise _silent(channels, sorted(unfinished), timeout_s, where)
        return {peer: channel.received() for peer, channel in channels.items()}

    def _hear(self, where: Mapping[str, Any]) -> None:
        assert self._on_control is not None, "control comes with on_control"
        try:
            self._on_control()
        except TrainingError as error:
            raise located(error, where) from error

    def close(self) -> None:
        """Closes the connections to all peers; may be called again."""
        for peer in self._sockets.values():
            peer.close()

    def __enter__(self) -> Links:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def keep_alive(connection: socket.socket) -> None:
    """Makes a TCP connection prompt, and end some ten seconds after the other host vanished.

    `TCP_USER_TIMEOUT` is no part of this: it also ends the connection to a peer that is alive but
    does not read for that long, because it computes. Other sockets are left as they are.
    """
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not every platform has each of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def located(error: TrainingError, where: Mapping[str, Any]) -> TrainingError:
    """The same error, which also says what the rank was doing."""
    return type(error)(error.message, **{**where, **error.where})


class _Channel:
    """One peer's part of an exchange: what is still to be sent, and where what comes goes."""

    def __init__(
        self,
        connection: socket.socket,
        outgoing: deque[memoryview],
        decoder: Generator[list[memoryview], None, Message],
    ):
        self.socket = connection
        self.outgoing = outgoing
        self.incoming: deque[memoryview] = deque()
        self._decoder = decoder
        self._message: Message | None = None
        self._fill_incoming()

    @property
    def awaits(self) -> bool:
        """Whether the peer's message is not complete."""
        return self._message is None

    @property
    def events(self) -> int:
        """What it waits for; 0 when both directions are done."""
        return (selectors.EVENT_WRITE if self.outgoing else 0) | (
            selectors.EVENT_READ if self.awaits else 0
        )

    def received(self) -> Message:
        """The whole message."""
        assert self._message is not None, "events is 0"
        return self._message

    def send(self) -> bool:
        """Sends what the socket takes; whether that was anything."""
        try:
            count = self.socket.sendmsg(list(islice(self.outgoing, _MOST_VIEWS)))
        except BlockingIOError:
            return False
        _advance(self.outgoing, count)
        return True

    def receive(self) -> bool:
        """Receives what is there; whether that was anything."""
        moved = False
        while self.awaits:
            try:
                count = self.socket.recvmsg_into(list(islice(self.incoming, _MOST_VIEWS)))[0]
            except BlockingIOError:
                break
            if count == 0:
                raise ConnectionAbortedError("it was closed by the peer")
            moved = True
            _advance(self.incoming, count)
            if self.incoming:
                break  # the others' turn
            # What follows a prefix or a header has mostly come along with it.
            self._fill_incoming()
        return moved

    def _fill_incoming(self) -> None:
        while not self.incoming and self.awaits:
            try:
                views = next(self._decoder)
            except StopIteration as end:
                self._message = end.value
            else:
                self.incoming.extend(view for view in views if view.nbytes)


def _advance(views: deque[memoryview], count: int) -> None:
    """Drops the first `count` bytes."""
    while count:
        first = views.popleft()
        if count < first.nbytes:
            views.appendleft(first[count:])
            return
        count -= first.nbytes


def _move(channel: _Channel, events: int, where: Mapping[str, Any], peer: int) -> bool:
    """Sends and receives what can be; whether that was any byte."""
    moved = False
    try:
        if events & selectors.EVENT_READ and channel.events & selectors.EVENT_READ:
            moved |= channel.receive()
        if events & selectors.EVENT_WRITE and channel.events & selectors.EVENT_WRITE:
            moved |= channel.send()
    except OSError as error:
        raise PeerLostError(
            f"The connection to rank {peer} was lost ({error}): its process died, its host is "
            f"gone, or it stopped because of an error of its own. See the log of rank {peer}.",
            **where,
            peer=peer,
        ) from error
    return moved


def _silent(
    channels: Mapping[int, _Channel],
    peers: list[int],
    timeout_s: float,
    where: Mapping[str, Any],
) -> PeerLostError:
    owed = ", ".join(
        f"rank {peer} ({'message missing' if channels[peer].awaits else 'does not read'})"
        for peer in peers
    )
    return PeerLostError(
        f"A rank in an exchange may be silent for {timeout_s:g} s. Received: no byte for so long, "
        f"waiting for {owed}. See the logs there; raise the time-out if they were only slow.",
        **where,
        peer=peers[0] if len(peers) == 1 else peers,
    )


def _encode(message: Message) -> deque[memoryview]:
    """The bytes of a message, the arrays where they lie."""
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    payload: list[memoryview] = []
    for name, array in message.arrays.items():
        dtype = _DTYPES.get(array.dtype.name)
        if dtype is None:
            raise InvalidInputError(
                f"Arrays of ranks are of: {', '.join(_DTYPES)}. Received: {name!r} of "
                f"{array.dtype}."
            )
        array = np.asarray(array, dtype, order="C")
        entries.append((name, dtype.name, array.shape))
        payload.append(_bytes(array))
    header = json.dumps([message.kind, message.source, dict(message.meta), entries]).encode()
    if len(header) > MAX_HEADER_BYTES:
        raise InvalidInputError(
            f"The header of a message has at most {MAX_HEADER_BYTES} bytes. Received: "
            f"{len(header)}. Send what is large as an array."
        )
    prefix = _PREFIX.pack(MAGIC, len(header), sum(view.nbytes for view in payload))
    return deque(view for view in (memoryview(prefix + header), *payload) if view.nbytes)


def _decode(
    source: int, place: Place | None, refuse: Callable[[str], TrainingError]
) -> Generator[list[memoryview], None, Message]:
    """Yields the memory that the next bytes belong into; returns the message."""
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
    arrays = {}
    for name, dtype, shape in entries:
        array = place(source, kind, name, dtype, shape) if place else None
        arrays[name] = np.empty(shape, dtype) if array is None else array
        _check_place(name, arrays[name], dtype, shape, refuse)
    yield [_bytes(array) for array in arrays.values()]
    return Message(kind, source, meta, arrays)


def _parse(
    header: bytearray, source: int, payload_bytes: int, refuse: Callable[[str], TrainingError]
) -> tuple[str, dict[str, Any], list[tuple[str, np.dtype, tuple[int, ...]]]]:
    try:
        kind, sender, meta, listed = json.loads(header)
        entries = [(name, _DTYPES[dtype], tuple(shape)) for name, dtype, shape in listed]
        names = {name for name, _, _ in entries}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise refuse(
            "The header of a message is JSON: kind, source, meta, and name, dtype and shape of "
            f"each array. Received: {bytes(header[:200])!r} ({type(error).__name__}: {error})."
        ) from error
    if type(sender) is not int or sender != source:
        raise refuse(f"A message names its sender, rank {source}. Received: {sender!r}.")
    if (
        not isinstance(kind, str)
        or not isinstance(meta, dict)
        or not all(isinstance(name, str) for name in names)
        or len(names) < len(entries)
    ):
        raise refuse(
            "A message has a kind, an object of meta, and arrays of different names. Received: "
            f"{bytes(header[:200])!r}."
        )
    total_bytes = 0
    for name, dtype, shape in entries:
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
    refuse: Callable[[str], TrainingError],
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
