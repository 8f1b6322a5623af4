"""Keras `fit` in one process with all threads."""

import keras
import protocol
import tensorflow as tf
import tensorflow_steps

options = protocol.options_of(__doc__)
tensorflow_steps.limit_threads(tf, options.workers)
model, optimizer, _ = tensorflow_steps.make(tf, keras, options)
model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
data = tensorflow_steps.batches(tf, options, options.batch)
# As a tuple: of a list tf.data makes one tensor.
data = data.map(lambda features, labels: (features[0] if len(features) == 1 else features, labels))


def fit(steps):
    """Seconds of one call."""
    return protocol.timed(lambda: model.fit(data, steps_per_epoch=steps, verbose=0))


measured = protocol.measure(options, fit)
versions = {"tensorflow": tf.__version__, "keras": keras.__version__}
protocol.answer(measured, "one process", versions)
