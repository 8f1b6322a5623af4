"""Writing the rows of a data set to stores, and freeing them."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pyspark import SparkContext, StorageLevel
from pyspark.rdd import RDD

from tfspark.data.chunks import link_stores, write_store, write_stores
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
        originals: what the stores are links to, where there are such.
    """

    handles: tuple[Handle, ...]
    rdd: RDD | None = None
    originals: tuple[Handle, ...] = ()

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
        _remove((*self.handles, *self.originals))


def materialise(
    source: Source, dataset_id: str, sc: SparkContext, num_ranks: int, shares_files: bool = False
) -> Materialised:
    """Writes one store per rank on the executors; see `TFDataset.materialise`."""
    with ExitStack() as undo:
        originals: tuple[Handle, ...] = ()
        if shares_files and source.is_here:
            # Through Spark, all rows would lie once more in the memory of driver and JVM.
            originals = materialise_local(source, dataset_id, num_ranks).handles
            undo.callback(_remove, originals)
        with driver_errors():
            if originals:
                rdd = link_stores(sc.parallelize(originals, num_ranks), dataset_id)
            else:
                rdd = write_stores(source.chunks(sc, num_ranks), source.spec, dataset_id)
            rdd.persist(StorageLevel.MEMORY_AND_DISK)  # of one executor, like the stores
            result = Materialised(tuple(rdd.collect()), rdd, originals)
        undo.callback(result.release)
        _check(result.handles, source)
        undo.pop_all()
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


def _remove(handles: Iterable[Handle]) -> None:
    """Removes the stores that lie on this machine."""
    for handle in handles:
        if handle.host == socket.gethostname():
            Path(handle.path).unlink(missing_ok=True)


def _check(handles: Sequence[Handle], source: Source) -> None:
    if not any(handle.rows for handle in handles):
        raise DataError(
            "A data set needs at least one row. Received: none in "
            f"{source.num_partitions} partitions. Check the filters and joins that made it, and "
            "the paths it is read from."
        )
    check_agreement(handles)
