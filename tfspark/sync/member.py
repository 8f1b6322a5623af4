"""A rank's side of a rendezvous: it meets all others and connects to them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import selectors
import socket
import struct
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, TypeAlias

from tfspark.errors import InvalidInputError, PeerLostError, TrainingError
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
from tfspark.sync.links import Links, located
from tfspark.sync.secret import NONCE_BYTES, PROOF_BYTES, is_proof, nonce, proof

# Of a message of the driver: it lists all ranks.
_MAX_ANSWER_BYTES = 1 << 24
_WILDCARDS = ("0.0.0.0", "::")
_HEXADECIMAL = re.compile(r"(?:[0-9a-f]{2})+")
# Magic, attempt, who connects, to whom; then a nonce and the proof.
_HELLO = struct.Struct("<4sIII")
_MAGIC = b"TFH2"
_HELLO_BYTES = _HELLO.size + NONCE_BYTES + PROOF_BYTES
_CALLER, _CALLED = "caller to rank", "rank to caller"

# Yields the event of its socket that it waits for.
_Conversation: TypeAlias = Generator[int, None, None]


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
        self._waiting: list[dict[str, Any]] = []  # received, not yet looked at
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
        identity: Identity | None = None,
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
            identity: of the run, where connections are encrypted.

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
                control.setblocking(False)
                if identity is not None:
                    control = identity.secured(control, server_side=False)
                member = cls(rank, undo.enter_context(control))
                secrets = _Secrets(token, attempt, identity)
                try:
                    sockets = member._meet(listener, secrets, timeout_s, deadline)
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
        secrets: _Secrets,
        timeout_s: float,
        deadline: float,
    ) -> dict[int, socket.socket]:
        host, port = listener.getsockname()[:2]
        host = self.control.getsockname()[0] if host in _WILDCARDS else host
        self._register(secrets, host, port, deadline)
        peers = self._wait_for_peers(timeout_s, deadline)
        return _Mesh(self, secrets, peers, listener).connect(timeout_s, deadline)

    def _register(self, secrets: _Secrets, host: str, port: int, deadline: float) -> None:
        """Says who this is; both sides prove that they know the token."""
        given = bytes.fromhex(self._next(deadline, "challenge"))
        token, attempt = secrets.token, secrets.attempt
        own, said = nonce(), registration(attempt, self.rank, host, port)
        self._send(
            {
                "attempt": attempt,
                "rank": self.rank,
                "host": host,
                "port": port,
                "nonce": own.hex(),
                "proof": proof(token, TO_DRIVER, given, own, said).hex(),
            }
        )
        answer = bytes.fromhex(self._next(deadline, "proof"))
        if not is_proof(answer, token, TO_RANK, given, own, said):
            raise self._no_driver("a wrong proof")

    def _next(self, deadline: float, name: str) -> str:
        """What the driver's next message says under a name, in hexadecimal digits."""
        with selectors.PollSelector() as selector:
            selector.register(self.control, selectors.EVENT_READ)
            # It reads before it waits: an encrypted connection begins with that.
            self._waiting += self._receive()
            while not self._waiting:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._no_driver(f"no {name} in time")
                selector.select(left)
                self._waiting += self._receive()
        message = self._waiting.pop(0)
        digits = message.get(name)
        if not isinstance(digits, str) or not _HEXADECIMAL.fullmatch(digits):
            raise self._no_driver(str(message)[:200])
        return digits

    def _no_driver(self, received: str) -> TrainingError:
        return TrainingError(
            "The driver proves that it knows the secret of the round, which Spark brings to the "
            f"ranks. Received: {received}. Another program listens at its address, or another "
            "version of tfspark.",
            rank=self.rank,
            phase="rendezvous",
        )

    def _wait_for_peers(self, timeout_s: float, deadline: float) -> list[tuple[str, int]]:
        missing = "any other rank"
        with selectors.PollSelector() as selector:
            selector.register(self.control, selectors.EVENT_READ)
            while True:
                messages, self._waiting = self._waiting + self._receive(), []
                for message in messages:
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


@dataclass(frozen=True)
class _Secrets:
    """What only ranks of one attempt know."""

    token: str = field(repr=False)
    attempt: int
    identity: Identity | None


