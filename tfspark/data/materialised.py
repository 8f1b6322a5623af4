"""Writing the rows of a data set to stores, and freeing them."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyspark import SparkContext, StorageLevel
from pyspark.rdd import RDD

from tfspark.data.chunks import write_store, write_stores
from tfspark.data.failures import driver_errors
from tfspark.data.sources import Source
from tfspark.data.store import Handle, check_agreement
from tfspark.errors import DataError


@dataclass(frozen=True)
class Materialised:
    """A data set whose rows lie in stores, one per rank.

    Attributes:
        handles: by rank.
        rdd: RDD of the handles, partition `r` holding that of rank `r`, persisted; its lineage
            rebuilds a lost store. None where the stores were written in this process.
    """

    handles: tuple[Handle, ...]
    rdd: RDD | None = None

    @property
    def rows_per_rank(self) -> tuple[int, ...]:
        """Rows in each store."""
        return tuple(handle.rows for handle in self.handles)

    def release(self) -> None:
        """Frees the handles, and removes the stores that lie on this machine.

        Those on other machines go with their executor's folder.
        """
        if self.rdd is not None:
            self.rdd.unpersist()
        for handle in self.handles:
            if handle.host == socket.gethostname():
                Path(handle.path).unlink(missing_ok=True)


def materialise(source: Source, dataset_id: str, sc: SparkContext, num_ranks: int) -> Materialised:
    """Writes one store per rank on the executors; see `TFDataset.materialise`."""
    with driver_errors():
        rdd = write_stores(source.chunks(sc, num_ranks), source.spec, dataset_id)
        rdd.persist(StorageLevel.MEMORY_AND_DISK)  # of one executor, like the stores
        handles = tuple(rdd.collect())
    result = Materialised(handles, rdd)
    try:
        _check(handles, source)
    except DataError:
        result.release()
        raise
    return result


def materialise_local(source: Source, dataset_id: str, num_ranks: int) -> Materialised:
    """Writes one store per rank in this process; see `TFDataset.materialise_local`."""
    name = f"local-{dataset_id}"
    handles: list[Handle] = []
    for rank, chunks in source.local_chunks(num_ranks):
        while len(handles) < rank:
            handles.append(write_store(source.spec, (), len(handles), name))
        handles.append(write_store(source.spec, chunks, rank, name))
    while len(handles) < num_ranks:
        handles.append(write_store(source.spec, (), len(handles), name))
    _check(handles, source)
    return Materialised(tuple(handles))


def _check(handles: Sequence[Handle], source: Source) -> None:
    if not any(handle.rows for handle in handles):
        raise DataError(
            "A data set needs at least one row. Received: none in "
            f"{source.num_partitions} partitions. Check the filters and joins that made it, and "
            "the paths it is read from."
        )
    check_agreement(handles)
