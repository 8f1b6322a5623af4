"""Exchanges between ranks: threads of this process, and processes of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mesh import AT, mesh, on_all, swap

from tfspark.errors import InvalidInputError, TrainingError
from tfspark.sync.frames import Message
from tfspark.sync.links import Links, PeerLostError
from tfspark.sync.stream import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES

ROOT = Path(__file__).parent.parent.parent


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        left = socket.create_connection(listener.getsockname())
        return left, listener.accept()[0]


@pytest.fixture(params=[socket.socketpair, tcp_pair], ids=["unix", "tcp"])
def pair(request):
    return request.param


ARRAYS = {
    "strided": np.arange(12.0).reshape(3, 4)[:, ::2],
    "scalar": np.array(3, np.int64),
    "none": np.empty((3, 0, 2), np.float32),
    "empty": np.empty(0, ml_dtypes.bfloat16),
    "big endian": np.arange(3, dtype=">f4"),
    "read-only": np.broadcast_to(np.float32(2), (5,)),
    **{
        name: (np.arange(6) % 2).astype(np.dtype(name)).reshape(2, 3)
        for name in ("bool", "int8", "uint16", "int64", "float16", "bfloat16", "complex64")
    },
}


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_rank_receives_what_every_other_sent(size, pair):
    def run(links):
        own = {name: np.asarray(array) for name, array in ARRAYS.items()}
        own["rank"] = np.full(links.rank, links.rank)
        return [swap(links, own, meta={"by": links.rank, "nan": None}) for _ in range(3)][-1]

    with mesh(size, pair) as links:
        for rank, received in enumerate(on_all(links, run)):
            assert list(received) == [peer for peer in range(size) if peer != rank]
            for peer, message in received.items():
                assert (message.kind, message.source) == ("x", peer)
                assert message.meta == {"by": peer, "nan": None}
                assert message.arrays["rank"].tolist() == [peer] * peer
                for name, array in ARRAYS.items():
                    same = message.arrays[name]
                    assert same.dtype == array.dtype.newbyteorder("=")
                    assert same.shape == array.shape
                    np.testing.assert_array_equal(same, array)


def test_more_arrays_than_one_call_takes(pair):
    arrays = {f"a{i}": np.full(i % 7, i) for i in range(500)}
    with mesh(2, pair) as links:
        for received in on_all(links, lambda own: swap(own, arrays)):
            (message,) = received.values()
            assert list(message.arrays) == list(arrays)
            for name, array in arrays.items():
                np.testing.assert_array_equal(message.arrays[name], array)


def test_large_arrays_both_ways_at_once(pair):
    def run(links):
        array = np.arange(12_500_000, dtype=np.float32) + links.rank  # 50 MB
        return swap(links, {"x": array})[1 - links.rank].arrays["x"]

    with mesh(2, pair) as links:
        for rank, array in enumerate(on_all(links, run)):
            assert array[0] == 1 - rank
            assert array[-1] == np.float32(12_499_999) + (1 - rank)


def test_only_the_given_peers_take_part():
    def run(links):
        if links.rank == 2:
            return None
        return links.exchange({1 - links.rank: Message("x", links.rank)}, **AT, timeout_s=10).keys()

    with mesh(3) as links:
        assert [keys and list(keys) for keys in on_all(links, run)] == [[1], [0], None]
        with pytest.raises(InvalidInputError, match=r"\[1, 2\].*Received: \[0\]"):
            links[0].exchange({0: Message("x", 0)}, **AT, timeout_s=1)


def test_arrays_are_received_in_place():
    flats = [np.zeros(10, np.float32) for _ in range(2)]

    def run(links):
        def place(source, kind, name, dtype, shape):
            assert (source, kind, dtype, shape) == (1 - links.rank, "x", np.float32, (5,))
            return flats[links.rank][5 * source : 5 * source + 5] if name == "here" else None

        own = np.full(5, links.rank + 1, np.float32)
        return swap(links, {"here": own, "new": own}, place=place)[1 - links.rank].arrays

    with mesh(2) as links:
        for rank, arrays in enumerate(on_all(links, run)):
            assert np.shares_memory(arrays["here"], flats[rank])
            assert not np.shares_memory(arrays["new"], flats[rank])
    assert flats[0].tolist() == [0] * 5 + [2] * 5
    assert flats[1].tolist() == [1] * 5 + [0] * 5


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (np.zeros(4, np.float32), r"expected as float32 \[4\]. Received: float32 \[3\]"),
        (np.zeros(3, np.float64), "expected as float64"),
        (np.zeros(6, np.float32)[::2], "in one piece"),
        (np.broadcast_to(np.float32(0), 3), "in one piece"),
    ],
)
def test_a_place_must_fit(place, says):
    left, right = socket.socketpair()
    with Links(0, {1: left}) as links, Links(1, {0: right}) as other:
        right.sendall(frame(1, [["x", "float32", [3]]], 12))
        with pytest.raises(TrainingError, match=says) as caught:
            swap(links, {}, place=lambda *_: place)
        assert (caught.value.rank, caught.value.peer) == (0, 1)
        assert other.size == 2


@pytest.mark.parametrize("dtype", [object, "datetime64[s]", "U3", "i4,f4"])
def test_other_dtypes_are_not_sent(dtype):
    left, right = socket.socketpair()
    with Links(0, {1: left}) as links, right, pytest.raises(InvalidInputError, match="'x' of"):
        swap(links, {"x": np.zeros(2, dtype)})


class TestLostPeers:
    def test_a_closed_connection(self, pair):
        left, right = pair()
        with Links(3, {1: left}) as links:
            right.close()
            with pytest.raises(PeerLostError, match="connection to rank 1 was lost") as caught:
                swap(links, {"x": np.zeros(1_000_000)})
        assert caught.value.where == {"rank": 3, "step": 7, "phase": "gradient", "peer": 1}

    def test_a_silent_peer(self, pair):
        left, right = pair()
        with right, Links(0, {1: left}) as links:
            started = time.monotonic()
            with pytest.raises(PeerLostError, match=r"silent for 0.2 s.*rank 1 \(message") as lost:
                swap(links, {}, timeout_s=0.2)
            assert 0.2 <= time.monotonic() - started < 3
        assert lost.value.where == {"rank": 0, "step": 7, "phase": "gradient", "peer": 1}

    def test_only_the_silent_are_named(self):
        with mesh(4) as links:
            # Rank 1 takes part, ranks 2 and 3 do not.
            with ThreadPoolExecutor(1) as pool:
                other = pool.submit(
                    links[1].exchange, {0: Message("x", 1)}, **AT, timeout_s=5, place=None
                )
                with pytest.raises(PeerLostError) as caught:
                    swap(links[0], {}, timeout_s=0.2)
                other.result()
            assert caught.value.peer == [2, 3]

    def test_a_peer_that_does_not_read(self):
        left, right = socket.socketpair()
        with right, Links(0, {1: left}) as links:
            right.sendall(frame(1, [], 0))
            with pytest.raises(PeerLostError, match=r"rank 1 \(does not read\)"):
                swap(links, {"x": np.zeros(1_000_000)}, timeout_s=0.2)

    def test_the_clock_starts_anew_with_every_byte(self):
        left, right = socket.socketpair()
        data = frame(1, [["x", "uint8", [6]]], 6) + b"slowly"

        def trickle():
            for start in range(0, len(data), 8):
                time.sleep(0.1)
                right.sendall(data[start : start + 8])

        with right, Links(0, {1: left}) as links, ThreadPoolExecutor(1) as pool:
            pool.submit(trickle)
            started = time.monotonic()
            array = swap(links, {}, timeout_s=0.4)[1].arrays["x"]
            assert array.tobytes() == b"slowly"
            assert time.monotonic() - started > 0.4

    def test_errors_pickle(self):
        import pickle

        error = PeerLostError("Gone.", rank=0, step=1, phase="x", peer=2)
        same = pickle.loads(pickle.dumps(error))
        assert type(same) is PeerLostError and same.where == error.where


class TestControl:
    def test_it_wakes_a_waiting_exchange(self):
        left, right = socket.socketpair()
        control, driver = socket.socketpair()
        seen = []

        def on_control():
            seen.append(control.recv(1))
            if seen[-1] == b"!":
                raise TrainingError("The driver ended the round.")

        with right, control, driver:
            links = Links(0, {1: left}, control=control, on_control=on_control)
            with links, ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(swap, links, {}, timeout_s=30)
                driver.sendall(b"a")
                driver.sendall(b"!")
                with pytest.raises(TrainingError, match="ended the round") as caught:
                    waiting.result(timeout=3)
            assert caught.value.where == {"rank": 0, "step": 7, "phase": "gradient"}
            assert seen == [b"a", b"!"]
            assert control.fileno() >= 0 and left.fileno() < 0

    def test_it_does_not_restart_the_clock(self):
        left, right = socket.socketpair()
        control, driver = socket.socketpair()
        driver.sendall(b"a")
        # Never read: the socket stays readable.
        links = Links(0, {1: left}, control=control, on_control=lambda: None)
        with right, control, driver, links, pytest.raises(PeerLostError, match="silent"):
            swap(links, {}, timeout_s=0.1)


def frame(source, entries, payload_bytes, *, kind="x", meta=None, magic=b"TFG1"):
    header = json.dumps([kind, source, meta if meta is not None else {}, entries]).encode()
    return struct.pack("<4sIQ", magic, len(header), payload_bytes) + header


def received_from(data, pair=socket.socketpair):
    """What rank 0 makes of a peer 1 that sends these bytes and then closes."""
    left, right = pair()
    with Links(0, {1: left}) as links:
        sender = threading.Thread(target=lambda: (right.sendall(data), right.shutdown(1)))
        sender.start()
        try:
            return swap(links, {}, timeout_s=5)[1]
        finally:
            links.close()
            sender.join()
            right.close()


class TestMalformed:
    def test_a_good_one_is_accepted(self):
        message = received_from(frame(1, [["x", "uint8", [2, 1]]], 2) + b"ab")
        assert message.arrays["x"].tolist() == [[97], [98]]

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            (frame(1, [], 0, magic=b"HTTP"), "starts with"),
            (frame(2, [], 0), "names its sender, rank 1. Received: 2"),
            (frame(True, [], 0), "names its sender"),
            (struct.pack("<4sIQ", b"TFG1", MAX_HEADER_BYTES + 1, 0), "at most"),
            (struct.pack("<4sIQ", b"TFG1", 2, MAX_PAYLOAD_BYTES + 1), "at most"),
            (struct.pack("<4sIQ", b"TFG1", 0, 0), "is JSON"),
            (struct.pack("<4sIQ", b"TFG1", 4, 0) + b"\xff\xfe\xfd\xfc", "is JSON"),
            (struct.pack("<4sIQ", b"TFG1", 99_999, 0) + b"[" * 99_999, "is JSON"),
            (struct.pack("<4sIQ", b"TFG1", 2, 0) + b"{}", "is JSON"),
            (frame(1, [["x", "object", [1]]], 8), "is JSON"),
            (frame(1, [["x", "float32"]], 4), "is JSON"),
            (frame(1, [["x", "float32", 3]], 12), "is JSON"),
            (frame(1, [["x", "float32", [-1]]], 4), "bytes. Received: shape"),
            (frame(1, [["x", "float32", [1.0]]], 4), "Received: shape"),
            (frame(1, [["x", "float32", [True]]], 4), "Received: shape"),
            (frame(1, [["x", "float32", "ab"]], 4), "Received: shape"),
            (frame(1, [["x", "float32", [2**62]]], 4), "Received: shape"),
            (frame(1, [["x", "float32", [0, 2**35, 2**35]]], 0), "Received: shape"),
            (frame(1, [["x", "float32", [1] * 40]], 4), "Received: shape"),
            (frame(1, [["x", "float32", [2**20, 2**20]]], 2**42 % 2**36), "Received: shape"),
            (frame(1, [["x", "float32", [3]]], 8), "announced 8 bytes. Received: shapes of 12"),
            (frame(1, [["x", "uint8", [1]], ["x", "uint8", [1]]], 2), "different names"),
            (frame(1, [[3, "uint8", [1]]], 1), "different names"),
            (frame(1, [], 0, kind=3), "has a kind"),
            (frame(1, [], 0, meta=[]), "has a kind"),
            (frame(1, [["x", "uint8", [9]]], 9) + b"cut", "closed by the peer"),
        ],
    )
    def test_a_broken_one_is_refused(self, data, says):
        with pytest.raises(TrainingError, match=says) as caught:
            received_from(data)
        where = caught.value.where
        assert where == {"rank": 0, "step": 7, "phase": "gradient", "peer": 1}

    @settings(max_examples=60, deadline=5000, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=200))
    def test_random_bytes(self, data):
        with pytest.raises(TrainingError):
            received_from(data)

    @settings(max_examples=60, deadline=5000)
    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner),
        )
    )
    def test_random_headers(self, content):
        header = json.dumps(content).encode()
        with pytest.raises(TrainingError):
            received_from(struct.pack("<4sIQ", b"TFG1", len(header), 5) + header + b"12345")

    @settings(max_examples=40, deadline=5000)
    @given(st.data())
    def test_truncated(self, data):
        whole = frame(1, [["x", "uint8", [50]], ["y", "bool", [3]]], 53) + bytes(53)
        with pytest.raises(PeerLostError, match="closed by the peer"):
            received_from(whole[: data.draw(st.integers(0, len(whole) - 1))])

    def test_the_next_message_is_not_touched(self):
        left, right = socket.socketpair()
        with right, Links(0, {1: left}) as links:
            right.sendall(frame(1, [], 0, kind="first") + frame(1, [], 0, kind="second"))
            assert swap(links, {})[1].kind == "first"
            assert swap(links, {})[1].kind == "second"


class TestProcesses:
    """Rank 0 and 2 here, rank 1 in a process of its own that exchanges for ever."""

    @pytest.fixture
    def ranks(self):
        pairs = {ends: socket.socketpair() for ends in combinations(range(3), 2)}
        source = textwrap.dedent(f"""
            import socket, sys
            import numpy as np
            from tfspark.sync.frames import Message
            from tfspark.sync.links import Links
            fds = {{0: {pairs[0, 1][1].fileno()}, 2: {pairs[1, 2][0].fileno()}}}
            links = Links(1, {{peer: socket.socket(fileno=fd) for peer, fd in fds.items()}})
            array = np.zeros(2_000_000)
            for step in range(100_000):
                links.exchange(
                    {{peer: Message("x", 1, {{}}, {{"x": array}}) for peer in (0, 2)}},
                    phase="gradient", step=step, timeout_s=30,
                )
                if step == 3:
                    print("running", flush=True)
        """)
        process = subprocess.Popen(
            [sys.executable, "-c", source],
            pass_fds=[pairs[0, 1][1].fileno(), pairs[1, 2][0].fileno()],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        pairs[0, 1][1].close()
        pairs[1, 2][0].close()
        with (
            Links(0, {1: pairs[0, 1][0], 2: pairs[0, 2][0]}) as first,
            Links(2, {0: pairs[0, 2][1], 1: pairs[1, 2][1]}) as last,
        ):
            yield process, [first, last]
        process.kill()
        process.communicate()

    @pytest.mark.parametrize(
        ("kind", "timeout_s", "says"),
        [
            (signal.SIGKILL, 30, "connection to rank 1 was lost"),
            (signal.SIGSTOP, 1, "silent for 1 s.*rank 1"),
        ],
    )
    def test_it_dies_or_stops_in_mid_exchange(self, ranks, kind, timeout_s, says):
        process, links = ranks
        stopped = []

        def run(own):
            array = np.zeros(2_000_000)
            try:
                for step in range(100_000):
                    own.exchange(
                        {peer: Message("x", own.rank, {}, {"x": array}) for peer in own.peers},
                        phase="gradient",
                        step=step,
                        timeout_s=timeout_s if step >= 3 else 30,  # the other one starts first
                    )
            except PeerLostError as error:
                return error, time.monotonic()
            finally:
                stopped.append(own.rank)
                own.close()

        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(run, own) for own in links]
            assert process.stdout.readline() == b"running\n"
            os.kill(process.pid, kind)
            when = time.monotonic()
            results = [future.result(timeout=10) for future in futures]
        for rank, (error, ended) in zip((0, 2), results, strict=True):
            assert ended - when < 3
            assert error.rank == rank and error.phase == "gradient" and error.step >= 3
        # Who notices first leaves, which may be what the other one then sees.
        first = results[0 if stopped[0] == 0 else 1][0]
        assert first.peer == 1
        with pytest.raises(PeerLostError, match=says):
            raise first
