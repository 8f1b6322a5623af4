"""Rounds between ranks that encrypt what they say, and who is kept out."""

from __future__ import annotations

import contextlib
import pickle
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ranks_meeting import AT, driver, error_of, eventually, join, meet, on_all

from tfspark.errors import TrainingError
from tfspark.sync.encryption import Identity
from tfspark.sync.frames import Message


def test_a_round_is_encrypted():
    """With messages larger than the buffers of sockets, in both directions at once."""
    identity = Identity.make()

    def run(rank):
        array = np.full(3_000_000, rank, np.float32)
        with join(rendezvous, rank, 3, identity=identity) as member:
            assert all(peer.version() == "TLSv1.3" for peer in member.links._sockets.values())
            assert member.control.version() == "TLSv1.3"
            messages = {
                peer: Message("x", rank, {"to": peer}, {"x": array[: 1 + peer * 1_000_000]})
                for peer in member.links.peers
            }
            for step in range(3):
                received = member.links.exchange(messages, **{**AT, "step": step})
                for peer, message in received.items():
                    assert message.meta == {"to": rank}
                    assert message.arrays["x"].shape == (1 + rank * 1_000_000,)
                    assert (message.arrays["x"] == peer).all()
            member.report({"rank": rank})
            member.done()

    reports = []
    with driver(3, lambda *report: reports.append(report), identity) as rendezvous:
        on_all(3, run)
        eventually(lambda: len(reports) == 3)
        assert rendezvous.failures == []


def test_others_are_not_listened_to():
    """Nobody without the certificate: neither in the clear, nor with one of his own."""
    identity = Identity.make()
    with driver(2, identity=identity) as rendezvous:
        stranger = socket.create_connection(rendezvous.address, 5)
        with stranger, contextlib.suppress(ConnectionResetError):
            stranger.sendall(b'{"rank": 0}\n' * 10)
            assert b"challenge" not in stranger.recv(1000)
        for other in (None, Identity.make()):
            error = error_of(join, rendezvous, 0, 2, identity=other, timeout_s=1)
            assert isinstance(error, TrainingError)
        assert rendezvous.failures == []
        met = on_all(2, lambda rank: meet(rendezvous, rank, identity=identity))
        assert met == [2, 2]


def test_a_driver_without_the_certificate_is_refused():
    with driver(1) as rendezvous:
        error = error_of(join, rendezvous, 0, 1, identity=Identity.make(), timeout_s=1)
        assert error.rank == 0


def test_an_abort_arrives():
    identity = Identity.make()
    with driver(2, identity=identity) as rendezvous, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(join, rendezvous, 1, 2, identity=identity)
        eventually(lambda: rendezvous._members)
        rendezvous.abort("Interrupted.")
        with pytest.raises(TrainingError, match="driver ended the round: Interrupted"):
            waiting.result(timeout=3)


def test_a_key_is_not_shown_and_pickles():
    identity = Identity.make()
    assert "PRIVATE KEY" in identity.key and "PRIVATE" not in repr(identity)
    ours, theirs = socket.socketpair()
    identity.secured(ours, server_side=True).close()
    theirs.close()
    assert pickle.loads(pickle.dumps(identity)) == identity
