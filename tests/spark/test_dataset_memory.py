"""A worker's memory stays flat while its partition is written and read, however large it is."""

import numpy as np
import pytest

from tfspark.data.batches import BatchReader
from tfspark.data.dataset import TFDataset
from tfspark.data.order import BatchOrder

MEGABYTES = 160
LIMIT_MB = 60


def anonymous_mb():
    """Memory of this process that is not pages of a file."""
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


class Growing:
    """Rows of one megabyte; the task fails if its memory grows with their number."""

    def __call__(self, _):
        before = None
        for number in range(MEGABYTES):
            if number == 20:
                before = anonymous_mb()
            if before is not None and anonymous_mb() > before + LIMIT_MB:
                raise MemoryError(f"{anonymous_mb() - before:.0f} MB more at row {number}")
            yield np.full(2**18, number, np.float32), number


class ReadAll:
    """How many megabytes the worker grows while it reads every row of the store at random."""

    def __init__(self, order):
        self.order = order

    def __call__(self, handles):
        for handle in handles:
            reader = BatchReader(handle, self.order)
            reader.read(0)
            before, most = anonymous_mb(), 0.0
            for step in range(self.order.steps_per_epoch):
                (x, ids), _ = reader.read(step)
                assert len(ids) == 0 or (x[:, 5] == ids).all()
                most = max(most, anonymous_mb() - before)
            yield most


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_memory_does_not_grow_with_the_partition(sc, num_ranks):
    rdd = sc.parallelize([0], 1).flatMap(Growing())
    dataset = TFDataset.from_rdd(
        rdd, names=["x", "i"], shapes=[[2**18], []], types=["float32", "int64"], batch_size=4
    )
    materialised = dataset.materialise(sc, num_ranks)
    assert sum(materialised.rows_per_rank) == MEGABYTES
    order = BatchOrder(materialised.rows_per_rank, 4, 0, True)
    growths = materialised.rdd.mapPartitions(ReadAll(order)).collect()
    assert max(growths) < LIMIT_MB
