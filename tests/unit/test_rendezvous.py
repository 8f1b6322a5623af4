"""Ranks that meet over loopback TCP: threads of this process, and processes of their own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks_meeting import AT, TOKEN, Raw, driver, error_of, eventually, join, meet, on_all

from tfspark.errors import InvalidInputError, TrainingError
from tfspark.sync.collectives import all_gather_small, barrier
from tfspark.sync.control import TO_RANK
from tfspark.sync.frames import Message
from tfspark.sync.links import PeerLostError
from tfspark.sync.member import _CALLED, _CALLER, _HELLO, _MAGIC, Member
from tfspark.sync.secret import NONCE_BYTES, PROOF_BYTES, is_proof, nonce, proof

ROOT = Path(__file__).parent.parent.parent


class TestMeeting:
    @pytest.mark.parametrize("num_ranks", [1, 2, 3, 6])
    @pytest.mark.parametrize("bind_host", ["127.0.0.1", "0.0.0.0", "localhost"])
    def test_all_are_connected(self, num_ranks, bind_host):
        reports = []

        def run(rank):
            with join(rendezvous, rank, num_ranks, bind_host=bind_host) as member:
                ranks = all_gather_small(member.links, rank, **AT)
                member.report({"ranks": ranks})
                member.done()
                return ranks

        with driver(num_ranks, lambda *report: reports.append(report)) as rendezvous:
            assert on_all(num_ranks, run) == [list(range(num_ranks))] * num_ranks
            eventually(lambda: len(reports) == num_ranks)
            assert rendezvous.failures == []
        assert sorted(rank for rank, _ in reports) == list(range(num_ranks))
        assert all(report == {"ranks": list(range(num_ranks))} for _, report in reports)

    def test_the_first_free_port_is_taken(self):
        with socket.create_server(("127.0.0.1", 0)) as taken, driver(2) as rendezvous:
            port = taken.getsockname()[1]
            with pytest.raises(TrainingError, match=rf"range\({port}, {port + 1}\), all") as caught:
                join(rendezvous, 0, 2, ports=range(port, port + 1))
            assert caught.value.where == {"rank": 0, "phase": "rendezvous"}
            with ThreadPoolExecutor(1) as pool, Raw(rendezvous) as other:
                other.register(1)
                waiting = pool.submit(
                    join, rendezvous, 0, 2, ports=range(port, port + 50), timeout_s=0.5
                )
                while "peers" not in (answer := other.read()):
                    pass
                assert port < answer["peers"][0][1] < port + 50
                assert answer["peers"][1] == ["127.0.0.1", 1]
                with pytest.raises(PeerLostError, match=r"within 0.5 s.*with rank 1\.") as caught:
                    waiting.result()
                assert caught.value.peer == [1]

    def test_no_driver(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = listener.getsockname()
        with pytest.raises(TrainingError, match=rf"connects to the driver.*{address[1]}") as caught:
            Member.join(address, TOKEN, 2, 0, 3, bind_host="127.0.0.1", timeout_s=1)
        assert caught.value.where == {"rank": 2, "phase": "rendezvous"}

    def test_a_bad_host(self):
        with driver(2) as rendezvous, pytest.raises(TrainingError, match=r"192\.0\.2\.1"):
            join(rendezvous, 0, 2, bind_host="192.0.2.1")

    def test_who_has_not_come_is_named(self):
        with driver(12) as rendezvous:
            started = time.monotonic()
            errors = on_all(2, lambda rank: error_of(join, rendezvous, rank, 12, timeout_s=0.3))
            assert time.monotonic() - started < 3
        for rank, error in enumerate(errors):
            assert error.where == {"rank": rank, "phase": "rendezvous"}
            # Told by its own clock, or by the driver because of the other one's.
            assert "no word of ranks 2, 3, 4, 5, 6, 7, 8, 9 and 2 more" in str(error)

    def test_a_peer_that_is_gone_again_is_named(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        with driver(2) as rendezvous, Raw(rendezvous) as other:
            other.register(0, port=port)
            with pytest.raises(PeerLostError, match=rf"refused.* rank 0 at 127.0.0.1:{port}") as e:
                join(rendezvous, 1, 2)
            assert e.value.where == {"rank": 1, "phase": "rendezvous", "peer": 0}

    def test_strangers_at_the_listener_are_ignored(self):
        """Wrong hellos, half ones and silent ones, before the right one comes."""
        with driver(2) as rendezvous, Raw(rendezvous) as other, ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(join, rendezvous, 0, 2)
            other.register(1)
            while "peers" not in (answer := other.read()):
                pass
            address = tuple(answer["peers"][0])
            with contextlib.ExitStack() as stack:
                strangers = [stack.enter_context(Caller(address)) for _ in range(6)]
                strangers[0].socket.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n" + bytes(100))
                strangers[1].socket.sendall(_MAGIC)
                strangers[2].call(1, 0, token="other token")
                strangers[3].call(1, 0, attempt=1)
                strangers[4].call(2, 0)
                # What another connection has said, word by word.
                heard = Caller(address)
                said = heard.hello(1, 0)
                heard.close()
                strangers[5].socket.sendall(said)
                for wrong in (strangers[0], *strangers[2:]):
                    assert wrong.read(1) == b""
                assert not waiting.done()
                with Caller(address) as right:
                    right.call(1, 0, and_then=b"more")
                    answer = right.read(PROOF_BYTES)
                    assert is_proof(answer, TOKEN, _CALLED, *right.said)
                    with waiting.result(timeout=5) as member:
                        assert member.links.peers == (1,)
                        with pytest.raises(TrainingError, match="starts with"):
                            # What followed the hello is the first exchange's.
                            right.socket.sendall(bytes(100))
                            barrier(member.links, **AT)

    def test_a_program_that_answers_in_a_ranks_place_is_refused(self):
        with (
            driver(2) as rendezvous,
            Raw(rendezvous) as other,
            ThreadPoolExecutor(1) as pool,
            socket.create_server(("127.0.0.1", 0)) as impostor,
        ):
            other.register(0, port=impostor.getsockname()[1])
            waiting = pool.submit(join, rendezvous, 1, 2)
            caller, _ = impostor.accept()
            with caller:
                caller.sendall(nonce())
                hello = caller.recv(1000)
                assert TOKEN.encode() not in hello
                caller.sendall(bytes(PROOF_BYTES))
                with pytest.raises(PeerLostError, match="another program answers for rank 0") as e:
                    waiting.result(timeout=5)
            assert e.value.where == {"rank": 1, "phase": "rendezvous", "peer": 0}

    @pytest.mark.parametrize(
        "says",
        [
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            b'{"challenge": "zz"}\n',
            b'{"challenge": 3}\n',
            b'{"challenge": "%s"}\n{"proof": "%s"}\n' % (b"00" * 32, b"00" * 32),
            b'{"challenge": "%s"}\n{"peers": []}\n' % (b"00" * 32),
        ],
    )
    def test_a_program_that_answers_in_the_drivers_place_is_refused(self, says):
        with (
            socket.create_server(("127.0.0.1", 0)) as impostor,
            ThreadPoolExecutor(1) as pool,
        ):
            waiting = pool.submit(
                Member.join,
                *(impostor.getsockname(), TOKEN, 0, 0, 2),
                bind_host="127.0.0.1",
                timeout_s=5,
            )
            caller, _ = impostor.accept()
            with caller:
                caller.sendall(says)
                with pytest.raises(TrainingError, match=r"driver (proves|sends)") as caught:
                    waiting.result(timeout=5)
                assert caught.value.where["rank"] == 0
                assert TOKEN.encode() not in caller.recv(10_000)

    def test_who_is_silent_in_the_drivers_place_is_waited_for_in_vain(self):
        with (
            socket.create_server(("127.0.0.1", 0)) as silent,
            pytest.raises(TrainingError, match="no challenge in time"),
        ):
            Member.join(silent.getsockname(), TOKEN, 0, 0, 2, bind_host="127.0.0.1", timeout_s=0.2)


class Caller:
    """A connection to a rank that says what it likes."""

    def __init__(self, address):
        self.socket = socket.create_connection(address, 5)
        self.challenge = self.read(NONCE_BYTES)

    def hello(self, rank, peer, *, token=TOKEN, attempt=0):
        content, own = _HELLO.pack(_MAGIC, attempt, rank, peer), nonce()
        self.said = self.challenge, own, content
        return content + own + proof(token, _CALLER, *self.said)

    def call(self, rank, peer, and_then=b"", **options):
        self.socket.sendall(self.hello(rank, peer, **options) + and_then)

    def read(self, count):
        """So many bytes, or fewer where it was closed."""
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while len(data) < count and (part := self.socket.recv(count - len(data))):
                data += part
        return data

    def close(self):
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class TestStrangersAtTheDriver:
    @pytest.mark.parametrize(
        "changes",
        [
            {"token": "wrong"},
            {"rank": 2},
            {"rank": -1},
            {"rank": "0"},
            {"attempt": -1},
            {"port": 0},
            {"port": 1 << 16},
            {"host": 3},
            {"nonce": "zz"},
            {"nonce": "5a" * NONCE_BYTES},
            {"nonce": None},
            {"own": b"short"},
            {"proof": ""},
            {"proof": "xyz"},
            {"proof": 3},
            {"proof": "00" * 32},
        ],
        ids=lambda changes: str(changes)[:40],
    )
    def test_wrong_registrations_change_nothing(self, changes):
        with driver(2) as rendezvous, Raw(rendezvous) as stranger:
            stranger.send(stranger.registration(**changes))
            assert stranger.read() is None
            assert rendezvous.failures == []
            assert on_all(2, lambda rank: meet(rendezvous, rank)) == [2, 2]

    def test_what_another_connection_has_said_is_of_no_use(self):
        with driver(2) as rendezvous, Raw(rendezvous) as heard, Raw(rendezvous) as stranger:
            said = heard.registration(rank=1)
            assert TOKEN not in str(said)
            stranger.send(said)
            assert stranger.read() is None
            heard.send(said)
            answer = bytes.fromhex(heard.read()["proof"])
            assert is_proof(answer, TOKEN, TO_RANK, *heard.nonces, heard.said)

    @pytest.mark.parametrize(
        "line",
        [
            {"report": {}},
            {"failed": "all"},
            [],
            b"no json\n",
            b"\xff\xfe\n",
            b"[" * 60_000 + b"\n",
            b"x" * 70_000,
            b'{"token": "' + b"x" * 70_000 + b'"}\n',
        ],
        ids=lambda line: str(line)[-30:],
    )
    def test_they_change_nothing(self, line):
        with driver(2) as rendezvous, Raw(rendezvous) as stranger:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                stranger.send(line)
            assert stranger.read() is None
            assert rendezvous.failures == []
            assert on_all(2, lambda rank: meet(rendezvous, rank)) == [2, 2]

    @settings(
        max_examples=40, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(st.binary(max_size=300))
    def test_random_bytes(self, data):
        with driver(1) as rendezvous:
            with Raw(rendezvous) as stranger:
                stranger.send(data + b"\n")
                assert stranger.read() is None
            assert rendezvous.failures == []
            assert meet(rendezvous, 0, 1) == 1


class TestTheEnd:
    @pytest.mark.parametrize("early", [True, False])
    def test_an_interrupt_reaches_every_rank_and_ends_nothing(self, early):
        with driver(2) as rendezvous, ThreadPoolExecutor(2) as pool:
            if early:
                rendezvous.interrupt()
            joining = [pool.submit(join, rendezvous, rank, 2) for rank in range(2)]
            with joining[0].result(10) as one, joining[1].result(10) as other:
                rendezvous.interrupt()
                deadline = time.monotonic() + 10
                while not (one.is_interrupted and other.is_interrupted):
                    assert time.monotonic() < deadline
                    one.check()
                    other.check()
                list(pool.map(lambda member: barrier(member.links, **AT), (one, other)))
                one.done()
                other.done()

    def test_an_abort_while_a_rank_waits_for_others(self):
        with driver(2) as rendezvous, ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(join, rendezvous, 1, 2)
            rendezvous.abort("Interrupted.")
            with pytest.raises(TrainingError, match="driver ended the round: Interrupted") as e:
                waiting.result(timeout=3)
            assert e.value.rank == 1
            # Also for those who come later, in whatever attempt.
            with pytest.raises(TrainingError, match="ended the round: Interrupted"):
                join(rendezvous, 0, 2, attempt=5)
            assert rendezvous.failures == []

    def test_an_abort_while_a_rank_waits_for_the_mesh(self):
        with driver(2) as rendezvous, Raw(rendezvous) as other, ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(join, rendezvous, 0, 2)
            other.register(1)
            while "peers" not in other.read():
                pass
            rendezvous.abort("Interrupted.", rank=1)
            with pytest.raises(TrainingError, match="ended the round: rank 1: Interrupted"):
                waiting.result(timeout=3)
            assert rendezvous.failures == [(1, "Interrupted.")]

    def test_an_abort_in_an_exchange(self):
        together = threading.Barrier(4, timeout=10)

        def run(rank):
            with join(rendezvous, rank, 3) as member:
                together.wait()
                if rank == 2:
                    return error_of(_wait_for_control, member)
                return error_of(barrier, member.links, **AT)

        with driver(3) as rendezvous, ThreadPoolExecutor(3) as pool:
            running = [pool.submit(run, rank) for rank in range(3)]
            together.wait()
            rendezvous.abort("x" * 100_000)
            for rank, future in enumerate(running):
                error = future.result(timeout=3)
                # Another rank that saw it first may already have left.
                assert error.rank == rank
                assert "ended the round: xxx" in str(error) or isinstance(error, PeerLostError)
            assert any("xxx" in str(future.result()) for future in running)

    def test_a_failure_is_named_to_all_others(self):
        def run(rank):
            with join(rendezvous, rank, 3) as member:
                together.wait()
                if rank == 1:
                    member.failed("ZeroDivisionError in the user's map" + "\U0001f4a5" * 20_000)
                error = error_of(_wait_for_control, member) if rank != 1 else None
                if error is not None:
                    member.failed(str(error))
                together.wait()
                return error

        together = threading.Barrier(3, timeout=10)
        with driver(3) as rendezvous:
            errors = on_all(3, run)
            failures = rendezvous.failures
        assert errors[1] is None
        for error in (errors[0], errors[2]):
            assert "The driver ended the round: rank 1: ZeroDivisionError" in str(error)
        # The others only echo it: they are not noted.
        assert [rank for rank, _ in failures] == [1]
        assert failures[0][1].startswith("ZeroDivisionError")
        assert len(failures[0][1]) == 5000

    def test_a_rank_that_leaves_before_it_is_done(self):
        with driver(2) as rendezvous:
            members = on_all(2, lambda rank: join(rendezvous, rank, 2))
            members[0].close()
            members[0].close()
            with pytest.raises(TrainingError, match="rank 0: its connection to the driver ended"):
                _wait_for_control(members[1])
            members[1].close()
            assert [rank for rank, _ in rendezvous.failures] == [0]

    def test_a_rank_that_is_done_may_leave(self):
        with driver(2) as rendezvous:
            first, second = on_all(2, lambda rank: join(rendezvous, rank, 2))
            first.done()
            first.close()
            second.report({"still": "here"})
            second.done()
            second.check()
            second.close()
            time.sleep(0.05)
            assert rendezvous.failures == []

    def test_a_member_that_sends_nonsense_has_failed(self):
        with driver(1) as rendezvous, Raw(rendezvous) as member:
            member.register(0)
            assert "proof" in member.read() and "peers" in member.read()
            member.send({"what": 1})
            assert member.read() is None
            eventually(lambda: rendezvous.failures)
            assert rendezvous.failures[0][0] == 0
            assert "what is no message: {'what': 1}" in rendezvous.failures[0][1]

    def test_the_driver_is_gone(self):
        with driver(2) as rendezvous:
            members = on_all(2, lambda rank: join(rendezvous, rank, 2))
        for rank, member in enumerate(members):
            with pytest.raises(PeerLostError, match="The driver is gone") as caught:
                barrier(member.links, **AT)
            assert (caught.value.rank, caught.value.peer) == (rank, "driver")
            member.failed("nobody listens")
            with pytest.raises(PeerLostError, match="The driver is gone"):
                for _ in range(100):
                    member.report({})
            member.close()

    def test_an_abort_right_before_the_end_arrives(self):
        with driver(1) as rendezvous:
            member = join(rendezvous, 0, 1)
            rendezvous.abort("Over.")
        with member, pytest.raises(TrainingError, match="ended the round: Over"):
            _wait_for_control(member)
        rendezvous.abort("harmless")

    def test_a_report_has_a_limit(self):
        with driver(1) as rendezvous, join(rendezvous, 0, 1) as member:
            with pytest.raises(InvalidInputError, match="at most 65536"):
                member.report({"x": "y" * 70_000})
            member.done()

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_ranks_see_a_server_that_failed(self):
        def broken(rank, report):
            raise OSError("disk full")

        with driver(1, broken) as rendezvous, join(rendezvous, 0, 1) as member:
            member.report({})
            with pytest.raises(PeerLostError, match="The driver is gone"):
                _wait_for_control(member)


def _wait_for_control(member):
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        member.check()
        time.sleep(0.005)


class TestAttempts:
    def test_a_newer_one_replaces_the_older(self):
        with driver(2) as rendezvous, ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(join, rendezvous, 0, 2, attempt=0)
            eventually(lambda: rendezvous._members)
            members = on_all(2, lambda rank: join(rendezvous, rank, 2, attempt=1))
            with pytest.raises(TrainingError, match="round: attempt 1 of the stage has replaced"):
                waiting.result(timeout=3)
            with pytest.raises(TrainingError, match="round: attempt 1 of the stage has replaced"):
                join(rendezvous, 1, 2, attempt=0)
            with pytest.raises(TrainingError, match="round: rank 1 has joined already"):
                join(rendezvous, 1, 2, attempt=1)
            for member in members:
                member.check()
                member.done()
                member.close()
            assert rendezvous.failures == []

    def test_a_new_one_starts_without_the_failures_of_the_old(self):
        with driver(2) as rendezvous:
            for attempt in range(2):
                members = on_all(2, lambda rank: join(rendezvous, rank, 2, attempt=attempt))  # noqa: B023
                assert rendezvous.failures == []
                members[attempt].failed(f"attempt {attempt}")
                eventually(lambda: rendezvous.failures)
                # Who comes later in the same attempt is told at once.
                with pytest.raises(TrainingError, match=f"rank {attempt}: attempt {attempt}"):
                    join(rendezvous, 0, 2, attempt=attempt)
                for member in members:
                    member.close()
            assert rendezvous.failures[0] == (1, "attempt 1")


def test_nothing_is_left_behind():
    def once():
        with driver(2) as rendezvous:
            on_all(2, lambda rank: meet(rendezvous, rank))
            with Raw(rendezvous) as stranger:
                stranger.send(b"x\n").read()

    def used():
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    once()
    before = used()
    for _ in range(100):  # two joins each
        once()
    with driver(3) as rendezvous:
        for attempt in range(20):
            assert error_of(join, rendezvous, 0, 3, attempt=attempt, timeout_s=0.01)
    assert used() == before


class TestProcesses:
    """Three ranks in processes of their own exchange for ever, until one is killed or stopped."""

    SOURCE = textwrap.dedent("""
        import sys
        import numpy as np
        from tfspark.errors import TrainingError
        from tfspark.sync.frames import Message
        from tfspark.sync.member import Member

        rank, port = int(sys.argv[1]), int(sys.argv[2])
        member = Member.join(
            ("127.0.0.1", port), "söcret", rank, 0, 3, bind_host="127.0.0.1", timeout_s=30
        )
        array = np.zeros(500_000)
        with member:
            try:
                for step in range(1_000_000):
                    messages = {
                        peer: Message("x", rank, {}, {"x": array}) for peer in member.links.peers
                    }
                    member.links.exchange(
                        messages, phase="gradient", step=step, timeout_s=1 if step > 3 else 30
                    )
                    if step == 5:
                        member.report({"running": step})
            except TrainingError as error:
                print(type(error).__name__, error, flush=True)
                member.failed(str(error))
    """)

    @pytest.mark.parametrize(
        ("kind", "says"),
        [
            (signal.SIGKILL, "rank 1: its connection to the driver ended|rank 1 was lost"),
            (signal.SIGSTOP, "silent for 1 s.*rank 1"),
        ],
    )
    def test_the_others_end_soon(self, kind, says):
        running = threading.Semaphore(0)
        with driver(3, lambda *_: running.release()) as rendezvous:
            processes = [
                subprocess.Popen(
                    [sys.executable, "-c", self.SOURCE, str(rank), str(rendezvous.address[1])],
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "PYTHONPATH": str(ROOT)},
                )
                for rank in range(3)
            ]
            try:
                for _ in range(3):
                    assert running.acquire(timeout=30)
                os.kill(processes[1].pid, kind)
                when = time.monotonic()
                texts = [processes[rank].communicate(timeout=10)[0] for rank in (0, 2)]
                assert time.monotonic() - when < 3
            finally:
                for process in processes:
                    process.kill()
                    process.communicate()
            failures = rendezvous.failures
        # Each ended by itself, and the cause came to the driver first.
        assert [processes[rank].returncode for rank in (0, 2)] == [0, 0]
        for rank, text in zip((0, 2), texts, strict=True):
            assert f"[rank {rank}, step " in text and ", phase gradient" in text
        cause = f"rank {failures[0][0]}: {failures[0][1]}"
        assert re.search(says, cause)


def test_exchange_over_tcp_of_a_whole_round():
    def run(rank):
        with join(rendezvous, rank, 3) as member:
            for step in range(20):
                array = np.full(100_000, rank + step, np.float32)
                messages = {
                    peer: Message("x", rank, {"step": step}, {"x": array})
                    for peer in member.links.peers
                }
                received = member.links.exchange(messages, phase="x", step=step, timeout_s=10)
                for peer, message in received.items():
                    assert message.meta == {"step": step}
                    assert (message.arrays["x"] == peer + step).all()
            member.done()

    with driver(3) as rendezvous:
        on_all(3, run)
        assert rendezvous.failures == []
