"""A partition's rows on local disk: an Arrow IPC file, written once, memory-mapped afterwards."""

from __future__ import annotations

import math
import os
import socket
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from tfspark._aligned import aligned_empty
from tfspark.data.rows import (
    CHUNK_BYTES,
    RowBuffer,
    RowDigest,
    column_view,
    fixed_shape,
    physical_schema,
    string_buffers,
)
from tfspark.data.spec import STRING, Field, RowSpec
from tfspark.errors import DataError, StoreLostError


@dataclass(frozen=True)
class Handle:
    """Says where a store lies and what is in it.

    Attributes:
        rank: whose rows these are.
        host: where the file is.
        path: of the file on that host.
        rows: number of rows.
        bytes: size of the file.
        digest: checksum of the rows in their order; a rebuilt store has the same.
        spec: of the rows, with the dimensions that the first row decided.
    """

    rank: int
    host: str
    path: str
    rows: int
    bytes: int
    digest: str
    spec: RowSpec


class StoreWriter:
    """Streams rows into a store, with memory for one chunk of rows.

    The file appears under its final name when `close` returns; leaving the context with an error
    removes what was written. Folder and file can be read by their owner alone.

    Args:
        path: of the file; its folder is created.
        spec: of the rows.
        rank: that the rows belong to.
        partition: named in errors; the rank unless given.
        chunk_bytes: rows are collected until they take so much.

    Example:
        >>> import tempfile
        >>> from tfspark.data.spec import Field
        >>> spec = RowSpec.of((Field("x", "float32", (2,)), Field("y", "int32", ())))
        >>> with StoreWriter(tempfile.mkdtemp() + "/store.arrow", spec, rank=0) as writer:
        ...     writer.append_row(([0.5, 1.5], 1))
        >>> Store.open(writer.handle).take(np.array([0]))
        [array([[0.5, 1.5]], dtype=float32), array([1], dtype=int32)]
    """

    def __init__(
        self,
        path: str,
        spec: RowSpec,
        rank: int,
        partition: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ):
        self._path = path
        self._rank = rank
        self._buffer = RowBuffer(spec, rank if partition is None else partition, chunk_bytes)
        self._spec = spec
        self._digest = RowDigest(spec)
        self._rows = 0
        self._writer: pa.RecordBatchFileWriter | None = None
        self._handle: Handle | None = None
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        self._temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file = os.fdopen(descriptor, "wb", buffering=0)

    def append_row(self, row: Any) -> None:
        """Adds one row of the spec's structure.

        Raises:
            DataError: the row does not match the spec; names partition, row and field.
        """
        self._buffer.add_row(row)
        if self._buffer.full:
            self.append_batch(self._buffer.drain(), self._buffer.spec)

    def append_columns(self, columns: Sequence[np.ndarray]) -> None:
        """Adds rows given as one array `[rows, *shape]` per field.

        Raises:
            DataError: as `append_row`.
        """
        start, count = 0, len(columns[0])
        while start < count:
            start += self._buffer.add_columns(columns, start)
            if self._buffer.full:
                self.append_batch(self._buffer.drain(), self._buffer.spec)

    def append_batch(self, batch: pa.RecordBatch, spec: RowSpec) -> None:
        """Adds a batch that a `RowBuffer` made.

        Args:
            batch: of the physical schema.
            spec: of the buffer, with all dimensions.

        Raises:
            DataError: the dimensions differ from those of the rows before.
        """
        if self._writer is None:
            self._spec = spec
            self._writer = pa.ipc.new_file(self._file, physical_schema(spec))
        elif spec != self._spec:
            raise _disagreement(self._spec, spec)
        self._writer.write_batch(batch)
        self._digest.update(batch)
        self._rows += batch.num_rows

    def close(self) -> Handle:
        """Finishes the file and gives it its name."""
        if self._buffer.pending:
            self.append_batch(self._buffer.drain(), self._buffer.spec)
        if self._writer is None:
            self._writer = pa.ipc.new_file(self._file, physical_schema(self._spec))
        self._writer.close()
        self._file.close()
        os.replace(self._temporary, self._path)
        self._handle = Handle(
            rank=self._rank,
            host=socket.gethostname(),
            path=self._path,
            rows=self._rows,
            bytes=os.path.getsize(self._path),
            digest=self._digest.hexdigest(),
            spec=self._spec,
        )
        return self._handle

    @property
    def handle(self) -> Handle:
        """Of the closed store."""
        assert self._handle is not None, "close() comes first"
        return self._handle

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
            os.unlink(self._temporary)


