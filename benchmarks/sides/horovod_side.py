"""Horovod: its gradient tape in Spark tasks, over gloo."""

import os
import sys

import protocol
import pyspark


def train(options):
    """Measures in one worker, and leaves its part of the answer."""
    import horovod.tensorflow as hvd
    import tensorflow as tf
    import tensorflow_steps

    tensorflow_steps.limit_threads(tf, 1)
    hvd.init()
    model, optimizer, loss = tensorflow_steps.make(tf, tf.keras, options)
    rank, share = hvd.rank(), options.batch // options.workers
    data = iter(tensorflow_steps.batches(tf, options, share, seed=rank))

    @tf.function
    def step(features, labels):
        with tf.GradientTape() as tape:
            logits = model(tensorflow_steps.inputs_of(features), training=True)
            value = tf.reduce_mean(loss(labels, logits))
        variables = model.trainable_variables
        gradients = hvd.DistributedGradientTape(tape).gradient(value, variables)
        optimizer.apply_gradients(zip(gradients, variables))
        return value

    hvd.broadcast_variables(model.variables, root_rank=0)
    measured = protocol.measure(
        options,
        tensorflow_steps.runner(step, data, float),
        agree=lambda seconds: float(hvd.allreduce(tf.constant(seconds, tf.float32))),
    )
    # Statistics of BatchNorm are each worker's own in Horovod.
    weights = [weight.numpy() for weight in model.trainable_variables]
    versions = {"horovod": "0.28.1", "tensorflow": tf.__version__}
    protocol.leave(options, rank, measured, weights, versions)


def main():
    """Measures and answers."""
    import horovod.spark

    options = protocol.options_of(__doc__)
    os.environ["PYSPARK_PYTHON"] = sys.executable
    conf = pyspark.SparkConf().set("spark.ui.enabled", "false")
    pyspark.SparkContext(f"local[{options.workers}]", "Horovod", conf=conf)
    horovod.spark.run(
        train,
        args=(options,),
        num_proc=options.workers,
        use_gloo=True,
        env=dict(os.environ),
        nics=["lo"],
        verbose=1,
    )
    protocol.answer_of_workers(options)


if __name__ == "__main__":
    main()
