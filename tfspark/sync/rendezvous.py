"""How the ranks of a round find each other, and how they learn that it has ended.

The driver runs a `Rendezvous`; each rank joins it as a `Member`. A rank says where it listens, is
told where all others do, and connects to them. Its connection to the driver stays open: over it go
reports, and whoever fails is named to all others at once. Control messages only, lines of JSON;
nothing is pickled, and nobody without the token is listened to.

    rank → driver   {"token", "attempt", "rank", "host", "port"}   first, once
                    {"report": {…}}  {"done": true}  {"failed": "text"}
    driver → rank   {"missing": "rank 3"}   who has not come yet
                    {"peers": [[host, port], …]}   by rank, once all have come
                    {"abort": "reason"}

An *attempt* is one try of the barrier stage: Spark starts all ranks of it anew if one has failed.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import os
import queue
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from tfspark.errors import InvalidInputError, TrainingError
from tfspark.sync.links import Links, PeerLostError, keep_alive, located

MAX_LINE_BYTES = 1 << 16

# JSON makes at most 12 bytes of a character: fits a line.
_MOST_TEXT = 5000
# Of a message of the driver: it lists all ranks.
_MAX_ANSWER_BYTES = 1 << 24
# How long a new connection may take to say who it is, and a control message to be sent.
_PROMPT_S = 10.0
_WILDCARDS = ("0.0.0.0", "::")
# Magic, attempt, who connects, to whom; and that keyed with the token, which itself is not sent.
_HELLO = struct.Struct("<4sIII")
_HELLO_BYTES = _HELLO.size + 32


class Rendezvous:
    """The driver's side. A context manager: it listens from `__enter__` to `__exit__`.

    Args:
        host: of the driver, as the ranks reach it.
        num_ranks: N.
        token: a secret of this round; connections without it change nothing.
        on_report: called as `on_report(rank, report)` in the thread of the server. If it raises,
            that thread ends and the ranks see that the driver is gone.
    """

    def __init__(
        self,
        host: str,
        num_ranks: int,
        *,
        token: str,
        on_report: Callable[[int, dict[str, Any]], None],
    ):
        self._host = host
        self._num_ranks = num_ranks
        self._token = token
        self._on_report = on_report
        self._attempt = -1
        self._members: dict[int, _Connection] = {}  # of the newest attempt, by rank
        self._failures: list[tuple[int, str]] = []
        self._ended: str | None = None  # why this attempt ends
        self._aborted: str | None = None  # why no attempt will run any more
        self._aborts: queue.SimpleQueue[tuple[str, int | None]] = queue.SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="rendezvous", daemon=True)

    def __enter__(self) -> Rendezvous:
        self._listener = _listen(self._host, (0,), backlog=self._num_ranks + 128)
        self._listener.setblocking(False)
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._rouse()
        self._thread.join()
        self._wake.close()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that ranks join at."""
        return self._host, self._listener.getsockname()[1]

    @property
    def failures(self) -> list[tuple[int, str]]:
        """(rank, text) of the newest attempt, in order of arrival: the first is the cause."""
        return list(self._failures)

    def abort(self, reason: str, rank: int | None = None) -> None:
        """Ends the round, for ranks that come later too. Returns at once; any thread may call it.

        Args:
            reason: shown by every rank.
            rank: whose failure it is, which is then noted; None if it is nobody's.
        """
        self._aborts.put((reason, rank))
        self._rouse()

    def _rouse(self) -> None:
        # Full: it is awake already. Closed: the server has ended, and with it all connections.
        with contextlib.suppress(OSError):
            self._wake.send(b"!")

    def _serve(self) -> None:
        try:
            while not self._stopping:
                strangers = [c for c in self._connections() if c.rank is None]
                for key, events in self._selector.select(1.0 if strangers else None):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj is self._woken:
                        self._woken.recv(4096)
                    elif not key.data.closed:
                        self._attend(key.data, events)
                now = time.monotonic()
                for stranger in strangers:
                    if stranger.rank is None and now >= stranger.deadline and not stranger.closed:
                        self._drop(stranger)
                self._obey()
            self._obey()  # an abort right before the end
        finally:
            # Whatever ends this thread, the ranks see their connections close.
            for connection in self._connections():
                with contextlib.suppress(OSError):
                    connection.send()
                connection.close()
            self._selector.close()
            self._listener.close()
            self._woken.close()

    def _connections(self) -> list[_Connection]:
        return [key.data for key in self._selector.get_map().values() if key.data is not None]

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # it went away again
        _watch(accepted)
        accepted.setblocking(False)
        connection = _Connection(accepted, time.monotonic() + _PROMPT_S)
        self._selector.register(accepted, selectors.EVENT_READ, connection)

    def _attend(self, connection: _Connection, events: int) -> None:
        messages = []
        try:
            if events & selectors.EVENT_WRITE and connection.send():
                if connection.leaving:
                    self._drop(connection)
                    return
                self._selector.modify(connection.socket, selectors.EVENT_READ, connection)
            if events & selectors.EVENT_READ:
                messages = connection.receive()
        except BlockingIOError:
            return
        except (OSError, _NoMessageError) as error:
            self._drop(connection, str(error))
        for message in messages:
            if connection.leaving or connection.closed:
                return
            if not self._handle(connection, message):
                self._drop(connection, f"it sent what is no message: {str(message)[:200]}")

    def _handle(self, connection: _Connection, message: Mapping[str, Any]) -> bool:
        """Whether it was a message that this connection may send."""
        if connection.rank is None:
            return self._register(connection, message)
        match message:
            case {"report": dict() as report}:
                self._on_report(connection.rank, report)
            case {"done": True}:
                connection.finished = True
            case {"failed": str() as text}:
                connection.finished = True
                self._fail(connection.rank, text)
            case _:
                return False
        return True

    def _register(self, connection: _Connection, message: Mapping[str, Any]) -> bool:
        match message:
            case {
                "token": str() as token,
                "attempt": int() as attempt,
                "rank": int() as rank,
                "host": str() as host,
                "port": int() as port,
            } if 0 <= rank < self._num_ranks and 0 <= attempt < 2**32 and 0 < port < 2**16:
                if not hmac.compare_digest(_utf8(token), _utf8(self._token)):
                    return False
            case _:
                return False
        if attempt > self._attempt:
            self._begin(attempt)
        if attempt < self._attempt:
            self._dismiss(connection, f"attempt {self._attempt} of the stage has replaced it.")
        elif self._ended is not None:
            self._dismiss(connection, self._ended)
        elif rank in self._members:
            self._dismiss(connection, f"rank {rank} has joined already.")
        else:
            connection.rank, connection.address = rank, (host, port)
            self._members[rank] = connection
            missing = sorted(set(range(self._num_ranks)) - set(self._members))
            answer = (
                {"missing": _named(missing)}
                if missing
                else {"peers": [self._members[r].address for r in range(self._num_ranks)]}
            )
            for member in self._members.values():
                self._send(member, answer)
        return True

    def _begin(self, attempt: int) -> None:
        for member in self._members.values():
            self._dismiss(member, f"attempt {attempt} of the stage has replaced it.")
        self._attempt, self._members, self._failures = attempt, {}, []
        self._ended = self._aborted

    def _obey(self) -> None:
        while not self._aborts.empty():
            reason, rank = self._aborts.get()
            if rank is None:
                self._end(reason)
            else:
                self._fail(rank, reason)
            self._aborted = self._aborted or self._ended

    def _fail(self, rank: int, text: str) -> None:
        self._failures.append((rank, text))
        self._end(f"rank {rank}: {text}", cause=rank)

    def _end(self, reason: str, cause: int | None = None) -> None:
        if self._ended is None:
            self._ended = reason[:_MOST_TEXT]
            for rank, member in self._members.items():
                if rank != cause or not member.finished:
                    self._send(member, {"abort": self._ended})

    def _dismiss(self, connection: _Connection, reason: str) -> None:
        connection.leaving = True
        self._send(connection, {"abort": reason})

    def _send(self, connection: _Connection, message: Mapping[str, Any]) -> None:
        # Only noted: the loop sends, so an error of one connection is met in one place.
        connection.outgoing += _line(message)
        self._selector.modify(
            connection.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, connection
        )

    def _drop(self, connection: _Connection, why: str = "") -> None:
        self._selector.unregister(connection.socket)
        connection.close()
        rank = connection.rank
        if rank is not None and self._members.get(rank) is connection:
            del self._members[rank]
            if not connection.finished and self._ended is None:
                self._fail(
                    rank,
                    f"its connection to the driver ended before it was done ({why}). Its process "
                    "died or its host is gone; see its log.",
                )


