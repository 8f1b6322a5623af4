"""The batches of one rank: its rows, and the user's map over them. Knows no Spark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tfspark.data.chunks import decode
from tfspark.data.order import BatchOrder, row_seeds
from tfspark.data.rows import columns_of, physical_spec
from tfspark.data.spec import RowSpec
from tfspark.data.store import Handle, Store
from tfspark.errors import UserFunctionError

if TYPE_CHECKING:
    from tfspark.graphdef.pure import PureGraph

Batch = list[Any]
"""One array or eager tensor `[rows, *shape]` per field of the mapped rows."""

T = TypeVar("T")


class BatchReader:
    """Reads the part of each global batch that a rank holds.

    Args:
        handle: of the rank's store; it is opened at the first read.
        order: which rows make which batch.
        mapping: the user's map over batches; see `RowMapping.batch`.

    Example:
        >>> reader = BatchReader(handle, order, None)  # doctest: +SKIP
        >>> reader.prefetch(7)  # doctest: +SKIP
        >>> batch, rows = reader.read(7)  # doctest: +SKIP
    """

    def __init__(self, handle: Handle, order: BatchOrder, mapping: PureGraph | None = None):
        self.handle = handle
        self.order = order
        self._mapping = mapping
        self._ahead: tuple[int, Future[tuple[Batch, int]]] | None = None

    def read(self, step: int) -> tuple[Batch, int]:
        """The rows of a step, counted from 0 over all epochs, and how many they are.

        Without rows the batch is an empty list.

        Raises:
            StoreLostError: the store is not on this host.
            UserFunctionError: the user's map raised; names rank and row.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            expected, future = ahead
            if expected == step:
                return future.result()
            future.cancel()
        return self._read(step)

    def prefetch(self, step: int) -> None:
        """Starts to read a step in the background; the next `read` of that step takes it.

        An error in the background is raised by that `read`.
        """
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = (step, self._thread.submit(self._read, step))

    def _read(self, step: int) -> tuple[Batch, int]:
        rank = self.handle.rank
        epoch, step_in_epoch = self.order.locate(step)
        ids = self.order.row_ids(rank, epoch, step_in_epoch)
        if not len(ids):
            return [], 0
        seeds = self.order.row_seeds(rank, epoch, ids)
        return mapped(self._mapping, self._store.take(ids), ids, seeds, rank), len(ids)

    @cached_property
    def _store(self) -> Store:
        return Store.open(self.handle)

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="tfspark-batches")


def evaluation_batches(
    handle: Handle, batch_rows: int, mapping: PureGraph | None = None
) -> Iterator[tuple[Batch, int]]:
    """All rows of a store in their order, every one once; the last batch may have fewer rows.

    While a batch is used, the next one is read in the background.

    Args:
        handle: of the store.
        batch_rows: rows of a batch.
        mapping: the user's map over batches; its random operations draw the same every time.

    Yields:
        The batch and its number of rows.
    """
    store = Store.open(handle)

    def batches() -> Iterator[tuple[Batch, int]]:
        for start in range(0, store.rows, batch_rows):
            stop = min(start + batch_rows, store.rows)
            ids = np.arange(start, stop)
            arrays, seeds = store.read_range(start, stop), row_seeds(0, handle.rank, 0, ids)
            yield mapped(mapping, arrays, ids, seeds, handle.rank), stop - start

    return one_ahead(batches())


def chunk_batches(
    chunks: Iterable[bytes],
    spec: RowSpec,
    mapping: PureGraph | None,
    batch_rows: int,
    partition: int,
) -> Iterator[tuple[Batch, int]]:
    """All rows of chunks in their order, as they come; nothing is kept.

    Args:
        chunks: of a partition.
        spec: of the rows; dimensions of None are taken from the chunks.
        mapping: the user's map over batches; its random operations draw the same every time.
        batch_rows: most rows of a batch; a chunk's last batch may have fewer.
        partition: of the rows.

    Yields:
        The batch and its number of rows.
    """
    first = 0
    for chunk in chunks:
        decoded = decode(chunk)
        known = physical_spec(decoded.schema, spec)
        for start in range(0, decoded.num_rows, batch_rows):
            part = decoded.slice(start, batch_rows)
            ids = np.arange(first, first + part.num_rows)
            first += part.num_rows
            seeds = row_seeds(0, partition, 0, ids)
            yield mapped(mapping, columns_of(part, known), ids, seeds, partition), part.num_rows


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each computed in the background while the one before it is used."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="tfspark-batches") as thread:
        following: Future[Any] = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield item


def mapped(
    mapping: PureGraph | None,
    arrays: list[np.ndarray],
    ids: np.ndarray,
    seeds: np.ndarray,
    rank: int,
) -> Batch:
    """A batch after the user's map.

    Args:
        mapping: the map, or None.
        arrays: `[rows, *shape]` per field as stored.
        ids: of the rows, for errors.
        seeds: int64 `[rows, 2]`, of random operations in the map.
        rank: for errors.

    Raises:
        UserFunctionError: the map failed; names the row.
    """
    if mapping is None:
        return list(arrays)
    import tensorflow as tf

    from tfspark.graphdef.loader import load, op_error

    function = load(mapping)
    try:
        return function(*arrays, seeds)
    except tf.errors.OpError as error:
        row, cause = int(ids[0]), error
        for index, row_id in enumerate(ids):
            one = slice(index, index + 1)
            try:
                function(*(array[one] for array in arrays), seeds[one])
            except tf.errors.OpError as found:
                row, cause = int(row_id), found
                break
        raise UserFunctionError(
            "A function given to map() raised an error on a row of the data set. "
            f"Received: {op_error(cause)}",
            rank=rank,
            row=row,
        ) from error
