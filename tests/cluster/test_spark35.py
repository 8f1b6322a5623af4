"""Spark 3.5, the oldest supported version, in a folder of its own: `make spark35`."""

from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.spark35]

ROOT = Path(__file__).parent.parent.parent
SPARK35 = ROOT / ".venv-spark35"

SOURCE = """
    import json
    import keras
    import numpy as np
    import pyspark
    from pyspark.sql import SparkSession
    from spark_app import *

    with application("local[2]") as sc:
        engines = ("shuffle", "gang", "local")
        bits = [train(sc, 6, name="dense", engine=engine) for engine in engines]
        spark = SparkSession.builder.getOrCreate()
        frame = spark.createDataFrame([([float(i), 1.0], i % 3) for i in range(20)], ["x", "y"])
        data = TFDataset.from_dataframe(frame, "x", "y", batch_size=4)
        model = keras.Sequential([keras.layers.Dense(3)])
        training = TFOptimizer.from_keras(
            model, data, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            optimizer="adam", engine="shuffle", progress=False,
        )
        training.optimize(MaxIteration(5))
        finite = all(np.isfinite(w).all() for w in model.get_weights())
        training.close()

        from tfspark import KerasModel, register_model_udf
        expected = model.predict(np.array([[float(i), 1.0] for i in range(20)]), verbose=0)
        model.compile("adam", "mse")
        predicted = KerasModel(model).predict(frame, feature_cols="x").collect()
        close = bool(np.allclose([row.prediction for row in predicted], expected, atol=1e-5))
        a, b = keras.Input([2], name="a"), keras.Input([], name="b")
        dense = keras.layers.Dense
        two = keras.Model([a, b], [dense(1, name="c")(a), dense(2, name="d")(a)])
        function = register_model_udf(spark, "two", two)
        frame.createOrReplaceTempView("rows")
        row = spark.sql("SELECT two(x, y) AS z FROM rows").first()
        kinds = [type(row.z.c).__name__, len(row.z.d)]

        import tempfile
        from pathlib import Path
        from pyspark.ml import Pipeline, PipelineModel
        from tfspark import NNClassifier, NNImageReader
        stage = NNClassifier(
            keras.Sequential([keras.Input([2]), dense(3, "softmax")]), featuresCol="x", labelCol="y"
        ).setMaxEpoch(2)
        fitted = Pipeline(stages=[stage]).fit(frame)
        folder = tempfile.mkdtemp()
        fitted.write().overwrite().save(folder + "/stages")
        loaded = PipelineModel.load(folder + "/stages")
        scored = [
            [row.probability.toArray().tolist() for row in each.transform(frame).collect()]
            for each in (fitted, loaded)
        ]
        pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
        import tensorflow as tf
        Path(folder, "image.png").write_bytes(tf.io.encode_png(pixels).numpy())
        image = NNImageReader.readImages(folder + "/image.png").first().image
        read = bytes(image.data) == pixels[:, :, ::-1].tobytes()
    print(json.dumps(dict(
        version=pyspark.__version__, bits=bits, finite=finite, close=close, kinds=kinds,
        scored=scored, read=read,
    )))
"""


@pytest.fixture(scope="module")
def result(application):
    if not (SPARK35 / ".ready").exists():
        pytest.skip("Spark 3.5 is not installed; `make spark35` does it (300 MB)")
    return application(SOURCE, path=[SPARK35], SPARK_HOME=None)


def test_it_is_spark_35(result):
    assert result["version"].startswith("3.5.")


def test_engines_give_the_same_bits(result):
    assert len(result["bits"]) == 3
    assert len(set(result["bits"])) == 1


def test_a_dataframe_trains(result):
    assert result["finite"]


def test_a_dataframe_is_predicted_through_pandas(result):
    assert result["close"]
    assert result["kinds"] == ["float", 2]


def test_stages_of_spark_ml_are_saved_and_loaded(result):
    fitted, loaded = result["scored"]
    assert len(fitted) == 20
    assert loaded == fitted
    assert result["read"]
