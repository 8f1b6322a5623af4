"""spark-tensorflow-distributor: a MultiWorkerMirroredStrategy in a barrier stage."""

import os
import sys

import protocol
import pyspark.sql
from spark_tensorflow_distributor import MirroredStrategyRunner


def train(options):
    """The function that each task runs, `TF_CONFIG` set."""
    import mirrored

    mirrored.train(options)


def main():
    """Measures and answers."""
    options = protocol.options_of(__doc__)
    os.environ["PYSPARK_PYTHON"] = sys.executable
    builder = pyspark.sql.SparkSession.builder.master(f"local[{options.workers}]")
    builder.config("spark.ui.enabled", "false").getOrCreate()
    runner = MirroredStrategyRunner(
        num_slots=options.workers, use_gpu=False, use_custom_strategy=True
    )
    runner.run(train, options=options)
    protocol.answer_of_workers(options)


if __name__ == "__main__":
    main()
