"""Several trainings in one application, and settings of Spark that clusters use."""

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SEVERAL = """
    import json
    from spark_app import *

    with application("local[2]") as sc:
        one, other = dict(name="dense", engine=ENGINE), dict(name="lstm", engine=ENGINE)
        apart = [train(sc, 30, **one), train(sc, 30, **other)]
        models = [optimizer(sc, **one), optimizer(sc, **other)]
        threads = [
            During(lambda training=training: training.optimize(MaxIteration(30)))
            for _, training in models
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        together = [digest(model) for model, _ in models]
        for _, training in models:
            training.close()
        left = sc._jsc.getPersistentRDDs().size()
    print(json.dumps(dict(apart=apart, together=together, left=left)))
"""


@pytest.mark.parametrize("engine", ["shuffle", "gang"])
def test_two_trainings_apart_and_together_give_the_same_bits(application, engine):
    result = application(SEVERAL.replace("ENGINE", repr(engine)))
    assert result["apart"] == result["together"]
    assert result["left"] == 0


SETTINGS = """
    import json
    from spark_app import *

    with application("local-cluster[2,1,1024]", **{settings!r}) as sc:
        bits = train(sc, 12)
        alone = train(sc, 12, engine="local")
    print(json.dumps([bits, alone]))
"""


@pytest.mark.parametrize(
    "settings",
    [
        # Every task that takes longer than most others is started again beside itself.
        {
            "speculation": True,
            "speculation__interval": "10ms",
            "speculation__multiplier": 1.01,
            "speculation__quantile": 0.1,
            "speculation__minTaskRuntime": "1ms",
        },
        {
            "dynamicAllocation__enabled": True,
            "dynamicAllocation__shuffleTracking__enabled": True,
            "dynamicAllocation__minExecutors": 1,
            "dynamicAllocation__maxExecutors": 2,
            "dynamicAllocation__executorIdleTimeout": "1s",
        },
    ],
    ids=["speculation", "dynamic allocation"],
)
def test_settings_change_no_bit(application, settings):
    bits, alone = application(SETTINGS.format(settings=settings))
    assert bits == alone
