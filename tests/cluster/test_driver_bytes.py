"""No weight and no gradient passes the driver while training runs."""

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SOURCE = """
    import json
    import keras
    import numpy as np
    from spark_app import *
    from tfspark import SeveralIteration
    from tfspark.sync.control import Lines

    STEPS = 3
    # With NIO the JVM reads its sockets by read(2), which the kernel counts per process: task
    # results, accumulators, blocks and messages, whatever executors send.
    NIO = dict(rpc__io__mode="NIO", shuffle__io__mode="NIO")

    def received():
        with open(f"/proc/{driver_jvm()}/io") as counters:
            return int(counters.readline().removeprefix("rchar:")) + sum(control)

    # What ranks of a gang send to the driver's Python process.
    control, feed = [], Lines.feed

    def counted(self, data):
        control.append(len(data))
        return feed(self, data)

    Lines.feed = counted

    with application("local-cluster[2,1,1024]", **NIO) as sc:
        model = keras.Sequential(
            [keras.Input((4000,)), keras.layers.Dense(5000, use_bias=False)]
        )
        rdd = sc.parallelize(range(8), 2).map(lambda i: (np.full(4000, i, np.float32), i))
        data = TFDataset.from_rdd(
            rdd, features=("float32", [4000]), labels=("int32", []), batch_size=8
        )
        training = TFOptimizer.from_keras(
            model, data, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            optimizer=keras.optimizers.SGD(0.1), engine=ENGINE, num_ranks=2, progress=False,
        )
        training.optimize(MaxIteration(1))
        loop, never = training._training.loop, SeveralIteration(10**6)
        before = received()
        loop.train(MaxIteration(1 + STEPS), never, never)
        trained = received()
        training.optimize(MaxIteration(1 + STEPS))  # takes no step, brings the weights home
        home = received()
        training.close()
    print(json.dumps(dict(
        step=loop.progress.step, weights=4 * model.count_params(),
        a_step=(trained - before) / STEPS, home=home - trained, control=sum(control),
    )))
"""


@pytest.mark.parametrize("engine", ["shuffle", "gang"])
def test_the_driver_receives_less_than_a_megabyte_a_step(application, engine):
    result = application(SOURCE.replace("ENGINE", repr(engine)))
    assert bool(result["control"]) == (engine == "gang")
    assert result["step"] == 4 and result["weights"] == 80_000_000
    assert result["a_step"] < 1_000_000, result
    # The same measure sees the weights when they do come.
    assert result["home"] > result["weights"], result
