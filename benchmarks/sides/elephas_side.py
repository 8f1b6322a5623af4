"""elephas, synchronous: Keras `fit` on each partition, weights averaged by the driver.

It averages once an epoch and starts its optimizers anew, so a block is one epoch.
"""

import os
import sys

import elephas.spark_model
import keras
import numpy as np
import protocol
import pyspark
import tensorflow as tf
import tensorflow_steps

# Of an epoch, however short its training is then: rows are Python objects in a list.
MOST_ROWS, MOST_BYTES = 100000, 2**29


def steps_of_an_epoch(options, run, agree):
    """As many as it takes for most of an epoch to be training.

    Each epoch begins with building the model and moving all weights; this doubles the epoch until
    one more doubling takes half as long again, and is as long as a block at least.
    """
    (row,), _ = protocol.workload_of(options).rows(1)
    most = min(MOST_ROWS, MOST_BYTES // row.nbytes)
    count, took = protocol.WARM_STEPS, run(protocol.WARM_STEPS)
    while 2 * count * options.batch <= most:
        count, former = 2 * count, took
        took = agree(run(count))
        if took >= max(options.seconds, 1.5 * former):
            break
    return count


def rows_of(options, steps):
    """So many steps' rows, for models with one input: elephas fails with more."""
    (features,), labels = protocol.workload_of(options).rows(steps * options.batch)
    return zip(features, labels)


def main():
    """Measures and answers."""
    options = protocol.options_of(__doc__)
    os.environ["PYSPARK_PYTHON"] = sys.executable
    conf = pyspark.SparkConf().set("spark.driver.memory", "4g").set("spark.ui.enabled", "false")
    context = pyspark.SparkContext(f"local[{options.workers}]", "elephas", conf=conf)
    model, optimizer, _ = tensorflow_steps.make(tf, keras, options)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    trained = elephas.spark_model.SparkModel(model)
    kept = {}

    def rdd(steps):
        if steps not in kept:
            for former in kept.values():
                former.unpersist()
            kept.clear()
            kept[steps] = context.parallelize(list(rows_of(options, steps)), options.workers)
            kept[steps].cache().count()
        return kept[steps]

    def run(steps):
        # A worker with no more rows than one batch would not train at all.
        taken = max(2, steps)
        rows, batch = rdd(taken), options.batch // options.workers
        before = model.get_weights()
        seconds = protocol.timed(lambda: trained.fit(rows, epochs=1, batch_size=batch, verbose=0))
        after = trained.master_network.get_weights()
        if all(np.array_equal(old, new) for old, new in zip(before, after)):
            raise SystemExit("elephas has trained nothing.")
        return seconds * steps / taken

    measured = protocol.measure(options, run, fill=steps_of_an_epoch)
    versions = {
        "elephas": "7.3.0",
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "pyspark": pyspark.__version__,
    }
    protocol.answer(measured, "one copy", versions)


if __name__ == "__main__":
    main()
