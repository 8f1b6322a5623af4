"""A step's exchange in plain processes: no Spark, no TensorFlow, nothing but bytes and sums.

One process per rank, all on this machine, a TCP connection over loopback between any two. What the
same bytes cost without tfspark is measured here too: over one raw socket pair, and copied through
memory that two processes share.

    >>> bare(num_ranks=2, sizes=[1 << 20], seconds=0.5)[0].step_s   # doctest: +SKIP
    0.0021
"""

from __future__ import annotations

import multiprocessing
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from tfspark.sync.collectives import all_gather, all_gather_small, barrier, reduce_scatter
from tfspark.sync.links import Links

_PATIENCE_S = 120.0
_LEAST_STEPS, _MOST_STEPS = 5, 2000


@dataclass(frozen=True)
class Exchange:
    """What a step's exchange of `weights` float32 weights costs `num_ranks` ranks.

    Attributes:
        num_ranks, weights: N and P.
        scatter_s, gather_s: seconds of the reduce-scatter and of the all-gather; medians over
            steps, means over ranks.
        step_s: of both, likewise.
        scatter_cpu_s, gather_cpu_s: seconds of one rank's processor, user and system; means.
        received_bytes: of one rank a step, as the kernel counts them (TCP_INFO).
    """

    num_ranks: int
    weights: int
    scatter_s: float
    gather_s: float
    step_s: float
    scatter_cpu_s: float
    gather_cpu_s: float
    received_bytes: float


def bare(num_ranks: int, sizes: Sequence[int], seconds: float) -> list[Exchange]:
    """Exchanges of vectors of each size over sockets, by `sync/links.py` and `collectives.py`.

    Args:
        num_ranks: N.
        sizes: float32 elements of the vectors.
        seconds: how long each is repeated.
    """
    return _means(num_ranks, sizes, on_ranks(num_ranks, _exchange_all, list(sizes), seconds))


def bare_shared(num_ranks: int, sizes: Sequence[int], seconds: float) -> list[Exchange]:
    """As `bare`, through memory that the ranks share, as those of a gang on one host do."""
    return _means(num_ranks, sizes, on_ranks(num_ranks, _exchange_shared, list(sizes), seconds))


def _means(
    num_ranks: int, sizes: Sequence[int], found: list[list[tuple[float, ...]]]
) -> list[Exchange]:
    return [
        Exchange(num_ranks, size, *np.mean([own[index] for own in found], axis=0).tolist())
        for index, size in enumerate(sizes)
    ]


def raw_pair(slice_bytes: int, seconds: float) -> float:
    """Seconds of a step's bytes of two ranks over one raw loopback socket pair.

    Twice, as a step has two exchanges, `slice_bytes` go each way at the same time. Either process
    sends in one thread and receives in another, which is the best that Python can do.
    """
    return float(np.mean(on_ranks(2, _raw, slice_bytes, seconds)))


def shared_copy(slice_bytes: int, seconds: float) -> float:
    """Seconds of a step's bytes of two ranks copied through memory that both share.

    Twice, each process copies `slice_bytes` into it and then the other's out of it.
    """
    spawn = multiprocessing.get_context("spawn")
    areas = [spawn.RawArray("B", slice_bytes) for _ in range(2)]
    return float(np.mean(on_ranks(2, _copy, areas, seconds)))


def sum_of_bytes(num_ranks: int, weights: int) -> float:
    """Bytes that a rank sends, and receives, in a step: 2 (N - 1) / N of the vector."""
    return 2 * (num_ranks - 1) / num_ranks * weights * 4


