"""What dies under a gang: the round is taken again, to the same bits, or ends with one error."""

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

CLUSTER = """
    import json, logging, os, time
    from spark_app import *
    from tfspark import LeaveOut
    from tfspark.train.triggers import Trigger

    STEPS, DRIVER = 1200, os.getpid()
    result, logs = dict(), []
    handler = logging.Handler()
    handler.emit = lambda record: logs.append(record.getMessage())
    logging.getLogger("tfspark").addHandler(handler)

    class Deadly(Trigger):
        def __call__(self, progress):
            if progress.step >= 20 and os.getpid() != DRIVER:
                os.kill(os.getpid(), 9)
            return False

    class Raising(Trigger):
        def __call__(self, progress):
            if progress.step >= 20 and os.getpid() != DRIVER:
                raise KeyError("of the user")
            return False

    def gang(**settings):
        model, training = optimizer(sc, "dense", engine="gang", **settings)
        training.optimize(MaxIteration(4))
        return model, training

    def disturbed(name, pick=None, **settings):
        del logs[:]
        model, training = gang(**settings)

        def strike():
            wait_for(lambda: in_a_round(sc, stages=1))
            time.sleep(1)
            return all([kill(process) for process in pick()])

        if pick:
            with During(strike) as thread:
                training.optimize(MaxIteration(STEPS))
            result[name + " killed"] = thread.result
        else:
            training.optimize(MaxIteration(STEPS))
        training.close()
        result[name] = digest(model)
        result[name + " logs"] = list(logs)

    def failed(name, trigger):
        model, training = gang()
        good, began = digest(model), time.monotonic()
        try:
            training.optimize(trigger)
        except Exception as error:
            result[name] = [type(error).__name__, str(error)]
        result[name + " seconds"] = time.monotonic() - began
        result[name + " step"] = training.step
        training.close()

    with application("local-cluster[2,1,1024]") as sc:
        disturbed("nothing")
        disturbed("workers", python_workers)  # which of them are ranks, nobody can see
        disturbed("executor", lambda: executors()[:1])
        settled(sc, 2)
        failed("deadly", Deadly())
        failed("raising", Raising())
        disturbed("afterwards")
        # Nobody is that late, so that no row is dropped.
        disturbed("tolerant workers", python_workers, leave_out=LeaveOut(factor=1e6))
        disturbed("local steps", average_every=4)
        disturbed("local steps, workers", python_workers, average_every=4)
    print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def cluster(application):
    return application(CLUSTER)


@pytest.mark.parametrize(
    ("what", "undisturbed"),
    [
        ("workers", "nothing"),
        ("executor", "nothing"),
        ("tolerant workers", "nothing"),
        ("local steps, workers", "local steps"),
    ],
)
def test_a_lost_rank_costs_a_round_and_no_bit(cluster, what, undisturbed):
    assert cluster[f"{what} killed"]
    assert cluster[what] == cluster[undisturbed]
    assert cluster[f"{what} logs"]


def test_local_steps_train_otherwise(cluster):
    assert cluster["local steps"] != cluster["nothing"]


def test_a_step_that_always_kills_its_worker_is_one_error(cluster):
    kind, message = cluster["deadly"]
    assert kind in ("WorkerLostError", "PeerLostError")
    assert "memory" in message and "\tat " not in message
    assert 4 <= cluster["deadly step"] < 20
    assert cluster["deadly seconds"] < 120


def test_the_error_of_a_rank_is_the_error_of_the_round(cluster):
    kind, message = cluster["raising"]
    assert kind == "UserFunctionError"
    assert "rank " in message and "KeyError: 'of the user'" in message
    assert cluster["raising seconds"] < 60


def test_the_cluster_is_whole_afterwards(cluster):
    assert cluster["afterwards"] == cluster["nothing"]
    assert cluster["nothing logs"] == cluster["afterwards logs"] == []
