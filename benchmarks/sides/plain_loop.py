"""The limit: a plain `tf.function` loop in one process with all threads."""

import keras
import protocol
import tensorflow as tf
import tensorflow_steps

options = protocol.options_of(__doc__)
tensorflow_steps.limit_threads(tf, options.workers)
model, optimizer, loss = tensorflow_steps.make(tf, keras, options)
step = tf.function(tensorflow_steps.gradient_step(tf, options, model, optimizer, loss))
data = iter(tensorflow_steps.batches(tf, options, options.batch))
measured = protocol.measure(options, tensorflow_steps.runner(step, data, float))
versions = {"tensorflow": tf.__version__, "keras": keras.__version__}
protocol.answer(measured, "one process", versions)
