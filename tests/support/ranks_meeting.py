"""Ranks that meet at a driver, in threads of one process."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

from tfspark.errors import TrainingError
from tfspark.sync.collectives import barrier
from tfspark.sync.control import TO_DRIVER, registration
from tfspark.sync.member import Member
from tfspark.sync.rendezvous import Rendezvous
from tfspark.sync.secret import nonce, proof

TOKEN = "söcret"
AT = {"phase": "gradient", "step": 7, "timeout_s": 30.0}


@contextlib.contextmanager
def driver(num_ranks, on_report=lambda rank, report: None, identity=None):
    """A rendezvous for so many ranks."""
    with Rendezvous(
        "127.0.0.1", num_ranks, token=TOKEN, on_report=on_report, identity=identity
    ) as rendezvous:
        yield rendezvous


def join(rendezvous, rank, num_ranks, *, attempt=0, timeout_s=10.0, ports=None, **options):
    """A member; options are its token, its identity and where it listens."""
    return Member.join(
        rendezvous.address,
        options.get("token", TOKEN),
        rank,
        attempt,
        num_ranks,
        bind_host=options.get("bind_host", "127.0.0.1"),
        ports=ports,
        timeout_s=timeout_s,
        identity=options.get("identity"),
    )


def on_all(num_ranks, function):
    """`function(rank)` of every rank, at once."""
    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(function, range(num_ranks)))


def eventually(condition):
    """Waits until a condition holds."""
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def error_of(function, *args, **options):
    """The error of a call, or None."""
    try:
        function(*args, **options)
    except TrainingError as error:
        return error
    return None


class Raw:
    """A connection to the driver that says what it likes."""

    def __init__(self, rendezvous):
        self.socket = socket.create_connection(rendezvous.address, 5)
        self.lines = self.socket.makefile("rb")
        self.challenge = bytes.fromhex(self.read()["challenge"])

    def send(self, data):
        """Bytes, or what JSON makes of it."""
        self.socket.sendall(data if isinstance(data, bytes) else json.dumps(data).encode() + b"\n")
        return self

    def register(self, rank, **changes):
        """Says what a rank says first."""
        return self.send(self.registration(rank=rank, **changes))

    def registration(self, *, token=TOKEN, own=None, **changes):
        """What a rank says first, with changes to it."""
        said = {"attempt": 0, "rank": 0, "host": "127.0.0.1", "port": 1, **changes}
        self.nonces = self.challenge, nonce() if own is None else own
        self.said = registration(*(said[name] for name in ("attempt", "rank", "host", "port")))
        proven = proof(token, TO_DRIVER, *self.nonces, self.said).hex()
        return {**said, "nonce": self.nonces[1].hex(), "proof": proven, **changes}

    def read(self):
        """The next message; None when the connection is closed."""
        try:
            line = self.lines.readline()
        except ConnectionResetError:
            return None
        return json.loads(line) if line else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.lines.close()
        self.socket.close()


def meet(rendezvous, rank, num_ranks=2, **options):
    """How many ranks a rank has met."""
    with join(rendezvous, rank, num_ranks, **options) as member:
        barrier(member.links, **AT)
        member.done()
        return member.links.size
