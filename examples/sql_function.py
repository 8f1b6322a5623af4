"""A digit classifier, trained on a DataFrame and then used as a function of Spark SQL.

python examples/sql_function.py --epochs 20
"""

import argparse

import keras
from digits import load_digits_28x28
from pyspark.sql import SparkSession

from tfspark import Adam, KerasModel, init_nncontext, register_model_udf


def classifier():
    """A small convolutional network; its input may be a flat array of 784 pixels."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input([28, 28, 1], name="image"),
            layers.Conv2D(16, 3, strides=2, activation="relu"),
            layers.Conv2D(32, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(10, name="logits"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(Adam(2e-3), loss, metrics=["accuracy"])
    return model


def digits_frame(spark, images, labels):
    """A DataFrame of images, as nested arrays, and their labels."""
    rows = [(image.tolist(), int(label)) for image, label in zip(images, labels, strict=True)]
    return spark.createDataFrame(rows, "image array<array<array<float>>>, label int").cache()


def main():
    """Trains, then has SQL count what the model recognises."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()

    spark = SparkSession(init_nncontext("digits in SQL"))
    train, test = (digits_frame(spark, *part) for part in load_digits_28x28())

    model = classifier()
    KerasModel(model).fit(
        train,
        feature_cols="image",
        label_cols="label",
        batch_size=64,
        epochs=options.epochs,
        validation_data=test,
        verbose=2,
    )

    register_model_udf(spark, "classify", model)
    test.createOrReplaceTempView("digits")
    spark.sql("""
        WITH seen AS (SELECT label, classify(image) AS logits FROM digits),
             read AS (
                 SELECT label, array_position(logits, array_max(logits)) - 1 AS digit FROM seen
             )
        SELECT label, count(*) AS rows, round(avg(int(digit = label)), 3) AS recognised
        FROM read GROUP BY label ORDER BY label
    """).show()
    spark.stop()


if __name__ == "__main__":
    main()
