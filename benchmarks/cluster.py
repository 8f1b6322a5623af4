"""A gang's steps on a cluster, simulated: processors, links and stragglers. No clock, no sockets.

Every host has one full-duplex link to a switch that never loses a byte. What a rank sends passes
four queues, each of them first come, first served:

    sender's processor → sender's link → latency → receiver's link → receiver's processor

Links serve one chunk after another: as much as a socket takes at once. So incast is simulated:
chunks of many senders wait for the link of one receiver. A rank first hands all its messages to
its sockets and then reads, as `sync/links.py` does; buffers are never full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from costs import Costs

_MOST_CHUNKS = 16  # of a message: enough to overlap what overlaps, few enough to simulate


@dataclass(frozen=True)
class Cluster:
    """Equal hosts around one switch.

    Attributes:
        num_ranks: N; ranks `0 … K - 1` are on the first host, and so on.
        ranks_per_host: K, a divisor of N.
        cores: of a host, for the threads that exchange.
        link_bytes_per_s: of a host's link, each way.
        latency_s: from one host to another.
        chunk_bytes: what a socket takes at once.
    """

    num_ranks: int
    ranks_per_host: int = 1
    cores: int = 1
    link_bytes_per_s: float = float("inf")
    latency_s: float = 0.0
    chunk_bytes: float = 256 * 1024

    def __post_init__(self) -> None:
        if self.num_ranks % self.ranks_per_host:
            raise ValueError(
                "All hosts have the same number of ranks. Received: "
                f"{self.num_ranks} ranks, {self.ranks_per_host} per host."
            )

    @property
    def turns(self) -> float:
        """How much slower a rank's thread is because it shares its host's cores."""
        return max(1.0, self.ranks_per_host / self.cores)


@dataclass(frozen=True)
class Wire:
    """How numbers travel.

    Attributes:
        name: "float32" or "bfloat16".
        weight_bytes: of a number.
        cast_s: seconds of the processor to convert one number, either way.
    """

    name: str = "float32"
    weight_bytes: int = 4
    cast_s: float = 0.0


@dataclass(frozen=True)
class Workload:
    """What a rank computes.

    Attributes:
        name: of the model.
        weights: P.
        compute_s: mean seconds of a rank's gradient.
        spread: standard deviation of the logarithm of that, from rank to rank and step to step.
    """

    name: str
    weights: int
    compute_s: float
    spread: float = 0.0

    def draw(self, num_ranks: int, random: np.random.Generator) -> np.ndarray:
        """Log-normal seconds of every rank `[N]`, of mean `compute_s`."""
        return self.compute_s * random.lognormal(-(self.spread**2) / 2, self.spread, num_ranks)


@dataclass(frozen=True)
class Delivery:
    """The end of an exchange.

    Attributes:
        done_s: float64 `[N]`, when each rank has everything.
        queue_bytes: the most that waited in the switch for one link.
    """

    done_s: np.ndarray
    queue_bytes: float = 0.0


Exchange: TypeAlias = Callable[[Cluster, Costs, float, np.ndarray], Delivery]
"""`exchange(cluster, costs, slice_bytes, ready_s)`: every rank sends a slice to each other."""


@dataclass(frozen=True)
class Direct:
    """Every rank sends to every other, in the order of `peers(num_ranks)`, int `[N, N - 1]`."""

    peers: Callable[[int], np.ndarray]

    def __call__(
        self, cluster: Cluster, costs: Costs, slice_bytes: float, ready_s: np.ndarray
    ) -> Delivery:
        """See `Exchange`."""
        size, turns = cluster.num_ranks, cluster.turns
        begun = ready_s + turns * costs.exchange_s
        if size == 1:
            return Delivery(begun)
        count = min(_MOST_CHUNKS, max(1, int(np.ceil(slice_bytes / cluster.chunk_bytes))))
        # Chunks of a rank in the order of sending: a round to all peers, then the next round.
        work = np.full((count, size - 1), turns * costs.byte_s / 2 * slice_bytes / count)
        work[0] += turns * costs.message_s / 2
        sent = begun[:, None] + np.cumsum(work)
        written = sent[:, -1]
        shape = sent.shape
        receiver = np.tile(self.peers(size), (1, count)).ravel()
        sender = np.repeat(np.arange(size), shape[1])
        arrived, queue_bytes = _travel(cluster, sent.ravel(), sender, receiver, slice_bytes / count)
        read = _served(
            receiver,
            np.maximum(arrived, written[receiver]),
            np.broadcast_to(work.ravel(), shape).ravel(),
        )
        done = np.full(size, -np.inf)
        np.maximum.at(done, receiver, read)
        return Delivery(done, queue_bytes)


def rank_order(num_ranks: int) -> np.ndarray:
    """Peers by rank: all ranks send to rank 0 first."""
    return np.array([[p for p in range(num_ranks) if p != r] for r in range(num_ranks)], int)


def next_first(num_ranks: int) -> np.ndarray:
    """Peers from the next rank on: at any time every rank sends to another one."""
    ranks, hops = np.arange(num_ranks), np.arange(1, num_ranks)
    return (ranks[:, None] + hops) % num_ranks


def ring(cluster: Cluster, costs: Costs, slice_bytes: float, ready_s: np.ndarray) -> Delivery:
    """N - 1 hops, each of which passes one slice on to the next rank; one rank per host.

    Such a sum would begin at another rank for every slice: it is not in rank order.
    """
    done = ready_s + cluster.turns * costs.exchange_s
    work = cluster.turns * costs.byte_s * slice_bytes
    hop = cluster.latency_s + cluster.turns * costs.message_s
    hop += max(work, slice_bytes / cluster.link_bytes_per_s)
    for _ in range(cluster.num_ranks - 1):
        done = np.maximum(done, np.roll(done, 1)) + hop
    return Delivery(done)


@dataclass(frozen=True)
class Steps:
    """What came of simulated steps.

    Attributes:
        step_s: seconds of a step, commits left out.
        compute_s: the mean rank's gradient.
        wait_s: how much longer the slowest rank's gradient takes.
        besides_s: sums, the update and what else is done for every weight.
        exchange_s: the rest: exchanges and casts.
        queue_bytes: the most that waited in the switch for one link.
    """

    step_s: float
    compute_s: float
    wait_s: float
    besides_s: float
    exchange_s: float
    queue_bytes: float


def simulate(
    cluster: Cluster,
    costs: Costs,
    workload: Workload,
    exchange: Exchange,
    wire: Wire,
    num_steps: int,
    random: np.random.Generator,
) -> Steps:
    """Steps one after another: gather the weights, compute, scatter the gradient, sum, update.

    No rank waits for others but by what it needs from them.
    """
    size, turns = cluster.num_ranks, cluster.turns
    slice_bytes = workload.weights / size * wire.weight_bytes
    own, others = workload.weights / size, workload.weights * (size - 1) / size
    besides = turns * costs.besides(size, workload.weights)
    now, slowest, queue_bytes = np.zeros(size), 0.0, 0.0
    for _ in range(num_steps):
        gathered = exchange(cluster, costs, slice_bytes, now + turns * wire.cast_s * own)
        compute = workload.draw(size, random)
        slowest += compute.max()
        ready = gathered.done_s + turns * wire.cast_s * others + compute
        scattered = exchange(cluster, costs, slice_bytes, ready + turns * wire.cast_s * others)
        now = scattered.done_s + turns * wire.cast_s * others + besides
        queue_bytes = max(queue_bytes, gathered.queue_bytes, scattered.queue_bytes)
    step_s, mean, slow = now.max() / num_steps, workload.compute_s, slowest / num_steps
    return Steps(step_s, mean, slow - mean, besides, step_s - slow - besides, queue_bytes)


def _travel(
    cluster: Cluster, sent: np.ndarray, sender: np.ndarray, receiver: np.ndarray, size: float
) -> tuple[np.ndarray, float]:
    """When chunks `[chunks]` of `size` bytes have come, and the most that waited in the switch.

    Chunks between ranks of one host do not travel.
    """
    source, target = sender // cluster.ranks_per_host, receiver // cluster.ranks_per_host
    remote = np.flatnonzero(source != target)
    if not len(remote):
        return sent, 0.0
    service = np.full(len(remote), size / cluster.link_bytes_per_s)
    left = _served(source[remote], sent[remote], service)
    # Its first byte reaches the receiver's link while its last one is still being sent.
    reached = left - service + cluster.latency_s
    come = _served(target[remote], reached, service)
    arrived = sent.copy()
    arrived[remote] = come
    waited = float((come - service - reached).max())
    return arrived, waited * cluster.link_bytes_per_s if waited > 0 else 0.0


def _served(queue: np.ndarray, arrived: np.ndarray, service: np.ndarray) -> np.ndarray:
    """When each of `[items]` leaves its queue, first come, first served.

    All queues serve as many items. An item leaves at `max(arrived, leaving of the former) +
    service`. With S the sum of services so far, that is `S + max(arrived - S before)`, the maximum
    taken over this item and all former ones.
    """
    order = np.lexsort((arrived, queue))
    rows = int(queue.max()) + 1
    arrival, lasting = arrived[order].reshape(rows, -1), service[order].reshape(rows, -1)
    total = np.cumsum(lasting, axis=1)
    leaving = total + np.maximum.accumulate(arrival - (total - lasting), axis=1)
    result = np.empty_like(arrived)
    result[order] = leaving.ravel()
    return result
