"""A partition may be larger than the memory of the worker that trains on it."""

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SOURCE = """
    import json, os, time
    import keras
    import numpy as np
    from spark_app import *
    from tfspark.data.store import Store

    ROWS, WIDTH = 1536, 2**18  # a row is one megabyte

    class Watch:
        # The most anonymous memory that any Python worker had; pages of a file are not counted.
        def __init__(self):
            self.most, self.over = dict(), False

        def __call__(self):
            while not self.over:
                for worker in python_workers():
                    size = memory(worker, "status", "RssAnon")
                    self.most[worker] = max(self.most.get(worker, 0), size)
                time.sleep(0.05)

    def memory(process, file, key):
        try:
            with open(f"/proc/{process}/{file}") as lines:
                return sum(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024
        except (FileNotFoundError, ProcessLookupError):
            return 0

    def mapped(process, path):
        # Megabytes of a file that a process has mapped: (resident, its share of them)
        sizes, here = dict(Rss=0, Pss=0), False
        with open(f"/proc/{process}/smaps") as lines:
            for line in lines:
                first, *rest = line.split()
                if not first.endswith(":"):
                    here = line.rstrip().endswith(path)
                elif here and first[:-1] in sizes:
                    sizes[first[:-1]] += int(rest[0]) / 1024
        return sizes["Rss"], sizes["Pss"]

    def rows(_):
        for number in range(ROWS):
            yield np.full(WIDTH, number / ROWS, np.float32), number % 2

    class Touch:
        # Maps a store, reads all of it, and tells how much of it is mapped while others do too.
        def __init__(self, handle):
            self.handle = handle

        def __call__(self, numbers):
            list(numbers)
            store = Store.open(self.handle)
            total = 0.0
            for row in range(store.rows):
                total += float(store.read_range(row, row + 1)[0].sum())
            time.sleep(4)
            yield os.getpid(), *mapped(os.getpid(), self.handle.path)
            time.sleep(2)

    with application("local[2]") as sc:
        watch = Watch()
        with During(watch):
            rdd = sc.parallelize([0], 1).flatMap(rows)
            data = TFDataset.from_rdd(
                rdd, features=("float32", [WIDTH]), labels=("int32", []), batch_size=64
            )
            model = keras.Sequential([keras.Input((WIDTH,)), keras.layers.Dense(2)])
            training = TFOptimizer.from_keras(
                model, data, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                optimizer=keras.optimizers.SGD(0.1), engine="shuffle", num_ranks=1,
                progress=False,
            )
            training.optimize(MaxIteration(ROWS // 64))
            training.close()
            watch.over = True
        part = sc.parallelize(range(64), 1).map(lambda i: (np.full(WIDTH, i, np.float32), i))
        (handle,) = TFDataset.from_rdd(part, batch_size=4).materialise(sc, 1).handles
        shares = sc.parallelize(range(2), 2).mapPartitions(Touch(handle)).collect()
    print(json.dumps(dict(most=max(watch.most.values()), shares=shares)))
"""


@pytest.fixture(scope="module")
def result(application):
    return application(SOURCE)


def test_a_partition_larger_than_the_memory_of_its_worker_trains(result):
    # TensorFlow and XLA take about half a gigabyte, whatever the data.
    assert 200 < result["most"] < 1024


def test_workers_share_the_pages_of_a_store(result):
    (one, resident, share), (other, *_) = result["shares"]
    assert one != other
    assert resident > 60  # megabytes of 64
    assert share < 0.6 * resident
