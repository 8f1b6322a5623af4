"""A rank's side of a rendezvous: it meets all others and connects to them."""

from __future__ import annotations

import contextlib
import errno
import hmac
import os
import selectors
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NoReturn

from tfspark.errors import InvalidInputError, PeerLostError, TrainingError
from tfspark.sync.control import (
    MAX_LINE_BYTES,
    MAX_TEXT,
    PROMPT_S,
    Lines,
    NoMessageError,
    encoded_line,
    listen,
    named,
    utf8,
    watch,
)
from tfspark.sync.links import Links, located

# Of a message of the driver: it lists all ranks.
_MAX_ANSWER_BYTES = 1 << 24
_WILDCARDS = ("0.0.0.0", "::")
# Magic, attempt, who connects, to whom; and that keyed with the token, which itself is not sent.
_HELLO = struct.Struct("<4sIII")
_HELLO_BYTES = _HELLO.size + 32


class Member:
    """A rank's side; made by `join`. For one thread.

    Attributes:
        rank: of this process.
        is_interrupted: whether the driver has asked to end the round at a commit.
        control: its connection to the driver.
        links: to all other ranks. While an exchange waits, it ends when the driver ends the round.
    """

    links: Links

    def __init__(self, rank: int, control: socket.socket):
        self.rank = rank
        self.control = control
        self._lines = Lines(_MAX_ANSWER_BYTES)
        self._dismissed = False
        self.is_interrupted = False

    @classmethod
    def join(
        cls,
        address: tuple[str, int],
        token: str,
        rank: int,
        attempt: int,
        num_ranks: int,
        *,
        bind_host: str,
        ports: range | None = None,
        timeout_s: float,
    ) -> Member:
        """Meets all other ranks of the attempt and connects to them.

        Args:
            address: of the `Rendezvous`.
            token: its secret.
            rank, attempt, num_ranks: who joins what.
            bind_host: where this rank listens for the others. For all interfaces ("0.0.0.0"),
                the others are given the address that this host reaches the driver from.
            ports: the first free one is listened at; None lets the system choose.
            timeout_s: for all of it.

        Raises:
            TrainingError: no free port, no driver, ranks that have not come, or the round ended.
            PeerLostError: a rank that had come is gone again.
        """
        deadline = time.monotonic() + timeout_s
        with ExitStack() as undo:
            where = {"rank": rank, "phase": "rendezvous"}
            listener = listen(bind_host, ports or (0,), backlog=num_ranks + 128, where=where)
            with listener:
                try:
                    control = socket.create_connection(address, timeout_s)
                except OSError as error:
                    raise TrainingError(
                        "Every rank connects to the driver. Received: "
                        f"{error} for {address[0]}:{address[1]}. Check that the driver runs, and "
                        "that a firewall lets executors reach it.",
                        **where,
                    ) from error
                watch(control)
                member = cls(rank, undo.enter_context(control))
                try:
                    sockets = member._meet(listener, token, attempt, timeout_s, deadline)
                except TrainingError as error:
                    error = located(error, where)
                    member.failed(str(error))  # or the driver would only see it leave
                    raise error from None
            member.links = Links(rank, sockets, control=control, on_control=member.check)
            undo.pop_all()
        return member

    def report(self, report: Mapping[str, Any]) -> None:
        """Sends the driver anything that JSON holds in less than `MAX_LINE_BYTES`."""
        self._send({"report": dict(report)})

    def done(self) -> None:
        """Says that all is done: from now on this rank may leave."""
        self._send({"done": True})

    def failed(self, text: str) -> None:
        """Says why this rank ends; the driver names it to all others.

        Says nothing after the driver ended the round, which is then why this rank ends. Never
        raises because the driver is gone: that would hide what failed.
        """
        if not self._dismissed:
            with contextlib.suppress(TrainingError):
                self._send({"failed": text[:MAX_TEXT]})

    def check(self) -> None:
        """Reads what the driver has sent, without waiting.

        Raises:
            TrainingError: the driver ended the round.
            PeerLostError: the driver is gone.
        """
        self._receive()

    def close(self) -> None:
        """Leaves; without `done` before, that is a failure. May be called again."""
        self.links.close()
        self.control.close()

    def __enter__(self) -> Member:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _meet(
        self,
        listener: socket.socket,
        token: str,
        attempt: int,
        timeout_s: float,
        deadline: float,
    ) -> dict[int, socket.socket]:
        host, port = listener.getsockname()[:2]
        host = self.control.getsockname()[0] if host in _WILDCARDS else host
        self._send(
            {"token": token, "attempt": attempt, "rank": self.rank, "host": host, "port": port}
        )
        peers = self._wait_for_peers(timeout_s, deadline)
        return _Mesh(self, token, attempt, peers, listener).connect(timeout_s, deadline)

    def _wait_for_peers(self, timeout_s: float, deadline: float) -> list[tuple[str, int]]:
        missing = "any other rank"
        with selectors.PollSelector() as selector:
            selector.register(self.control, selectors.EVENT_READ)
            while True:
                for message in self._receive():
                    if "peers" in message:
                        return [(host, port) for host, port in message["peers"]]
                    missing = message.get("missing", missing)
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TrainingError(
                        f"All ranks meet within {timeout_s:g} s. Received: no word of {missing}. "
                        "Give Spark as many free slots as there are ranks, or raise the time-out.",
                        rank=self.rank,
                        phase="rendezvous",
                    )
                selector.select(left)

    def _receive(self) -> list[dict[str, Any]]:
        try:
            data = self.control.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError as error:
            self._driver_gone(error)
        if not data:
            self._driver_gone(None)
        try:
            messages = self._lines.feed(data)
        except NoMessageError as error:
            raise TrainingError(
                f"The driver sends lines of JSON. Received: {error}. Check that all hosts have "
                "the same version of tfspark.",
                rank=self.rank,
            ) from error
        for message in messages:
            if "interrupt" in message:
                self.is_interrupted = True
            if "abort" in message:
                self._dismissed = True
                raise TrainingError(
                    f"The driver ended the round: {message['abort']}", rank=self.rank
                )
        return messages

    def _send(self, message: Mapping[str, Any]) -> None:
        line = encoded_line(message)
        if len(line) > MAX_LINE_BYTES:
            raise InvalidInputError(
                f"A control message has at most {MAX_LINE_BYTES} bytes. Received: {len(line)}. "
                "Send what is large through the links."
            )
        self.control.settimeout(PROMPT_S)
        try:
            self.control.sendall(line)
        except OSError as error:
            self.control.setblocking(False)
            self.check()  # it may have said why, before it closed
            self._driver_gone(error)
        self.control.setblocking(False)

    def _driver_gone(self, error: OSError | None) -> NoReturn:
        raise PeerLostError(
            f"The driver is gone ({error or 'it closed the connection'}): the round cannot end "
            "in a commit. See the driver's log.",
            rank=self.rank,
            peer="driver",
        ) from error


