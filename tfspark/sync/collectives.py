"""What all ranks compute together over their links, on plain arrays.

Every rank calls the same function with the same phase and step, and arrays of the same shapes.
Sums start from zeros and run in rank order, so all ranks get the same bits, in every run.

Every rank sends to every other directly. A ring would not send less: a slice that is summed in rank
order has to pass all ranks one after the other, which is N - 1 slices on the wire and one more to
its owner, in N hops. Sent straight to the owner, it is N - 1 slices in one hop.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from tfspark.errors import InvalidInputError, TrainingError
from tfspark.sync.frames import Message
from tfspark.sync.links import Links
from tfspark.sync.stream import Place

Bounds: TypeAlias = Sequence[tuple[int, int]]
_Content: TypeAlias = tuple[dict[str, Any], dict[str, np.ndarray]]  # meta and arrays


def barrier(links: Links, *, phase: str, step: int, timeout_s: float) -> None:
    """Returns when every rank has come here."""
    _exchange(links, "barrier", {}, phase, step, timeout_s)


def all_gather_small(
    links: Links, value: Any, *, phase: str, step: int, timeout_s: float
) -> list[Any]:
    """The small value of every rank, by rank.

    Args:
        links: of this rank.
        value: anything that JSON holds. All ranks see it as JSON gives it back, its sender too:
            tuples become lists.
        phase, step, timeout_s: see `Links.exchange`.
    """
    outgoing: dict[int, _Content] = {peer: ({"value": value}, {}) for peer in links.peers}
    received = _exchange(links, "all_gather_small", outgoing, phase, step, timeout_s)
    values = {peer: message.meta["value"] for peer, message in received.items()}
    values[links.rank] = json.loads(json.dumps(value))
    return [values[rank] for rank in range(links.size)]


def all_reduce_sum(
    links: Links, vector: np.ndarray, *, phase: str, step: int, timeout_s: float
) -> np.ndarray:
    """The sum of one array per rank, the same bits on every rank.

    For small arrays: every rank sends the whole of it to every other.
    """
    outgoing: dict[int, _Content] = {peer: ({}, {"vector": vector}) for peer in links.peers}
    return _sum_of(links, "all_reduce_sum", outgoing, vector, phase, step, timeout_s)


def reduce_scatter(
    links: Links,
    vector: np.ndarray,
    bounds: Bounds,
    *,
    phase: str,
    step: int,
    timeout_s: float,
) -> np.ndarray:
    """This rank's slice of the sum of one vector per rank.

    Args:
        links: of this rank.
        vector: `[elements]`, this rank's part of the sum.
        bounds: `vector[start:stop]` belongs to rank `r` for `start, stop = bounds[r]`; the same
            on all ranks. Slices may be empty and differ in length.
        phase, step, timeout_s: see `Links.exchange`.
    """
    _check_bounds(links, vector, bounds)
    outgoing: dict[int, _Content] = {
        peer: ({}, {"slice": vector[slice(*bounds[peer])]}) for peer in links.peers
    }
    own = vector[slice(*bounds[links.rank])]
    return _sum_of(links, "reduce_scatter", outgoing, own, phase, step, timeout_s)


def all_gather(
    links: Links,
    own: np.ndarray,
    into: np.ndarray,
    bounds: Bounds,
    *,
    phase: str,
    step: int,
    timeout_s: float,
) -> None:
    """Fills a vector with the slices of all ranks, received right where they belong.

    Args:
        links: of this rank.
        own: this rank's slice; may be that part of `into` itself.
        into: `[elements]`, writable and C-contiguous.
        bounds: rank `r` fills `into[start:stop]` for `start, stop = bounds[r]`.
        phase, step, timeout_s: see `Links.exchange`.
    """
    _check_bounds(links, into, bounds)
    start, stop = bounds[links.rank]
    if own.shape != (stop - start,) or own.dtype != into.dtype:
        raise InvalidInputError(
            f"Rank {links.rank} fills {stop - start} elements of {into.dtype}. Received: "
            f"{own.dtype} {list(own.shape)}."
        )
    outgoing: dict[int, _Content] = {peer: ({}, {"slice": own}) for peer in links.peers}
    _exchange(
        links,
        "all_gather",
        outgoing,
        phase,
        step,
        timeout_s,
        place=lambda source, *_: into[slice(*bounds[source])],
    )
    into[start:stop] = own


def _sum_of(
    links: Links,
    kind: str,
    outgoing: Mapping[int, _Content],
    own: np.ndarray,
    phase: str,
    step: int,
    timeout_s: float,
) -> np.ndarray:
    """The rank-ordered sum of `own` and the one array that every peer sends."""
    received = _exchange(
        links,
        kind,
        outgoing,
        phase,
        step,
        timeout_s,
        # Of the same shape as `own`, so that a peer with another one is refused.
        place=lambda *_: np.empty(own.shape, own.dtype),
    )
    total = np.zeros(own.shape, own.dtype)
    for rank in range(links.size):
        (part,) = received[rank].arrays.values() if rank != links.rank else (own,)
        total += part
    return total


def _exchange(
    links: Links,
    kind: str,
    outgoing: Mapping[int, _Content],
    phase: str,
    step: int,
    timeout_s: float,
    place: Place | None = None,
) -> dict[int, Message]:
    """Exchanges (meta, arrays) with all peers, who must be at the same place of the program."""
    position = [phase, step]
    messages = {}
    for peer in links.peers:
        meta, arrays = outgoing.get(peer, ({}, {}))
        messages[peer] = Message(kind, links.rank, {**meta, "position": position}, arrays)
    received = links.exchange(messages, phase=phase, step=step, timeout_s=timeout_s, place=place)
    for peer, message in received.items():
        if message.kind != kind or message.meta.get("position") != position:
            raise TrainingError(
                f"All ranks compute the same in the same order, here {kind!r} of {position}. "
                f"Received: {message.kind!r} of {message.meta.get('position')}. All ranks must "
                "run the same version of tfspark.",
                rank=links.rank,
                step=step,
                phase=phase,
                peer=peer,
            )
    return received


def _check_bounds(links: Links, vector: np.ndarray, bounds: Bounds) -> None:
    if (
        vector.ndim != 1
        or len(bounds) != links.size
        or not all(0 <= start <= stop <= len(vector) for start, stop in bounds)
    ):
        raise InvalidInputError(
            f"Every one of {links.size} ranks has a slice of a vector. Received: bounds "
            f"{list(bounds)} of an array of shape {list(vector.shape)}."
        )
