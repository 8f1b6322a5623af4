"""Spark's own master and workers: hosts that die, come back, or have networks of their own."""

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SOURCE = """
    import json, logging, os, pathlib, tempfile, threading, time
    import standalone
    from spark_app import *
    from tfspark import FailurePolicy, SeveralIteration
    from tfspark.doctor import examine
    from tfspark.slots import registered_slots

    STEPS, result, logs = 40, dict(), []
    handler = logging.Handler()
    handler.emit = lambda record: logs.append(record.getMessage())
    logging.getLogger("tfspark").addHandler(handler)
    folder = pathlib.Path(tempfile.mkdtemp())
    namespaces = standalone.can_make_namespaces()
    result["namespaces"] = namespaces

    def trained(name, strike=None, wait_s=0.0, **settings):
        wait_for(lambda: registered_slots(sc) >= 3, 180)
        del logs[:]
        policy = FailurePolicy(wait_for_slots_s=wait_s)
        model, training = optimizer(
            sc, "dense", sizes=(20, 13, 11), engine="gang", failure_policy=policy, **settings
        )
        # Rounds of eight steps, so that there are many borders between them.
        every = dict(checkpoint_trigger=SeveralIteration(8)) if settings else dict(
            validation_trigger=SeveralIteration(8)
        )
        training.optimize(MaxIteration(16), **every)
        started = time.monotonic()
        try:
            if strike:
                strike(training, every)
            else:
                training.optimize(MaxIteration(STEPS), **every)
            result[name] = digest(model)
        except Exception as error:
            result[name] = [type(error).__name__, str(error)]
        result[name + " seconds"] = time.monotonic() - started
        result[name + " logs"] = list(logs)
        training.close()

    def lose_one(training, every):
        cluster.hosts.pop().kill()
        training.optimize(MaxIteration(24), **every)
        cluster.add_host()
        wait_for(lambda: registered_slots(sc) >= 3, 180)
        training.optimize(MaxIteration(STEPS), **every)

    def lose_all(training, every):
        while cluster.hosts:
            cluster.hosts.pop().kill()
        training.optimize(MaxIteration(STEPS), **every)

    def addresses(sc):
        def of_all(rows):
            from pyspark import BarrierTaskContext
            list(rows)
            infos = BarrierTaskContext.get().getTaskInfos()
            return [info.address.split(":")[0] for info in infos]
        return sc.parallelize(range(3), 3).barrier().mapPartitions(of_all).collect()[:3]

    secret = {"spark.authenticate": "true", "spark.authenticate.secret": "of the test"}
    with standalone.standalone(folder, 3, namespaces=namespaces, settings=secret) as cluster:
        os.environ["SPARK_LOCAL_IP"] = cluster.address
        settings = dict(
            cores__max=3, executor__memory="768m", network__timeout="20s",
            network__timeoutInterval="5s",
            executor__heartbeatInterval="2s", driver__host=cluster.address,
            driver__bindAddress=cluster.address, authenticate=True, network__crypto__enabled=True,
            authenticate__secret="of the test", speculation=True,
        )
        with application(cluster.url, **settings) as sc:
            wait_for(lambda: registered_slots(sc) >= 3, 180)
            result["doctor"] = [str(finding) for finding in examine(sc, str(folder / "shared"))]
            result["addresses"] = addresses(sc)
            trained("nothing")
            trained("one host", lose_one)
            saved = str(folder / "model")
            trained("all hosts", lose_all, wait_s=1.0, model_dir=saved)
            for _ in range(3):
                cluster.add_host()
            trained("rerun", model_dir=saved)
    print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def cluster(application):
    return application(SOURCE)


def test_the_doctor_finds_nothing_wrong(cluster):
    assert not [line for line in cluster["doctor"] if line.startswith("PROBLEM")]
    (connections,) = [line for line in cluster["doctor"] if "connections" in line]
    assert "all ranks reach the driver and each other, encrypted" in connections


def test_a_lost_host_costs_speed_and_no_bit(cluster):
    assert cluster["one host"] == cluster["nothing"]
    logs = cluster["one host logs"]
    assert any("Rounds run in stages" in line for line in logs)
    assert any("Rounds run as a gang again" in line for line in logs)
    assert cluster["nothing logs"] == []


def test_without_any_host_there_is_one_error_and_a_checkpoint(cluster):
    kind, message = cluster["all hosts"]
    assert kind in ("ClusterError", "CommitLostError")
    assert "\tat " not in message
    assert cluster["all hosts seconds"] < 180
    assert cluster["rerun"] == cluster["nothing"]


def test_hosts_have_networks_of_their_own(cluster):
    if not cluster["namespaces"]:
        pytest.skip("network namespaces take root on Linux, and the command ip")
    assert len(set(cluster["addresses"])) == 3
