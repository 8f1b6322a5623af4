"""What dies under a training: it ends with the same bits, or with one error and nothing lost."""

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

CLUSTER = """
    import glob, json, logging, os, random, time
    from spark_app import *
    from tfspark import SeveralIteration

    SIZES, STEPS = (20, 13), 40
    result = dict()
    logs = []
    handler = logging.Handler()
    handler.emit = lambda record: logs.append(record.getMessage())
    logging.getLogger("tfspark").addHandler(handler)

    def disturbed(name, between=None, during=None):
        settled(sc, 2)
        del logs[:]
        val_rdd = sc.parallelize([0], 1).flatMap(Rows("convolution", (20,)))
        model, training = optimizer(sc, sizes=SIZES, val_rdd=val_rdd, metrics=["accuracy"])
        every = dict(validation_trigger=SeveralIteration(20))
        training.optimize(MaxIteration(4), **every)
        if between:
            result[name + " killed"] = between()
        if during:
            with During(during) as thread:
                training.optimize(MaxIteration(STEPS), **every)
            result[name + " killed"] = thread.result
        else:
            training.optimize(MaxIteration(STEPS), **every)
        result[name] = [digest(model), training.scores]
        training.close()
        result[name + " logs"] = list(logs)

    def some_workers():
        draw, killed = random.Random(1), 0
        for _ in range(4):
            time.sleep(draw.uniform(0.1, 0.6))
            killed += kill(draw.choice(python_workers()))
        return killed

    def one_executor():
        return kill(executors()[0])

    def one_executor_in_a_round():
        wait_for(lambda: in_a_round(sc))
        return one_executor()

    def every_store():
        paths = glob.glob({folder!r} + "/**/tfspark/*.arrow", recursive=True)
        for path in paths:
            os.unlink(path)
        return len(paths) > 0 and all([kill(p) for p in python_workers()])

    with application("local-cluster[2,1,1024]", local__dir={folder!r}) as sc:
        disturbed("nothing")
        # Before any daemon is killed: its workers would live on unseen, with the stores mapped.
        disturbed("stores", between=every_store)
        disturbed("workers", during=some_workers)
        disturbed("executor between", between=one_executor)
        disturbed("executor during", during=one_executor_in_a_round)

        settled(sc, 2)
        model, training = optimizer(sc, sizes=SIZES)
        training.optimize(MaxIteration(4))
        good = digest(model)
        for executor in executors():
            kill(executor)
        began = time.monotonic()
        try:
            training.optimize(MaxIteration(STEPS))
        except Exception as error:
            result["all executors"] = [type(error).__name__, str(error)]
        result["all executors seconds"] = time.monotonic() - began
        result["all executors kept"] = digest(model) == good

        def culprit(row):
            if row == 13:
                raise KeyError("of the user")
            return float(row), 0
        rdd = sc.parallelize(range(20), 2).map(culprit)
        data = TFDataset.from_rdd(
            rdd, features=("float32", []), labels=("int32", []), batch_size=4
        )
        try:
            data.materialise(sc, 2)
        except Exception as error:
            result["user"] = [type(error).__name__, str(error), error.partition, error.row]
    print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def cluster(application, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spark")
    return application(CLUSTER.format(folder=str(folder)))


@pytest.mark.parametrize("what", ["workers", "executor between", "executor during", "stores"])
def test_the_bits_are_those_of_an_undisturbed_run(cluster, what):
    assert cluster[f"{what} killed"]
    assert cluster[what] == cluster["nothing"]


def test_lost_stores_are_rebuilt(cluster):
    assert any("Rebuilding lost stores" in line for line in cluster["stores logs"])
    assert cluster["nothing logs"] == []


def test_losing_all_copies_is_one_error(cluster):
    kind, message = cluster["all executors"]
    assert kind == "CommitLostError"
    assert "model_dir" in message and "\tat " not in message
    assert cluster["all executors kept"]
    assert cluster["all executors seconds"] < 120


def test_an_error_of_the_user_names_partition_and_row(cluster):
    kind, message, partition, row = cluster["user"]
    assert kind == "UserFunctionError" and (partition, row) == (1, 3)
    assert "in culprit" in message and "KeyError: 'of the user'" in message


EMBEDDED = """
    import json, os, time
    from spark_app import *
    from tfspark.train.triggers import Trigger

    STEPS, DRIVER = 40, os.getpid()

    class Deadly(Trigger):
        def __call__(self, progress):
            if progress.step >= 20 and os.getpid() != DRIVER:
                os.kill(os.getpid(), 9)
            return False

        def horizon(self, progress):
            return 1

    with application("local[2]") as sc:
        result = dict(undisturbed=train(sc, STEPS))
        model, training = optimizer(sc)
        training.optimize(MaxIteration(4))

        def all_workers():
            wait_for(lambda: in_a_round(sc))
            return [kill(worker) for worker in python_workers()]

        with During(all_workers) as killer:
            training.optimize(MaxIteration(STEPS))
        result["killed"] = len(killer.result)
        result["disturbed"] = digest(model)
        training.close()

        model, training = optimizer(sc)
        began = time.monotonic()
        try:
            training.optimize(Deadly())
        except Exception as error:
            result["failure"] = [type(error).__name__, str(error)]
        result["seconds"] = time.monotonic() - began
        result["step"], kept = training.step, digest(model)
        training.optimize(MaxIteration(STEPS))
        result["resumed"] = digest(model)
        training.close()
        result["kept"] = kept == train(sc, result["step"])
    print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def embedded(application):
    return application(EMBEDDED)


def test_an_embedded_spark_survives_its_workers(embedded):
    """There Spark tries no task twice."""
    assert embedded["killed"] > 0
    assert embedded["disturbed"] == embedded["undisturbed"]


def test_a_step_that_always_kills_its_worker_is_one_error(embedded):
    kind, message = embedded["failure"]
    assert kind == "WorkerLostError"
    assert "memory" in message and "\tat " not in message
    assert 1 <= embedded["step"] < 20 and embedded["kept"]
    assert embedded["resumed"] == embedded["undisturbed"]
    assert embedded["seconds"] < 120