def on_ranks(num_ranks: int, task: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`task(rank, sockets by peer, *arguments)` in a new process for each rank; results by rank.

    Raises:
        RuntimeError: a process died; its own error is on stderr.
    """
    spawn = multiprocessing.get_context("spawn")
    sockets = _mesh(num_ranks)
    processes, results = [], []
    try:
        for rank, own in enumerate(sockets):
            receiver, sender = spawn.Pipe(duplex=False)
            process = spawn.Process(target=_run, args=(sender, task, rank, own, *arguments))
            process.start()
            sender.close()
            processes.append(process)
            results.append(receiver)
        for own in sockets:
            _close(own)
        return [_result(rank, receiver) for rank, receiver in enumerate(results)]
    finally:
        for own in sockets:
            _close(own)
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.terminate()


def _result(rank: int, receiver: Any) -> Any:
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(
            f"Every rank measures to the end. Received: the process of rank {rank} died; its "
            "error is above."
        ) from None


def _run(sender: Any, task: Callable[..., Any], rank: int, sockets: Any, *arguments: Any) -> None:
    sender.send(task(rank, sockets, *arguments))


def _mesh(num_ranks: int) -> list[dict[int, socket.socket]]:
    """TCP connections between all ranks, by rank and peer."""
    sockets: list[dict[int, socket.socket]] = [{} for _ in range(num_ranks)]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for low, high in combinations(range(num_ranks), 2):
            sockets[low][high] = socket.create_connection(listener.getsockname())
            sockets[high][low] = listener.accept()[0]
    return sockets


def _close(sockets: Mapping[int, socket.socket]) -> None:
    for connection in sockets.values():
        connection.close()


def _exchange_all(
    rank: int, sockets: Mapping[int, socket.socket], sizes: list[int], seconds: float
) -> list[tuple[float, ...]]:
    with Links(rank, sockets) as links:
        return [_exchange_one(links, sockets, size, seconds) for size in sizes]


def _exchange_shared(
    rank: int, sockets: Mapping[int, socket.socket], sizes: list[int], seconds: float
) -> list[tuple[float, ...]]:
    with Links(rank, sockets) as links:
        links.share_memory(step=0, timeout_s=_PATIENCE_S)
        return [_exchange_one(links, sockets, size, seconds) for size in sizes]


def _exchange_one(
    links: Links, sockets: Mapping[int, socket.socket], size: int, seconds: float
) -> tuple[float, ...]:
    cuts = np.linspace(0, size, links.size + 1).astype(int).tolist()
    bounds = list(pairwise(cuts))
    vector, into = np.ones(size, np.float32), np.zeros(size, np.float32)

    def step(number: int) -> tuple[float, ...]:
        at = {"phase": "benchmark", "step": number, "timeout_s": _PATIENCE_S}
        begun, cpu = time.perf_counter(), time.process_time()
        own = reduce_scatter(links, vector, bounds, **at)
        between, cpu_between = time.perf_counter(), time.process_time()
        all_gather(links, own, into, bounds, **at)
        ended, cpu_ended = time.perf_counter(), time.process_time()
        return between - begun, ended - between, cpu_between - cpu, cpu_ended - cpu_between

    def count_bytes() -> int:
        # Between barriers no byte is on its way.
        barrier(links, phase="before", step=0, timeout_s=_PATIENCE_S)
        count = _received_bytes(sockets)
        barrier(links, phase="after", step=0, timeout_s=_PATIENCE_S)
        return count

    step(0)
    assert (into == links.size).all(), "the exchange sums"
    begun = time.perf_counter()
    for number in range(3):
        step(number)
    own_s = (time.perf_counter() - begun) / 3
    # All ranks must take the same number of steps.
    at = {"phase": "count", "step": 0, "timeout_s": _PATIENCE_S}
    count = int(seconds / max(all_gather_small(links, own_s, **at)))
    count = min(max(count, _LEAST_STEPS), _MOST_STEPS)
    received = count_bytes()
    times = np.array([step(number) for number in range(count)])
    received = (count_bytes() - received) / count
    scatter_s, gather_s = np.median(times[:, :2], axis=0)
    step_s = float(np.median(times[:, :2].sum(axis=1)))
    return (scatter_s, gather_s, step_s, *times[:, 2:].mean(axis=0), received)


def _received_bytes(sockets: Mapping[int, socket.socket]) -> int:
    """Bytes that have come over all connections, `tcpi_bytes_received` of Linux's tcp.h."""
    return sum(
        struct.unpack_from(
            "Q", connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192), 128
        )[0]
        for connection in sockets.values()
    )


def _raw(
    rank: int, sockets: Mapping[int, socket.socket], slice_bytes: int, seconds: float
) -> float:
    (connection,) = sockets.values()
    outgoing, incoming = np.ones(slice_bytes, np.uint8), np.zeros(slice_bytes, np.uint8)

    def step() -> None:
        for _ in range(2):
            sender = threading.Thread(target=connection.sendall, args=(outgoing.data,))
            sender.start()
            view = incoming.data
            while view.nbytes:
                view = view[connection.recv_into(view) :]
            sender.join()

    return _median_s(step, seconds, connection)


def _copy(
    rank: int, sockets: Mapping[int, socket.socket], areas: list[Any], seconds: float
) -> float:
    (connection,) = sockets.values()
    shared = [np.frombuffer(area, np.uint8) for area in areas]
    outgoing, incoming = np.ones_like(shared[0]), np.zeros_like(shared[0])

    def step() -> None:
        for _ in range(2):
            shared[rank][:] = outgoing
            _meet(connection)
            incoming[:] = shared[1 - rank]
            _meet(connection)

    return _median_s(step, seconds, connection)


def _meet(connection: socket.socket) -> None:
    connection.sendall(b".")
    connection.recv(1)


def _median_s(step: Callable[[], None], seconds: float, connection: socket.socket) -> float:
    """Of steps that both processes repeat for so long."""
    step()
    begun = time.perf_counter()
    step()
    own_s = time.perf_counter() - begun
    connection.sendall(struct.pack("d", own_s))
    other_s = struct.unpack("d", connection.recv(8, socket.MSG_WAITALL))[0]
    times = []
    for _ in range(max(_LEAST_STEPS, int(seconds / max(own_s, other_s)))):
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    return float(np.median(times))
