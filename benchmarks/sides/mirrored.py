"""Trains in one worker of a MultiWorkerMirroredStrategy, whoever has set `TF_CONFIG`."""

import protocol
import tensorflow as tf
import tensorflow_steps
import tf_keras


def cluster_of(resolver):
    """The jobs of the cluster."""
    return resolver.cluster_spec().jobs


def train(options, strategy=None):
    """Measures together with the other workers, and leaves this worker's part of the answer.

    Args:
        options: see `protocol.options_of`.
        strategy: default: a new one from `TF_CONFIG`.
    """
    if strategy is None:
        tensorflow_steps.limit_threads(tf, 1)
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    resolver = strategy.cluster_resolver
    # A chief comes before the workers.
    rank = resolver.task_id + (resolver.task_type == "worker" and "chief" in cluster_of(resolver))
    with strategy.scope():
        model, optimizer, loss = tensorflow_steps.make(tf, tf_keras, options)
    one = tensorflow_steps.gradient_step(tf, options, model, optimizer, loss)

    @tf.function
    def step(features, labels):
        value = strategy.run(one, (features, labels))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, value, axis=None)

    @tf.function
    def mean(value):
        found = strategy.run(lambda: value)
        return strategy.reduce(tf.distribute.ReduceOp.MEAN, found, axis=None)

    # Rows of each worker are its own: equal weights then show that gradients were exchanged.
    data = strategy.distribute_datasets_from_function(
        lambda context: tensorflow_steps.batches(
            tf, options, options.batch // options.workers, seed=rank
        )
    )
    measured = protocol.measure(
        options,
        tensorflow_steps.runner(step, iter(data), float),
        agree=lambda seconds: float(mean(tf.constant(seconds, tf.float32))),
    )
    versions = {"tensorflow": tf.__version__, "keras": tf_keras.__version__}
    protocol.leave(options, rank, measured, model.get_weights(), versions)
