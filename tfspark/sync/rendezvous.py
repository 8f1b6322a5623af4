"""How the ranks of a round find each other, and how they learn that it has ended.

The driver runs a `Rendezvous`; each rank joins it as a `Member`. A rank says where it listens, is
told where all others do, and connects to them. Its connection to the driver stays open: over it go
reports, and whoever fails is named to all others at once. Control messages only, lines of JSON;
nothing is pickled. Both sides prove that they know the token of the round (`secret.py`), and nobody
else is listened to.

    driver → rank   {"challenge"}   at once
    rank → driver   {"attempt", "rank", "host", "port", "nonce", "proof"}   first, once
                    {"report": {…}}  {"done": true}  {"failed": "text"}
    driver → rank   {"proof"}   first
                    {"missing": "rank 3"}   who has not come yet
                    {"peers": [[host, port], …]}   by rank, once all have come
                    {"interrupt": true}   end at a commit, soon
                    {"abort": "reason"}

An *attempt* is one try of the barrier stage: Spark starts all ranks of it anew if one has failed.
"""

from __future__ import annotations

import contextlib
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tfspark.sync.control import (
    MAX_LINE_BYTES,
    MAX_TEXT,
    PROMPT_S,
    TO_DRIVER,
    TO_RANK,
    Lines,
    NoMessageError,
    encoded_line,
    listen,
    named,
    registration,
    watch,
)
from tfspark.sync.encryption import Identity, WantsReadError
from tfspark.sync.secret import NONCE_BYTES, is_proof, nonce, proof


