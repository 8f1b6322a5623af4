"""The connections of one rank to all others, and the one thing done over them: an exchange.

In an exchange a rank sends one message to each of some peers and receives one from each of them,
all at the same time: one thread, sockets that never block. So no two ranks can wait for each
other to read, whatever the sizes. Bytes go from arrays into sockets and from sockets into arrays,
with no copy in between (`stream.py`); large arrays of ranks on one host go through memory that both
see (`shared.py`).
"""

from __future__ import annotations

import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from tfspark.errors import InvalidInputError, PeerLostError, TrainingError
from tfspark.sync.frames import Message
from tfspark.sync.shared import Common, Inbox, Outbox, Probe, can_read, is_supported
from tfspark.sync.stream import Place, decode, encode

# Far below the limit of the system (1024 on Linux), and more than a message of a step has arrays.
_MOST_VIEWS = 64


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
        self._outbox: Outbox | None = None
        self._readers: frozenset[int] = frozenset()  # peers that can read the outbox
        self._inboxes: dict[int, Inbox] = {}
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

    @property
    def sharing(self) -> frozenset[int]:
        """The peers that large arrays reach through shared memory."""
        return self._readers

    def share_memory(self, *, step: int, timeout_s: float) -> None:
        """Finds out with which peers memory can be shared, and does so from now on.

        All ranks have to call it at the same place of the program.

        Args:
            step, timeout_s: see `exchange`.
        """
        probe = Probe() if is_supported() else None
        try:
            description = probe.description if probe else None
            shown = self._tell_all({"probe": description}, step, timeout_s)
            seen = [peer for peer, meta in shown.items() if can_read(meta.get("probe"))]
            answers = self._tell_all({"seen": seen}, step, timeout_s)
        finally:
            if probe:
                probe.close()
        self._inboxes = {peer: Inbox(shown[peer]["probe"]["process"]) for peer in seen}
        self._readers = frozenset(p for p, meta in answers.items() if self.rank in meta["seen"])
        if self._readers:
            self._outbox = Outbox()

    def common_memory(self, num_bytes: int, *, step: int, timeout_s: float) -> np.ndarray | None:
        """Memory that all ranks read and write, each in its own process.

        What a rank has written, a peer may read as soon as it has a message that was sent
        afterwards. All ranks have to call it at the same place of the program.

        Args:
            num_bytes: the same on all ranks; greater than 0.
            step, timeout_s: see `exchange`.

        Returns:
            uint8 `[num_bytes]`, zeros at first, good for as long as the array is kept. None on all
            ranks where some cannot share memory.
        """
        makes = self.rank == 0 and self._readers == self._sockets.keys()
        common = Common(num_bytes) if makes else None
        try:
            shown = self._tell_all(
                {"common": common.description if common else None}, step, timeout_s
            )
            if self.rank == 0:
                memory = common.memory if common else None
            else:
                memory = Common.joined(shown[0]["common"], num_bytes)
            answers = self._tell_all({"joined": memory is not None}, step, timeout_s)
        finally:
            if common:
                common.close()
        return memory if all(answer["joined"] for answer in answers.values()) else None

    def leave(self, *, step: int, timeout_s: float) -> None:
        """Waits until every peer has read what this rank has sent, and closes the connections.

        A rank's memory goes with its links, and a peer opens it only when it reads. All ranks
        have to call it at the same place of the program.

        Args:
            step, timeout_s: see `exchange`.
        """
        leaving = Message("leave", self.rank)
        self.exchange(
            dict.fromkeys(self.peers, leaving), phase="leave", step=step, timeout_s=timeout_s
        )
        self.close()

    def _tell_all(
        self, meta: Mapping[str, Any], step: int, timeout_s: float
    ) -> dict[int, Mapping[str, Any]]:
        message = Message("memory", self.rank, meta)
        received = self.exchange(
            dict.fromkeys(self.peers, message), phase="memory", step=step, timeout_s=timeout_s
        )
        return {peer: answer.meta for peer, answer in received.items()}

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
            the received messages, by peer in the order of `outgoing`. Arrays without a place may
            be read-only, and are good until the next exchange.

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
        outbox = self._outbox if len(outgoing) == len(self._sockets) else None
        if outbox is not None:
            # The turns of an outbox count on all peers taking part in every exchange.
            outbox.begin(a for peer in self._readers for a in outgoing[peer].arrays.values())
        channels = {
            peer: _Channel(
                self._sockets[peer],
                encode(message, outbox.put if outbox and peer in self._readers else None),
                decode(
                    peer,
                    place,
                    self._inboxes[peer].array if peer in self._inboxes else None,
                    partial(TrainingError, **where, peer=peer),
                ),
            )
            # The next rank first: where all begin with rank 0, its link alone is busy.
            for peer, message in sorted(
                outgoing.items(), key=lambda item: (item[0] - self.rank) % self.size
            )
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
        return {peer: channels[peer].received() for peer in outgoing}

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
        self._inboxes.clear()
        if self._outbox is not None:
            self._outbox.close()

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