class _Mesh:
    """Connects one rank to all others: it calls the lower ones and is called by the higher ones."""

    def __init__(
        self,
        member: Member,
        secrets: _Secrets,
        peers: Sequence[tuple[str, int]],
        listener: socket.socket,
    ):
        self._member = member
        self._token, self._attempt = secrets.token, secrets.attempt
        self._identity = secrets.identity
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
        connection.setblocking(False)
        code = connection.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            connection.close()
            raise self._unreachable(peer, OSError(code, os.strerror(code)))
        self._pending.add(connection)
        connected = partial(self._connected, peer, connection)
        self._selector.register(connection, selectors.EVENT_WRITE, connected)

    def _connected(self, peer: int, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._pending.remove(connection)
        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            connection.close()
            raise self._unreachable(peer, OSError(code, os.strerror(code)))
        if self._identity is not None:
            connection = self._identity.secured(connection, server_side=False)
        self._begin(connection, self._greet(peer, connection))

    def _accept(self) -> None:
        try:
            caller, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # it went away again
        caller.setblocking(False)
        if self._identity is not None:
            caller = self._identity.secured(caller, server_side=True)
        self._begin(caller, self._hear(caller))

    def _begin(self, connection: socket.socket, conversation: _Conversation) -> None:
        self._pending.add(connection)
        resume = partial(self._resume, connection, conversation)
        self._selector.register(connection, selectors.EVENT_WRITE, resume)

    def _resume(self, connection: socket.socket, conversation: _Conversation) -> None:
        """Goes on with a conversation, to where it waits again or ends."""
        try:
            events = next(conversation)
        except StopIteration:
            self._selector.unregister(connection)
            self._pending.remove(connection)
            if connection not in self._sockets.values():
                connection.close()
        else:
            resume = partial(self._resume, connection, conversation)
            self._selector.modify(connection, events, resume)

    def _greet(self, peer: int, connection: socket.socket) -> _Conversation:
        """What a caller says, once it is connected."""
        try:
            given = yield from _read(connection, NONCE_BYTES)
            own, content = nonce(), _HELLO.pack(_MAGIC, self._attempt, self._member.rank, peer)
            hello = content + own + proof(self._token, _CALLER, given, own, content)
            yield from _write(connection, hello)
            answer = yield from _read(connection, PROOF_BYTES)
            if not is_proof(answer, self._token, _CALLED, given, own, content):
                raise ConnectionAbortedError("another program answers")
        except OSError as error:
            raise self._unreachable(peer, error) from error
        self._sockets[peer] = connection

    def _hear(self, caller: socket.socket) -> _Conversation:
        """What is said to a caller; one who is no rank of this round is left alone."""
        given = nonce()
        try:
            yield from _write(caller, given)
            hello = yield from _read(caller, _HELLO_BYTES)
            content, own = hello[: _HELLO.size], hello[_HELLO.size : -PROOF_BYTES]
            said = given, own, content
            magic, attempt, peer, called = _HELLO.unpack(content)
            if (
                is_proof(hello[-PROOF_BYTES:], self._token, _CALLER, *said)
                and (magic, attempt, called) == (_MAGIC, self._attempt, self._member.rank)
                and self._member.rank < peer < len(self._peers)
            ):
                yield from _write(caller, proof(self._token, _CALLED, *said))
                if peer not in self._sockets:
                    self._sockets[peer] = caller
        except OSError:
            return

    def _unreachable(self, peer: int, error: OSError) -> PeerLostError:
        host, port = self._peers[peer]
        return PeerLostError(
            f"All ranks connect to each other. Received: {error} for rank {peer} at {host}:{port}. "
            "Check that it runs, and that a firewall lets executors reach each other.",
            rank=self._member.rank,
            phase="rendezvous",
            peer=peer,
        )


def _read(connection: socket.socket, count: int) -> Generator[int, None, bytes]:
    """So many bytes, and not one more: what follows belongs to the first exchange."""
    data = bytearray()
    while len(data) < count:
        try:
            part = connection.recv(count - len(data))
        except BlockingIOError:
            yield selectors.EVENT_READ
            continue
        if not part:
            raise ConnectionAbortedError("it was closed by the peer")
        data += part
    return bytes(data)


def _write(connection: socket.socket, data: bytes) -> Generator[int, None, None]:
    while data:
        try:
            data = data[connection.send(data) :]
        except WantsReadError:
            yield selectors.EVENT_READ
        except BlockingIOError:
            yield selectors.EVENT_WRITE
