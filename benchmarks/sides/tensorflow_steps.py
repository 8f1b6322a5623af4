"""Training steps written out in TensorFlow, for plain TensorFlow and for peers that wrap it."""

import protocol
from workloads import CLASSES, LEARNING_RATE


def limit_threads(tf, threads):
    """Of this process, before its first operation."""
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


def make(tf, keras, options):
    """The model, its optimizer and its loss per row, `[rows]`."""
    assert CLASSES > 1
    keras.utils.set_random_seed(0)
    model = protocol.workload_of(options).model(keras)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    return model, keras.optimizers.Adam(LEARNING_RATE), loss


def batches(tf, options, batch, seed=0):
    """A dataset of `(features, labels)` without end; features is a tuple."""
    features, labels = protocol.cut_batches(protocol.workload_of(options), batch, seed)
    data = tf.data.Dataset.from_tensor_slices((tuple(features), labels))
    return data.repeat().prefetch(2)


def inputs_of(features):
    """What a model of these features is called with."""
    return features[0] if len(features) == 1 else list(features)


def gradient_step(tf, options, model, optimizer, loss):
    """`step(features, labels)`, the function to trace; divides by the rows of the global batch."""

    def step(features, labels):
        with tf.GradientTape() as tape:
            logits = model(inputs_of(features), training=True)
            value = tf.reduce_sum(loss(labels, logits)) / options.batch
        variables = model.trainable_variables
        gradients = tape.gradient(value, variables)
        optimizer.apply_gradients(zip(gradients, variables))
        return value

    return step


def runner(step, data, value_of):
    """`run(steps)` for `protocol.measure`, from a step and an endless iterator of batches.

    Args:
        step: called with a batch.
        data: the iterator.
        value_of: turns the last result into a number, which waits for all steps.
    """

    def take(steps):
        result = None
        for _ in range(steps):
            result = step(*next(data))
        value_of(result)

    return lambda steps: protocol.timed(lambda: take(steps))
