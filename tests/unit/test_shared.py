"""Memory that ranks on one host share: between processes, and where it is not to be had."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mesh import AT, mesh, on_all, swap

from tfspark.errors import TrainingError
from tfspark.sync import shared
from tfspark.sync.collectives import barrier
from tfspark.sync.frames import Message
from tfspark.sync.shared import (
    LEAST_BYTES,
    Common,
    Inbox,
    Outbox,
    Probe,
    Reference,
    can_read,
)

ROOT = Path(__file__).parent.parent.parent
LARGE = LEAST_BYTES  # elements of float32

pytestmark = pytest.mark.skipif(
    not shared.is_supported(), reason="only Linux has memory without a name"
)


@contextlib.contextmanager
def sharing(size):
    with mesh(size) as links:
        on_all(links, lambda own: own.share_memory(step=0, timeout_s=10))
        yield links


def sent_bytes(links, function):
    """What `function` of every rank returns, and the bytes that rank 0's sockets were given."""
    counted = []

    class Counting:
        def __init__(self, inner):
            self._inner = inner

        def __getattr__(self, name):
            return getattr(self._inner, name)

        def sendmsg(self, views):
            counted.append(self._inner.sendmsg(views))
            return counted[-1]

    links[0]._sockets = {peer: Counting(s) for peer, s in links[0]._sockets.items()}
    return on_all(links, function), sum(counted)


@pytest.mark.parametrize("size", [2, 3])
def test_large_arrays_do_not_pass_the_socket(size):
    def run(links):
        seen = []
        for turn in range(5):
            large = np.arange(LARGE, dtype=np.float32) + 100 * links.rank + turn
            received = swap(links, {"large": large, "small": np.full(3, turn)})
            for peer, message in received.items():
                expected = np.arange(LARGE, dtype=np.float32) + 100 * peer + turn
                assert np.array_equal(message.arrays["large"], expected)
                assert message.arrays["small"].tolist() == [turn] * 3
                seen.append(message.arrays["large"].flags.writeable)
        return seen

    with sharing(size) as links:
        assert [own.sharing for own in links] == [
            frozenset(range(size)) - {rank} for rank in range(size)
        ]
        seen, sent = sent_bytes(links, run)
        assert not any(map(any, seen))
        assert 0 < sent < 5 * (size - 1) * 1000
    with mesh(size) as links:
        seen, sent = sent_bytes(links, run)
        assert all(map(all, seen))
        assert sent > 5 * (size - 1) * LARGE * 4


def test_a_place_is_filled():
    def run(links):
        into = np.zeros(LARGE, np.float32)
        array = np.full(LARGE, links.rank + 1, np.float32)
        received = swap(links, {"x": array}, place=lambda *_: into)
        assert received[1 - links.rank].arrays["x"] is into
        return into

    with sharing(2) as links:
        first, second = on_all(links, run)
    assert (first == 2).all() and (second == 1).all()


def test_an_array_is_good_until_the_next_exchange():
    """The sender may be one exchange ahead, and writes elsewhere then."""

    def run(links):
        for turn in range(50):
            array = np.full(LARGE * (1 + turn % 3), turn, np.float32)  # grows and shrinks
            (message,) = swap(links, {"x": array}).values()
            if links.rank:
                swapped = message.arrays["x"]
                assert len(swapped) == len(array)
                assert (swapped == turn).all()

    with sharing(2) as links:
        on_all(links, run)


def test_one_message_to_all_is_laid_down_once():
    outbox, array = Outbox(), np.arange(LARGE, dtype=np.float32)
    outbox.begin([array, array])
    assert outbox.put(array) == outbox.put(array)
    assert outbox.put(np.zeros(3)) is None
    outbox.close()


def test_an_exchange_with_some_peers_takes_the_socket():
    def run(links):
        if links.rank == 2:
            return None
        message = Message("x", links.rank, {}, {"x": np.full(LARGE, links.rank)})
        received = links.exchange({1 - links.rank: message}, **AT, timeout_s=10)
        return received[1 - links.rank].arrays["x"]

    with sharing(3) as links:
        first, second, _ = on_all(links, run)
    assert (first == 1).all() and (second == 0).all()
    assert first.flags.writeable


def common(links, num_bytes=4096):
    return links.common_memory(num_bytes, step=0, timeout_s=10)


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_see_what_any_of_them_writes(size):
    def run(links):
        memory = common(links)
        assert not memory.any()
        barrier(links, **AT, timeout_s=10)
        memory[links.rank :: size] = links.rank + 1
        barrier(links, **AT, timeout_s=10)
        return memory.copy()

    with sharing(size) as links:
        seen = on_all(links, run)
    for memory in seen:
        assert memory.tolist() == [i % size + 1 for i in range(4096)]


