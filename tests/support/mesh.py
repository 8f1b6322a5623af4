"""Ranks as threads of this process, linked by sockets: for tests of what passes between ranks."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any

from tfspark.sync.frames import Message
from tfspark.sync.links import Links

AT = {"phase": "gradient", "step": 7}


@contextlib.contextmanager
def mesh(size: int, pair: Callable[[], Any] = socket.socketpair) -> Iterator[list[Links]]:
    """The links of each rank to all others."""
    sockets: list[dict[int, socket.socket]] = [{} for _ in range(size)]
    for low, high in combinations(range(size), 2):
        sockets[low][high], sockets[high][low] = pair()
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Links(rank, own)) for rank, own in enumerate(sockets)]


def on_all(links: Sequence[Links], function: Callable[[Links], Any]) -> list[Any]:
    """`function(links of a rank)` of every rank, at once."""
    with ThreadPoolExecutor(len(links)) as pool:
        return list(pool.map(function, links))


def swap(
    links: Links, arrays: Any, *, place: Any = None, timeout_s: float = 10.0, meta: Any = None
) -> dict[int, Message]:
    """One message to every peer."""
    messages = {peer: Message("x", links.rank, meta or {}, arrays) for peer in links.peers}
    return links.exchange(messages, **AT, timeout_s=timeout_s, place=place)