class _Mesh:
    """Connects one rank to all others: it calls the lower ones and is called by the higher ones."""

    def __init__(
        self,
        member: Member,
        token: str,
        attempt: int,
        peers: Sequence[tuple[str, int]],
        listener: socket.socket,
    ):
        self._member = member
        self._token = token
        self._attempt = attempt
        self._peers = peers
        self._listener = listener
        self._pending: set[socket.socket] = set()
        self._sockets: dict[int, socket.socket] = {}
        # What is registered with a socket is the function to call when it is ready.
        self._selector = selectors.PollSelector()

    def connect(self, timeout_s: float, deadline: float) -> dict[int, socket.socket]:
        """The connections by peer. Whoever else calls meanwhile is not heard."""
        member, rank = self._member, self._member.rank
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(member.control, selectors.EVENT_READ, member.check)
        with ExitStack() as undo:
            undo.callback(self._close)
            for peer in range(rank):
                self._call(peer)
            while missing := set(range(len(self._peers))) - set(self._sockets) - {rank}:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise PeerLostError(
                        f"All ranks connect to each other within {timeout_s:g} s. Received: no "
                        f"connection with {named(sorted(missing))}. Check that a firewall lets "
                        "executors reach each other.",
                        rank=rank,
                        phase="rendezvous",
                        peer=sorted(missing),
                    )
                for key, _ in self._selector.select(left):
                    key.data()
            undo.pop_all()
        for caller in self._pending:
            caller.close()
        return self._sockets

    def _close(self) -> None:
        for connection in (*self._pending, *self._sockets.values()):
            connection.close()

    def _call(self, peer: int) -> None:
        host, port = self._peers[peer]
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )[0]
            connection = socket.socket(family, kind, protocol)
        except OSError as error:
            raise self._unreachable(peer, error) from error
        self._pending.add(connection)
        connection.setblocking(False)
        code = connection.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            raise self._unreachable(peer, OSError(code, os.strerror(code)))
        self._selector.register(
            connection, selectors.EVENT_WRITE, partial(self._greet, peer, connection)
        )

    def _greet(self, peer: int, connection: socket.socket) -> None:
        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise self._unreachable(peer, OSError(code, os.strerror(code)))
        try:
            # A new connection takes so few bytes at once.
            connection.sendall(_hello(self._token, self._attempt, self._member.rank, peer))
        except OSError as error:
            raise self._unreachable(peer, error) from error
        self._settle(connection)
        self._sockets[peer] = connection

    def _accept(self) -> None:
        try:
            caller, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # it went away again
        self._pending.add(caller)
        caller.setblocking(False)
        self._selector.register(
            caller, selectors.EVENT_READ, partial(self._hear, caller, bytearray())
        )

    def _hear(self, caller: socket.socket, hello: bytearray) -> None:
        try:
            # Not one byte more: what follows belongs to the first exchange.
            data = caller.recv(_HELLO_BYTES - len(hello))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        hello += data
        if data and len(hello) < _HELLO_BYTES:
            return
        self._settle(caller)
        peer = self._identify(bytes(hello)) if data else None
        if peer is None:
            caller.close()
        else:
            self._sockets[peer] = caller

    def _settle(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._pending.remove(connection)

    def _identify(self, hello: bytes) -> int | None:
        _, _, peer, _ = _HELLO.unpack_from(hello)
        expected = _hello(self._token, self._attempt, peer, self._member.rank)
        known = hmac.compare_digest(hello, expected)
        higher = self._member.rank < peer < len(self._peers)
        return peer if known and higher and peer not in self._sockets else None

    def _unreachable(self, peer: int, error: OSError) -> PeerLostError:
        host, port = self._peers[peer]
        return PeerLostError(
            f"All ranks connect to each other. Received: {error} for rank {peer} at {host}:{port}. "
            "Check that it runs, and that a firewall lets executors reach each other.",
            rank=self._member.rank,
            phase="rendezvous",
            peer=peer,
        )


def _hello(token: str, attempt: int, rank: int, peer: int) -> bytes:
    """What rank `rank` says first to rank `peer`; always of the same length."""
    content = _HELLO.pack(b"TFH1", attempt, rank, peer)
    return content + hmac.digest(utf8(token), content, "sha256")