class Member:
    """A rank's side; made by `join`. For one thread.

    Attributes:
        rank: of this process.
        control: its connection to the driver.
        links: to all other ranks. While an exchange waits, it ends when the driver ends the round.
    """

    links: Links

    def __init__(self, rank: int, control: socket.socket):
        self.rank = rank
        self.control = control
        self._lines = _Lines(_MAX_ANSWER_BYTES)
        self._dismissed = False

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
            listener = _listen(bind_host, ports or (0,), backlog=num_ranks + 128, where=where)
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
                _watch(control)
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
                self._send({"failed": text[:_MOST_TEXT]})

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
        except _NoMessageError as error:
            raise TrainingError(
                f"The driver sends lines of JSON. Received: {error}. Check that all hosts have "
                "the same version of tfspark.",
                rank=self.rank,
            ) from error
        for message in messages:
            if "abort" in message:
                self._dismissed = True
                raise TrainingError(
                    f"The driver ended the round: {message['abort']}", rank=self.rank
                )
        return messages

    def _send(self, message: Mapping[str, Any]) -> None:
        line = _line(message)
        if len(line) > MAX_LINE_BYTES:
            raise InvalidInputError(
                f"A control message has at most {MAX_LINE_BYTES} bytes. Received: {len(line)}. "
                "Send what is large through the links."
            )
        self.control.settimeout(_PROMPT_S)
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
                        f"connection with {_named(sorted(missing))}. Check that a firewall lets "
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


