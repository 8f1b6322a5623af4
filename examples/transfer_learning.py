"""An animal or a vehicle? Twenty photos are enough to learn it on top of a pretrained network.

A featurizer turns photos into embeddings, a small network learns from these, and both together are
one pipeline. Photos: those of CIFAR-10 that the package foolbox carries, 32×32 pixels each.

python examples/transfer_learning.py
"""

import argparse

import keras
from efficientnet_lite import efficientnet_lite0
from packaged import packaged_files
from pyspark.ml import PipelineModel
from pyspark.ml.evaluation import MulticlassClassificationEvaluator
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from tfspark import NNClassifier, NNFeaturizer, NNImageReader, init_nncontext


def main():
    """Embeds photos once, cross-validates a classifier of the embeddings, uses both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--save", default="animals_model")
    options = parser.parse_args()

    spark = SparkSession(init_nncontext("transfer learning"))
    files = packaged_files("foolbox==3.3.4", "foolbox/data/cifar10_*.png")
    photos = NNImageReader.readImages([str(path) for path in files], minPartitions=2)
    # Names end in the class; from 2 (bird) to 7 (horse) these are animals.
    number = F.regexp_extract("image.origin", r"_(\d+)\.png$", 1).cast("int")
    photos = photos.withColumn("label", number.between(2, 7).cast("int"))

    embed = NNFeaturizer(efficientnet_lite0(), featuresCol="image", batchSize=8)
    embedded = embed.transform(photos).select("image.origin", "embedding", "label").cache()
    print(f"{embedded.count()} photos, {embedded.filter('label = 1').count()} with an animal")

    keras.utils.set_random_seed(1)
    top = keras.Sequential(
        [keras.Input([1280]), keras.layers.Dropout(0.5), keras.layers.Dense(1, "sigmoid")]
    )
    classifier = NNClassifier(top, featuresCol="embedding", batchSize=8, maxEpoch=options.epochs)
    grid = ParamGridBuilder().addGrid(classifier.learningRate, [3e-3]).build()
    chosen = CrossValidator(
        estimator=classifier,
        estimatorParamMaps=grid,
        evaluator=MulticlassClassificationEvaluator(metricName="accuracy"),
        numFolds=5,
        seed=1,
    ).fit(embedded)
    print(f"accuracy on photos it has not learnt from: {chosen.avgMetrics[0]:.2f}")

    animals = PipelineModel([embed, chosen.bestModel])
    animals.write().overwrite().save(options.save)
    again = PipelineModel.load(options.save).transform(photos)
    again.select(
        F.element_at(F.split("image.origin", "/"), -1).alias("photo"), "label", "prediction"
    ).orderBy(F.rand(seed=2)).show(8, truncate=False)
    spark.stop()


if __name__ == "__main__":
    main()
