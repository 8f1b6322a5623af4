"""Executors that are processes of their own: `local-cluster`."""

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SOURCE = """
    import json, os
    from spark_app import *
    from tfspark import EveryEpoch, KerasModel
    from tfspark.sync import wire

    folder = {folder!r}
    result = dict()

    def report(run, state):
        import tfspark
        return state.rank, os.getppid(), tfspark.__file__

    with application("local-cluster[2,1,1024]") as sc:
        val_rdd = sc.parallelize([0], 1).flatMap(Rows("convolution", (20,)))
        model, training = optimizer(sc, model_dir=folder, val_rdd=val_rdd, metrics=["accuracy"])
        training.optimize(MaxIteration(9), checkpoint_trigger=EveryEpoch())
        result["shuffle"] = digest(model)
        result["scores"] = training.scores
        x, y = MODELS["convolution"][1](20, 0)
        model.compile(loss=MODELS["convolution"][0]()[1], metrics=["accuracy"])
        result["expected"] = model.evaluate(x, y, verbose=0, return_dict=True)
        loop = training._training.loop
        states = loop.engine.map_states(loop.commit, report)
        result["ranks"] = [rank for rank, _, _ in states]
        result["package"] = sorted(set(path for _, _, path in states))
        commit = loop.commit.computed.id()
        (info,) = [i for i in sc._jsc.sc().getRDDStorageInfo() if i.id() == commit]
        result["copies"] = info.storageLevel().replication()
        result["cached"] = info.numCachedPartitions()
        status = sc._jsc.sc().statusStore().rddList(True)
        blocks = [status.apply(i) for i in range(status.size())]
        (mine,) = [rdd for rdd in blocks if rdd.id() == commit]
        parts = mine.partitions().get()
        result["executors"] = [parts.apply(i).executors().size() for i in range(parts.size())]
        training.close()

        model, again = optimizer(sc, model_dir=folder)
        again.optimize(MaxIteration(12))
        result["resumed"] = digest(model)
        again.close()
        result["undisturbed"] = train(sc, 12)
        result["local"] = train(sc, 9, engine="local")

        for engine in ("gang", "local"):
            model, _ = optimizer(sc)
            for _ in range(2):
                KerasModel(model, engine=engine, num_ranks=2).fit(
                    dataset(sc, "convolution", (20, 13)), verbose=0
                )
            result["fits by " + engine] = digest(model), int(model.optimizer.iterations)
    print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def result(application, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    return application(SOURCE.format(folder=str(folder / "model")))


def test_executors_give_the_same_bits_as_the_driver_alone(result):
    assert result["shuffle"] == result["local"]


def test_a_commit_is_on_two_executors(result):
    assert result["ranks"] == [0, 1]
    assert (result["copies"], result["cached"]) == (2, 2)
    assert result["executors"] == [2, 2]


def test_validation_is_that_of_keras(result):
    expected = result["expected"]
    assert set(expected) == {"loss", "accuracy"}
    assert result["scores"] == pytest.approx(expected, rel=1e-5)


def test_a_further_fit_brings_the_slots_along(result):
    assert result["fits by gang"] == result["fits by local"]
    assert result["fits by gang"][1] == 6


def test_executors_write_and_read_checkpoints(result):
    assert result["resumed"] == result["undisturbed"]
