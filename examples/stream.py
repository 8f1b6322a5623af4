"""A stream of files, scored by a model as they come; a stopped query goes on where it was.

Digits arrive as JSON files in one folder, predictions leave as JSON files in another one. The query
is started twice: the second one finds in its checkpoint what the first one has done.

    python examples/stream.py --out out/stream
"""

import argparse
import json
from pathlib import Path

import keras
from digits import load_digits_28x28
from pyspark.sql import SparkSession

from tfspark import Adam, init_nncontext, register_model_udf

SCHEMA = "id int, pixels array<float>"


def write_files(folder, images, first, number):
    """One file of digits, as a sensor or a service would leave it."""
    rows = [
        json.dumps({"id": i, "pixels": images[i].ravel().tolist()})
        for i in range(first, first + number)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{first}.json").write_text("\n".join(rows))


def run_until_idle(spark, folder):
    """Predicts whatever has arrived since the last time."""
    stream = spark.readStream.schema(SCHEMA).option("mode", "FAILFAST").json(str(folder / "in"))
    query = (
        stream.selectExpr("id", "classify(pixels) AS logits")
        .selectExpr("id", "array_position(logits, array_max(logits)) - 1 AS digit")
        .writeStream.format("json")
        .option("checkpointLocation", str(folder / "checkpoint"))
        .trigger(availableNow=True)
        .start(str(folder / "predictions"))
    )
    query.awaitTermination()


def main():
    """Trains, then scores two deliveries, each with a query of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("out/stream"))
    options = parser.parse_args()

    spark = SparkSession(init_nncontext("stream of digits"))
    (images, labels), (test_images, test_labels) = load_digits_28x28()
    model = keras.Sequential(
        [
            keras.Input([28, 28, 1]),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(Adam(2e-3), loss)
    model.fit(images, labels, epochs=options.epochs, verbose=0)
    register_model_udf(spark, "classify", model)

    for first, number in ((0, 100), (100, 60)):
        write_files(options.out / "in", test_images, first, number)
        run_until_idle(spark, options.out)
        found = spark.read.schema("id int, digit int").json(str(options.out / "predictions"))
        rows = found.collect()
        right = sum(row.digit == test_labels[row.id] for row in rows)
        print(f"{len(rows)} predictions, {len({row.id for row in rows})} digits, {right} right")
    spark.stop()


if __name__ == "__main__":
    main()