class Rendezvous:
    """The driver's side. A context manager: it listens from `__enter__` to `__exit__`.

    Args:
        host: of the driver, as the ranks reach it.
        bind_host: the address to listen at, if that is another one.
        ports: the first free one is listened at; None lets the system choose.
        identity: of the run, where connections are encrypted.
        num_ranks: N.
        token: a secret of this round; connections of those who do not know it change nothing.
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
        bind_host: str | None = None,
        ports: range | None = None,
        identity: Identity | None = None,
    ):
        self._identity = identity
        self._host = host
        self._bind_host = bind_host or host
        self._ports = ports
        self._num_ranks = num_ranks
        self._token = token
        self._on_report = on_report
        self._attempt = -1
        self._members: dict[int, _Connection] = {}  # of the newest attempt, by rank
        self._failures: list[tuple[int, str]] = []
        self._ended: str | None = None  # why this attempt ends
        self._aborted: str | None = None  # why no attempt will run any more
        self._aborts: queue.SimpleQueue[tuple[str, int | None]] = queue.SimpleQueue()
        self._interrupted = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="rendezvous", daemon=True)

    def __enter__(self) -> Rendezvous:
        self._listener = listen(self._bind_host, self._ports or (0,), backlog=self._num_ranks + 128)
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

    def interrupt(self) -> None:
        """Asks the ranks to end the round at a commit. Returns at once; any thread may call it."""
        self._interrupted.set()
        self._rouse()

    def _rouse(self) -> None:
        # Full: it is awake already. Closed: the server has ended, and with it all connections.
        with contextlib.suppress(OSError):
            self._wake.send(b"!")

    def _serve(self) -> None:
        try:
            while not self._stopping:
                strangers = [c for c in self._connections() if c.rank is None]
                for key, _ in self._selector.select(1.0 if strangers else None):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj is self._woken:
                        self._woken.recv(4096)
                    elif not key.data.closed:
                        self._attend(key.data)
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
        watch(accepted)
        accepted.setblocking(False)
        if self._identity is not None:
            accepted = self._identity.secured(accepted, server_side=True)
        connection = _Connection(accepted, time.monotonic() + PROMPT_S, challenge=nonce())
        self._selector.register(accepted, selectors.EVENT_READ, connection)
        self._send(connection, {"challenge": connection.challenge.hex()})

    def _attend(self, connection: _Connection) -> None:
        messages = []
        try:
            with contextlib.suppress(BlockingIOError):
                messages = connection.receive()
            # Afterwards: what was read may be the end of a handshake, which the rest waits for.
            awaited = selectors.EVENT_READ | connection.send()
            if connection.leaving and not connection.outgoing:
                self._drop(connection)
                return
            self._selector.modify(connection.socket, awaited, connection)
        except (OSError, NoMessageError) as error:
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
                "attempt": int() as attempt,
                "rank": int() as rank,
                "host": str() as host,
                "port": int() as port,
                "nonce": str() as given,
                "proof": str() as proven,
            } if 0 <= rank < self._num_ranks and 0 <= attempt < 2**32 and 0 < port < 2**16:
                said = registration(attempt, rank, host, port)
                try:
                    theirs, shown = bytes.fromhex(given), bytes.fromhex(proven)
                except ValueError:
                    return False
                nonces = connection.challenge, theirs
                if len(theirs) != NONCE_BYTES or not is_proof(
                    shown, self._token, TO_DRIVER, *nonces, said
                ):
                    return False
            case _:
                return False
        self._send(connection, {"proof": proof(self._token, TO_RANK, *nonces, said).hex()})
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
                {"missing": named(missing)}
                if missing
                else {"peers": [self._members[r].address for r in range(self._num_ranks)]}
            )
            for member in self._members.values():
                self._send(member, answer)
            self._pass_on_interrupt(connection)
        return True

    def _begin(self, attempt: int) -> None:
        for member in self._members.values():
            self._dismiss(member, f"attempt {attempt} of the stage has replaced it.")
        self._attempt, self._members, self._failures = attempt, {}, []
        self._ended = self._aborted

    def _pass_on_interrupt(self, member: _Connection) -> None:
        if self._interrupted.is_set() and not member.knows_interrupt:
            member.knows_interrupt = True
            self._send(member, {"interrupt": True})

    def _obey(self) -> None:
        for member in self._members.values():
            self._pass_on_interrupt(member)
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
            self._ended = reason[:MAX_TEXT]
            for rank, member in self._members.items():
                if rank != cause or not member.finished:
                    self._send(member, {"abort": self._ended})

    def _dismiss(self, connection: _Connection, reason: str) -> None:
        connection.leaving = True
        self._send(connection, {"abort": reason})

    def _send(self, connection: _Connection, message: Mapping[str, Any]) -> None:
        # Only noted: the loop sends, so an error of one connection is met in one place.
        connection.outgoing += encoded_line(message)
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


@dataclass(eq=False)
class _Connection:
    """One connection as the driver sees it.

    Attributes:
        socket: non-blocking.
        deadline: to say who it is.
        challenge: the nonce that its proof has to cover.
        rank, address: of a member; None of a stranger.
        finished: it said that it is done, or why it failed.
        leaving: it is closed as soon as all is sent.
        knows_interrupt: it was told to end at a commit.
    """

    socket: socket.socket
    deadline: float
    challenge: bytes
    rank: int | None = None
    address: tuple[str, int] | None = None
    finished: bool = False
    leaving: bool = False
    knows_interrupt: bool = False
    closed: bool = False
    outgoing: bytearray = field(default_factory=bytearray)
    lines: Lines = field(default_factory=lambda: Lines(MAX_LINE_BYTES))

    def send(self) -> int:
        """Sends what the socket takes; the event that the rest waits for, or 0."""
        try:
            while self.outgoing:
                del self.outgoing[: self.socket.send(self.outgoing)]
        except WantsReadError:
            return selectors.EVENT_READ
        except BlockingIOError:
            return selectors.EVENT_WRITE
        return 0

    def receive(self) -> list[dict[str, Any]]:
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionAbortedError("closed")
        return self.lines.feed(data)

    def close(self) -> None:
        self.closed = True
        self.socket.close()
