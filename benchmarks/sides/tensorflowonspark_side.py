"""TensorFlowOnSpark: a TensorFlow cluster in the executors of a Spark cluster on this machine."""

import os
import sys

import protocol
import pyspark


def train(options, context):
    """The function that TensorFlowOnSpark runs in each worker, `TF_CONFIG` set."""
    import mirrored

    mirrored.train(options)


def main():
    """Measures and answers."""
    from tensorflowonspark import TFCluster

    options = protocol.options_of(__doc__)
    os.environ["PYSPARK_PYTHON"] = sys.executable
    # One task in each executor, which TensorFlowOnSpark needs.
    conf = pyspark.SparkConf().set("spark.ui.enabled", "false")
    context = pyspark.SparkContext(
        f"local-cluster[{options.workers},1,2048]", "TensorFlowOnSpark", conf=conf
    )
    cluster = TFCluster.run(
        context,
        train,
        options,
        num_executors=options.workers,
        num_ps=0,
        tensorboard=False,
        input_mode=TFCluster.InputMode.TENSORFLOW,
        # Without it the workers never meet and train models of their own.
        master_node="chief",
    )
    cluster.shutdown(timeout=3600)
    protocol.answer_of_workers(options)


if __name__ == "__main__":
    main()
