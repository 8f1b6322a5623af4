"""tfspark with one engine: ranks of one thread in an embedded Spark."""

import keras
import numpy as np
import protocol
import pyspark
import tensorflow as tf
import tensorflow_steps

from tfspark import MaxIteration, TFDataset, TFOptimizer, TrainSummary, init_nncontext

PHASES = ("data", "gradient", "update", "exchange")
# A block is a round, and a round of a long training is no shorter than this: what a round costs at
# its start and its end has to weigh here what it weighs there.
ROUND_S = 16.0


def train(engine):
    """Measures and answers."""
    options = protocol.options_of(__doc__)
    init_nncontext("comparison", master=f"local[{options.workers}]")
    model, optimizer, _ = tensorflow_steps.make(tf, keras, options)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    features, labels = protocol.cut_batches(protocol.workload_of(options), options.batch)
    features = [feature.reshape(-1, *feature.shape[2:]) for feature in features]
    rows = (tensorflow_steps.inputs_of(features), labels.reshape(-1))
    dataset = TFDataset.from_ndarrays(rows, batch_size=options.batch)
    training = TFOptimizer.from_keras(model, dataset, engine=engine, progress=False)
    summary = TrainSummary(options.scratch, engine)
    training.set_train_summary(summary)

    def run(steps):
        training.optimize(MaxIteration(training.step + steps))
        # Rows per second of each step is written as the round's rows over its seconds; the way
        # home of the weights, once in a training, is left out.
        throughput = summary.read_scalar("Throughput")
        return float(np.sum(options.batch / throughput[-steps:, 1]))

    def phases(steps):
        shares = {
            phase: float(np.mean(summary.read_scalar(f"Phase/{phase}")[-steps:, 1]))
            for phase in PHASES
        }
        return {"phase_seconds": shares}

    def fill(options, run, agree):
        tried = protocol.steps_of_a_block(options, run, agree)
        run(tried)
        step_s = sum(phases(tried)["phase_seconds"].values())
        count = max(2, round(max(ROUND_S, options.seconds) / step_s))
        # The JVM compiles what stages run through often, long after the first of them.
        run(count)
        return count

    measured = protocol.measure(options, run, watch=phases, fill=fill)
    sent = 2 * (options.workers - 1) / options.workers * 4 * trainable(model)
    protocol.answer(
        measured,
        "one copy",
        {
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "pyspark": pyspark.__version__,
        },
        bytes_per_rank_and_step=sent,
    )


def trainable(model):
    """Elements that are trained, which travel once as gradients and once as weights."""
    return sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