class _NoMessageError(ValueError):
    """A peer sent what is no message of this protocol."""


class _Lines:
    """Bytes to JSON objects, one per line."""

    def __init__(self, most_bytes: int):
        self._most_bytes = most_bytes
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if max(map(len, (*lines, self._rest))) > self._most_bytes:
            raise _NoMessageError(f"a line of more than {self._most_bytes} bytes")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:
            raise _NoMessageError(f"no JSON ({error})") from error
        if not all(isinstance(message, dict) for message in messages):
            raise _NoMessageError("a line that is no JSON object")
        return messages


@dataclass(eq=False)
class _Connection:
    """One connection as the driver sees it.

    Attributes:
        socket: non-blocking.
        deadline: to say who it is.
        rank, address: of a member; None of a stranger.
        finished: it said that it is done, or why it failed.
        leaving: it is closed as soon as all is sent.
    """

    socket: socket.socket
    deadline: float
    rank: int | None = None
    address: tuple[str, int] | None = None
    finished: bool = False
    leaving: bool = False
    closed: bool = False
    outgoing: bytearray = field(default_factory=bytearray)
    lines: _Lines = field(default_factory=lambda: _Lines(MAX_LINE_BYTES))

    def send(self) -> bool:
        """Sends what the socket takes; whether that was all."""
        if self.outgoing:
            del self.outgoing[: self.socket.send(self.outgoing)]
        return not self.outgoing

    def receive(self) -> list[dict[str, Any]]:
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionAbortedError("closed")
        return self.lines.feed(data)

    def close(self) -> None:
        self.closed = True
        self.socket.close()


def _listen(
    host: str, ports: Sequence[int], backlog: int, where: Mapping[str, Any] | None = None
) -> socket.socket:
    """A listening socket at the first free port."""
    for port in ports:
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((host, port), family=family, backlog=backlog)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise TrainingError(
                    f"A process listens on an address of its own host. Received: {error} for "
                    f"{host!r}. Name an interface of this host.",
                    **(where or {}),
                ) from error
    raise TrainingError(
        f"One port of a range must be free on {host}. Received: {ports}, all in use. Widen the "
        "range.",
        **(where or {}),
    )


def _watch(control: socket.socket) -> None:
    """Lets a control connection end some ten seconds after the other host vanished."""
    keep_alive(control)
    # Its lines are few and fit the other's buffer even while nobody reads, so here, unlike between
    # ranks, bytes that stay unacknowledged mean that the host is gone.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        control.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000)


def _hello(token: str, attempt: int, rank: int, peer: int) -> bytes:
    """What rank `rank` says first to rank `peer`; always of the same length."""
    content = _HELLO.pack(b"TFH1", attempt, rank, peer)
    return content + hmac.digest(_utf8(token), content, "sha256")


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _utf8(text: str) -> bytes:
    # JSON can spell half of a surrogate pair, which UTF-8 refuses.
    return text.encode("utf-8", "surrogatepass")


def _named(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}{more}"
