"""Thousands of steps, hundreds of rounds: nothing grows on the driver, on executors, or on disk."""

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SOURCE = """
    import gc, json, os, time
    from pyspark.accumulators import _accumulatorRegistry
    from spark_app import *
    from tfspark import SeveralIteration

    folder = {folder!r}

    def anonymous_mb(process):
        with open(f"/proc/{{process}}/status") as status:
            (line,) = [line for line in status if line.startswith("RssAnon")]
        return int(line.split()[1]) / 1024

    def files():
        found = [
            os.path.join(root, name) for root, _, names in os.walk(folder) for name in names
        ]
        return [path for path in found if os.path.exists(path)]

    def measured(sc):
        runtime, system = sc._jvm.java.lang.Runtime.getRuntime(), sc._jvm.java.lang.System
        for _ in range(3):  # what Spark cleans after one collection goes with the next
            gc.collect()
            system.gc()
            time.sleep(1)
        here, jvm = os.getpid(), driver_jvm()
        workers = python_workers()
        return dict(
            driver_mb=anonymous_mb(here),
            heap_mb=(runtime.totalMemory() - runtime.freeMemory()) / 2**20,
            worker_mb=max(anonymous_mb(worker) for worker in workers),
            workers=len(workers),
            persisted=sc._jsc.getPersistentRDDs().size(),
            accumulators=len(_accumulatorRegistry),
            files=len(files()),
            file_mb=sum(os.path.getsize(path) for path in files()) / 2**20,
            driver_descriptors=len(os.listdir(f"/proc/{{here}}/fd")),
            driver_threads=len(os.listdir(f"/proc/{{here}}/task")),
            worker_descriptors=max(len(os.listdir(f"/proc/{{w}}/fd")) for w in workers),
            jvm_descriptors=len(os.listdir(f"/proc/{{jvm}}/fd")),
        )

    with application("local[2]", local__dir=folder) as sc:
        val_rdd = sc.parallelize([0], 1).flatMap(Rows("dense", (20,)))
        model, training = optimizer(sc, "dense", engine={engine!r}, val_rdd=val_rdd)
        # A gang's rounds are as long as the steps between two validations.
        every = dict(validation_trigger=SeveralIteration({validate_every}))
        training.optimize(MaxIteration(500), **every)
        early = measured(sc)
        training.optimize(MaxIteration(2000), **every)
        assert training.step == 2000
        late = measured(sc)
        training.close()
        closed = measured(sc)
    print(json.dumps([early, late, closed]))
"""


@pytest.fixture(scope="module", params=[("shuffle", 10_000), ("gang", 8)], ids=lambda p: p[0])
def measurements(application, tmp_path_factory, request):
    engine, validate_every = request.param
    folder = str(tmp_path_factory.mktemp("spark"))
    return application(SOURCE.format(folder=folder, engine=engine, validate_every=validate_every))


# What 1,500 steps may add. One step leaves 4 shuffle files and 2 RDDs if nothing is freed.
MOST = {
    "driver_mb": 20,
    "heap_mb": 20,
    "worker_mb": 20,
    "workers": 0,
    "persisted": 0,
    "accumulators": 0,
    "files": 20,
    "file_mb": 2,
    "driver_descriptors": 4,
    "driver_threads": 4,
    "worker_descriptors": 4,
    "jvm_descriptors": 20,
}


@pytest.mark.parametrize("what", MOST)
def test_it_stays_flat(measurements, what):
    early, late, _ = measurements
    assert late[what] - early[what] <= MOST[what], measurements


def test_every_rank_has_one_worker(measurements):
    # And there is what they were forked from, and what Spark started in its place. No task, of an
    # evaluation neither, needed two.
    assert measurements[0]["workers"] == 2 + 2


def test_nothing_is_persisted_after_close(measurements):
    assert measurements[2]["persisted"] == 0
