"""From chunks of checked rows to one store per rank.

A source encodes its rows, where they are, as *chunks*: Arrow record batches of a few megabytes in
the store's own format, as bytes. From there on every source is treated alike:

* as many source partitions as ranks: partition `r` is written as the store of rank `r`;
* more: neighbouring partitions are taken together, without a shuffle;
* fewer: row `i` of partition `p` goes to rank `(p + i) mod N`, through a shuffle. Every rank puts
  what it receives in the order of the source, so the order in which Spark fetches has no effect.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark import TaskContext
from pyspark.rdd import RDD

from tfspark.data.failures import reporting
from tfspark.data.rows import CHUNK_BYTES, RowBuffer, physical_spec
from tfspark.data.spec import RowSpec
from tfspark.data.store import Handle, StoreWriter
from tfspark.errors import DataError

PHASE = "materialise"


def encode_rows(spec: RowSpec, rows: Iterable[Any], partition: int) -> Iterator[bytes]:
    """Checked rows as chunks.

    Raises:
        DataError: a row does not match the spec; names partition, row and field.
    """
    buffer = RowBuffer(spec, partition)
    for row in rows:
        buffer.add_row(row)
        if buffer.full:
            yield encode(buffer.drain())
    if buffer.pending:
        yield encode(buffer.drain())


def encode_columns(
    spec: RowSpec, columns: Iterable[list[np.ndarray]], partition: int
) -> Iterator[bytes]:
    """Checked rows, given as arrays `[rows, *shape]` per field, as chunks."""
    buffer = RowBuffer(spec, partition)
    for arrays in columns:
        start = 0
        while start < len(arrays[0]):
            start += buffer.add_columns(arrays, start)
            if buffer.full:
                yield encode(buffer.drain())
    if buffer.pending:
        yield encode(buffer.drain())


def encode(batch: pa.RecordBatch) -> bytes:
    """A batch of the physical schema as a chunk."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def decode(chunk: bytes) -> pa.RecordBatch:
    """The batch of a chunk; shares its memory."""
    with pa.ipc.open_stream(chunk) as reader:
        return reader.read_next_batch()


def regroup(chunks: RDD, num_ranks: int) -> RDD:
    """The same rows as chunks in exactly `num_ranks` partitions; see the module's docstring."""
    partitions = chunks.getNumPartitions()
    if partitions == num_ranks:
        return chunks
    if partitions > num_ranks:
        return chunks.coalesce(num_ranks)
    return collect_dealt(chunks.mapPartitionsWithIndex(_Deal(num_ranks)), num_ranks)


def collect_dealt(dealt: RDD, num_ranks: int) -> RDD:
    """Chunks in one partition per rank from pairs (rank, (source partition, number, chunk))."""
    return dealt.partitionBy(num_ranks, int).mapPartitions(_in_source_order)


def write_stores(chunks: RDD, spec: RowSpec, dataset_id: str) -> RDD:
    """An RDD of one handle per partition of `chunks`; computing it writes the stores."""
    name = f"{chunks.context.applicationId}-{dataset_id}"
    return chunks.mapPartitionsWithIndex(_Write(spec, name))


def link_stores(originals: RDD, dataset_id: str) -> RDD:
    """An RDD of handles of stores that another process of the host has written.

    Computing it makes every store anew, without a copy where the file system allows that.

    Args:
        originals: partition `r` holds the handle of what that process has written for rank `r`.
        dataset_id: of the data set.
    """
    name = f"{originals.context.applicationId}-{dataset_id}"
    return originals.mapPartitionsWithIndex(_Link(name))


def write_store(spec: RowSpec, chunks: Iterable[bytes], rank: int, name: str) -> Handle:
    """Writes the chunks of a rank as a store in this process' folder for stores.

    Args:
        spec: of the rows.
        chunks: of the rank.
        rank: whose rows these are.
        name: of application and data set; begins the file's name.
    """
    with StoreWriter(_store_path(rank, name), spec, rank) as writer:
        for chunk in chunks:
            batch = decode(chunk)
            writer.append_batch(batch, physical_spec(batch.schema, spec))
    return writer.handle


def _store_path(rank: int, name: str) -> str:
    context = TaskContext.get()
    attempt = context.taskAttemptId() if context is not None else 0
    # A retried or speculative task must never meet another's file.
    file = f"{name}-rank{rank}-attempt{attempt}-{uuid.uuid4().hex[:8]}.arrow"
    return os.path.join(store_folder(rank), file)


def store_folder(rank: int) -> str:
    """Where this process writes the store of a rank.

    In a Spark task it is inside one of the executor's own folders, which Spark removes with the
    executor; elsewhere a folder of this process, removed when it exits.
    """
    # PySpark tells its workers the executor's folders in this variable; elsewhere it is the
    # user's, and shared between applications.
    folders = os.environ.get("SPARK_LOCAL_DIRS", "") if TaskContext.get() is not None else ""
    if folders:
        choices = folders.split(",")
        return os.path.join(choices[rank % len(choices)], "tfspark")
    return _process_folder()


@cache
def _process_folder() -> str:
    folder = tempfile.mkdtemp(prefix="tfspark-")  # readable by its owner alone
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class _Write:
    spec: RowSpec
    name: str

    def __call__(self, rank: int, chunks: Iterable[bytes]) -> Iterator[Handle]:
        with reporting(rank=rank, phase=PHASE):
            yield write_store(self.spec, chunks, rank, self.name)


@dataclass(frozen=True)
class _Link:
    name: str

    def __call__(self, rank: int, originals: Iterable[Handle]) -> Iterator[Handle]:
        with reporting(rank=rank, phase=PHASE):
            for original in originals:
                path = _store_path(rank, self.name)
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                try:
                    os.link(original.path, path)
                except FileNotFoundError as error:
                    raise DataError(
                        "Rows of arrays are in a file of the driver until the training is closed. "
                        f"Received: no file {original.path}. Do not delete it, or keep TMPDIR "
                        "where nobody cleans up."
                    ) from error
                except OSError:  # another file system, or one without links
                    shutil.copyfile(original.path, path)
                    os.chmod(path, 0o600)
                yield replace(original, path=path)


@dataclass(frozen=True)
class _Deal:
    num_ranks: int

    def __call__(
        self, partition: int, chunks: Iterable[bytes]
    ) -> Iterator[tuple[int, tuple[int, int, bytes]]]:
        done = partition
        for number, chunk in enumerate(chunks):
            batch = decode(chunk)
            for offset in range(min(self.num_ranks, batch.num_rows)):
                mine = batch.take(pa.array(range(offset, batch.num_rows, self.num_ranks)))
                yield (done + offset) % self.num_ranks, (partition, number, encode(mine))
            done += batch.num_rows


def _in_source_order(pairs: Iterable[tuple[int, tuple[int, int, bytes]]]) -> Iterator[bytes]:
    """Chunks by (source partition, number), spooled to disk: they may not fit in memory."""
    with tempfile.TemporaryFile() as spool:
        places = []
        for _, (partition, number, chunk) in pairs:
            places.append((partition, number, spool.tell(), len(chunk)))
            spool.write(chunk)
        for _, _, position, size in sorted(places):
            spool.seek(position)
            yield spool.read(size)


def slices(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch in parts of about the size of a chunk."""
    rows = max(int(batch.num_rows * CHUNK_BYTES / max(batch.nbytes, 1)), 1)
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)