class Store:
    """A memory-mapped store. Processes that open the same one share its pages.

    Use `Store.open`; the map stays as long as the store, or an array that it gave out, is alive.
    """

    def __init__(self, handle: Handle, batches: Sequence[pa.RecordBatch]):
        self.handle = handle
        # Where every chunk begins, and after the last one the number of rows.
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self._strings: dict[str, list[tuple[np.ndarray, memoryview]]] = {}
        self._numbers: dict[str, list[np.ndarray]] = {}
        for field in handle.spec.fields:
            columns = [batch.column(field.name) for batch in batches]
            if field.dtype == STRING:
                self._strings[field.name] = [string_buffers(column) for column in columns]
            else:
                self._numbers[field.name] = [column_view(column, field) for column in columns]
            self._check_lengths(field, batches)

    def _check_lengths(self, field: Field, batches: Sequence[pa.RecordBatch]) -> None:
        elements = math.prod(fixed_shape(field))
        for index, batch in enumerate(batches):
            if field.dtype == STRING:
                whole = len(self._strings[field.name][index][0]) > batch.num_rows * elements
            else:
                whole = len(self._numbers[field.name][index]) == batch.num_rows
            if not whole:
                raise ValueError(f"chunk {index} of {field.name!r} is shorter than its rows")

    @classmethod
    def open(cls, handle: Handle) -> Store:
        """Maps the store that a handle names.

        Raises:
            StoreLostError: the file is not on this host.
            DataError: the file is truncated, or is not the store that the handle describes.
        """
        try:
            size = os.path.getsize(handle.path)
            source = pa.memory_map(handle.path)
        except FileNotFoundError as error:
            raise StoreLostError(
                f"A store must be on the host that reads it. Received: {handle.path} of host "
                f"{handle.host} is not on {socket.gethostname()}. It is rebuilt from its source.",
                rank=handle.rank,
                host=handle.host,
            ) from error
        try:
            reader = pa.ipc.open_file(source)
            batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
            for batch in batches:
                batch.validate()  # lengths only: Arrow aborts the process where they do not fit
        except (pa.ArrowException, OSError) as error:
            raise _not_the_store(handle, f"{size} bytes, {error}") from error
        rows = sum(batch.num_rows for batch in batches)
        described = (reader.schema.metadata or {}).get(b"tfspark")
        expected = (physical_schema(handle.spec).metadata or {}).get(b"tfspark")
        if (size, rows, described) != (handle.bytes, handle.rows, expected):
            raise _not_the_store(handle, f"{size} bytes, {rows} rows, fields {described!r}")
        try:
            return cls(handle, batches)
        # Columns that are missing, of another type, or shorter than their batch.
        except (pa.ArrowException, KeyError, TypeError, ValueError, IndexError) as error:
            raise _not_the_store(handle, f"{size} bytes, {error}") from error

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.handle.rows

    def take(self, row_ids: np.ndarray) -> list[np.ndarray]:
        """Rows by their numbers, in the order given.

        Args:
            row_ids: int64 `[rows]`.

        Returns:
            One array `[rows, *shape]` per field; strings are bytes in object arrays. It may be a
            read-only view of the store.

        Raises:
            IndexError: a number is not that of a row.
        """
        ids = np.asarray(row_ids, np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= self.rows):
            raise IndexError(f"row numbers {ids.min()} to {ids.max()} of {self.rows} rows")
        if len(ids) and ids[-1] - ids[0] == len(ids) - 1 and (np.diff(ids) == 1).all():
            return self.read_range(int(ids[0]), int(ids[-1]) + 1)
        chunks = np.searchsorted(self._starts, ids, side="right") - 1
        # Neighbours on disk are read together.
        by_chunk = np.argsort(chunks, kind="stable")
        edges = np.flatnonzero(np.diff(chunks[by_chunk])) + 1
        parts = []
        for where in np.split(by_chunk, edges) if len(ids) else []:
            chunk = int(chunks[where[0]])
            parts.append((where, chunk, ids[where] - self._starts[chunk]))
        return self._gather(len(ids), parts)

    def read_range(self, start: int, stop: int) -> list[np.ndarray]:
        """Rows `start` to `stop`; a view of the store where they lie in one chunk."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts: list[tuple[Any, int, Any]] = []
        position = start
        for chunk in range(first, len(self._starts) - 1):
            if position >= stop:
                break
            end = min(stop, int(self._starts[chunk + 1]))
            begin = int(self._starts[chunk])
            parts.append(
                (slice(position - start, end - start), chunk, slice(position - begin, end - begin))
            )
            position = end
        return self._gather(stop - start, parts)

    def _gather(self, count: int, parts: Sequence[tuple[Any, int, Any]]) -> list[np.ndarray]:
        """Rows from (where in the result, chunk, where in the chunk)."""
        result = []
        for field in self.handle.spec.fields:
            shape = (count, *fixed_shape(field))
            if field.dtype == STRING:
                column = np.empty(shape, object)
                for where, chunk, rows in parts:
                    offsets, data = self._strings[field.name][chunk]
                    column[where] = _decoded(offsets, data, rows, shape[1:])
            elif len(parts) == 1 and isinstance(parts[0][0], slice):
                _, chunk, rows = parts[0]
                column = self._numbers[field.name][chunk][rows]
            else:
                column = aligned_empty(shape, field.numpy_dtype)
                for where, chunk, rows in parts:
                    column[where] = self._numbers[field.name][chunk][rows]
            result.append(column)
        return result


def _decoded(
    offsets: np.ndarray, data: memoryview, rows: Any, shape: tuple[int, ...]
) -> np.ndarray:
    elements = int(np.prod(shape, dtype=int))
    ids = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
    cells = (ids[:, None] * elements + np.arange(elements)).reshape(-1)
    values = np.empty(len(cells), object)
    for index, (start, stop) in enumerate(zip(offsets[cells], offsets[cells + 1], strict=True)):
        values[index] = bytes(data[start:stop])
    return values.reshape((len(ids), *shape))


def check_agreement(handles: Iterable[Handle]) -> RowSpec:
    """The spec that all stores with rows share.

    Raises:
        DataError: the first rows of two stores decided on different dimensions.
    """
    spec: RowSpec | None = None
    empty: RowSpec | None = None
    for handle in handles:
        if handle.rows == 0:
            empty = handle.spec
        elif spec is None:
            spec = handle.spec
        elif handle.spec != spec:
            raise _disagreement(spec, handle.spec)
    result = spec or empty
    assert result is not None, "there is no store"
    return result


def _disagreement(one: RowSpec, other: RowSpec) -> DataError:
    pairs = [
        f"{a.name!r}: {list(a.shape)} and {list(b.shape)}"
        for a, b in zip(one.fields, other.fields, strict=True)
        if a != b
    ]
    return DataError(
        "All rows need one shape; where the declaration says None, the first row of every "
        f"partition decides. Received: {'; '.join(pairs)}. Pad or crop the rows to one shape."
    )


def _not_the_store(handle: Handle, received: str) -> DataError:
    return DataError(
        f"A store must be the whole file that was written: {handle.bytes} bytes, {handle.rows} "
        f"rows. Received: {handle.path} with {received}. Start the job again to rebuild it.",
        rank=handle.rank,
    )
