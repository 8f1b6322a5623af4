"""Control messages between the driver and the ranks: lines of JSON over TCP. Nothing is pickled."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from tfspark.errors import TrainingError
from tfspark.sync.links import keep_alive

MAX_LINE_BYTES = 1 << 16
MAX_TEXT = 5000
"""Characters of a text in a message: JSON makes at most 12 bytes of one, so it fits a line."""

PROMPT_S = 10.0
"""How long a new connection may take to say who it is, and a control message to be sent."""


# Who proves to whom that he knows the secret of the round.
TO_DRIVER, TO_RANK = "rank to driver", "driver to rank"


class NoMessageError(ValueError):
    """A peer sent what is no message of this protocol."""


class Lines:
    """Bytes to JSON objects, one per line."""

    def __init__(self, most_bytes: int):
        self._most_bytes = most_bytes
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that end in these bytes.

        Raises:
            NoMessageError: a line is too long, or no JSON object.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        if max(map(len, (*lines, self._rest))) > self._most_bytes:
            raise NoMessageError(f"a line of more than {self._most_bytes} bytes")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:
            raise NoMessageError(f"no JSON ({error})") from error
        if not all(isinstance(message, dict) for message in messages):
            raise NoMessageError("a line that is no JSON object")
        return messages


def listen(
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


def watch(control: socket.socket) -> None:
    """Lets a control connection end some ten seconds after the other host vanished."""
    keep_alive(control)
    # Its lines are few and fit the other's buffer even while nobody reads, so here, unlike between
    # ranks, bytes that stay unacknowledged mean that the host is gone.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        control.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000)


def encoded_line(message: Mapping[str, Any]) -> bytes:
    """A message as a line."""
    return json.dumps(message).encode() + b"\n"


def registration(attempt: int, rank: int, host: str, port: int) -> bytes:
    """What a rank says of itself when it joins, as its proof covers it."""
    return json.dumps([attempt, rank, host, port]).encode()


def named(ranks: Sequence[int]) -> str:
    """Ranks for a message: "ranks 1, 3"."""
    listed = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}{more}"