def test_common_memory_outlives_the_links():
    with sharing(2) as links:
        left, right = on_all(links, common)
    left[0] = 7
    assert right[0] == 7


def test_all_have_common_memory_or_none(monkeypatch):
    joined = Common.joined

    def joined_but_for_one(description, num_bytes):
        tried.append(description)
        return joined(description, num_bytes) if len(tried) > 1 else None

    with sharing(3) as links:
        tried = []
        monkeypatch.setattr(Common, "joined", joined_but_for_one)
        assert on_all(links, common) == [None, None, None]
        monkeypatch.undo()
        links[0]._readers = frozenset({1})  # as if rank 2 were on another host
        assert on_all(links, common) == [None, None, None]


def test_common_memory_without_sharing_is_refused_by_all():
    with mesh(2) as links:
        assert on_all(links, common) == [None, None]


def test_common_memory_of_another_size_is_not_joined():
    made = Common(4096)
    assert Common.joined(made.description, 4096) is not None
    assert Common.joined(made.description, 8192) is None
    assert Common.joined({"process": os.getpid()}, 4096) is None
    assert Common.joined(None, 4096) is None
    made.close()
    assert Common.joined(made.description, 4096) is None


READER = """
import sys, json
from tfspark.sync.shared import can_read
print(can_read(json.loads(sys.argv[1])))
"""


def test_another_process_reads_and_a_wrong_one_is_seen():
    probe = Probe()
    shown = probe.description

    def reads(description):
        run = subprocess.run(
            [sys.executable, "-c", READER, json.dumps(description)],
            capture_output=True, text=True, cwd=ROOT, check=True,
        )  # fmt: skip
        return run.stdout.strip() == "True"

    assert reads(shown)
    assert not reads({**shown, "nonce": "00" * 32})
    assert not reads({**shown, "process": 2**22 + 1})
    assert not reads(None)
    probe.close()
    assert not reads(shown)


def test_what_is_no_memory_of_a_rank_is_not_opened(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        file.write(b"x" * 5000)
        file.flush()
        assert not can_read({"process": os.getpid(), "descriptor": file.fileno(), "nonce": ""})
    unsealed = os.memfd_create("tfspark-x")
    os.ftruncate(unsealed, 4096)
    assert not can_read({"process": os.getpid(), "descriptor": unsealed, "nonce": "00" * 32})
    os.close(unsealed)


@pytest.mark.parametrize("offset, num_bytes", [(0, 1 << 40), (1 << 40, 4), (-64, 4), (1, 4)])
def test_a_reference_beyond_the_memory_is_refused(offset, num_bytes):
    outbox, array = Outbox(), np.arange(LARGE, dtype=np.float32)
    outbox.begin([array])
    good = outbox.put(array)
    inbox = Inbox(os.getpid())
    assert np.array_equal(inbox.array(good, array.dtype, array.shape, array.nbytes), array)
    with pytest.raises(ValueError, match="bytes at"):
        inbox.array(Reference(*good[:2], offset), np.dtype("u1"), (num_bytes,), num_bytes)
    outbox.close()


def test_a_peer_that_refers_to_memory_it_does_not_share_is_an_error():
    def run(links):
        array = np.full(LARGE, links.rank)
        links._inboxes = {}  # this rank has not agreed to read any
        with pytest.raises(TrainingError, match=r"memory that the peer shares.*rank 0|peer"):
            swap(links, {"x": array})

    with sharing(2) as links:
        on_all(links, run)


def test_nothing_is_left_behind():
    before = len(os.listdir("/proc/self/fd"))
    with sharing(3) as links:
        for _ in range(20):
            on_all(links, lambda own: swap(own, {"x": np.zeros(LARGE)}))
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_stays_until_slow_peers_have_read_it():
    def run(links):
        def place(*_):
            if links.rank == 0:
                time.sleep(0.3)  # long after the other has all it needs

        large = np.full(LEAST_BYTES, links.rank, np.uint8)
        outgoing = {peer: Message("gradient", links.rank, {}, {"x": large}) for peer in links.peers}
        received = links.exchange(outgoing, phase="gradient", step=1, timeout_s=10, place=place)
        found = [message.arrays["x"].tolist() for message in received.values()]
        links.leave(step=1, timeout_s=10)
        return found

    with sharing(2) as links:
        assert on_all(links, run) == [[[1] * LEAST_BYTES], [[0] * LEAST_BYTES]]
