"""Images as DataFrames, against Spark's own reader, and in models, against TensorFlow."""

from pathlib import Path

import keras
import numpy as np
import pytest
import sklearn.datasets
import tensorflow as tf
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from tfspark.errors import DataError, InvalidInputError
from tfspark.nnframes import NNClassifier, NNFeaturizer, NNImageReader, NNModel

PHOTOS = Path(sklearn.datasets.__file__).parent / "images"  # china.jpg and flower.jpg, 427 x 640
FIELDS = ["origin", "height", "width", "nChannels", "mode", "data"]


@pytest.fixture(scope="module")
def spark(sc):
    return SparkSession(sc)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Crops of a photo, of several sizes and kinds, in two folders."""
    path = tmp_path_factory.mktemp("images")
    photo = tf.io.decode_jpeg((PHOTOS / "china.jpg").read_bytes())
    kinds = {
        "a/colour.png": photo[:40, :50],
        "a/grey.png": tf.image.rgb_to_grayscale(photo[:30, :20]),
        "b/alpha.png": tf.concat([photo[:10, :12], photo[:10, :12, :1]], axis=-1),
    }
    for name, pixels in kinds.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(tf.io.encode_png(pixels).numpy())
    return path


def pixels_of(row):
    """RGB, as a test thinks of an image struct."""
    image = np.frombuffer(row.data, np.uint8).reshape(row.height, row.width, row.nChannels)
    return image[:, :, [2, 1, 0]] if row.nChannels >= 3 else image[:, :, [0, 0, 0]]


class TestReading:
    def test_is_what_sparks_own_reader_makes_of_a_png(self, spark, folder):
        ours = NNImageReader.readImages(str(folder))
        theirs = spark.read.format("image").option("recursiveFileLookup", "true").load(str(folder))
        assert ours.schema == theirs.schema

        def found(frame):
            rows = frame.select("image.*").orderBy("origin").collect()
            return {Path(row.origin).name: [row[field] for field in FIELDS[1:]] for row in rows}

        assert found(ours) == found(theirs)

    def test_of_real_photos(self, spark):
        rows = NNImageReader.readImages(str(PHOTOS / "*.jpg")).select("image.*").collect()
        assert sorted(Path(row.origin).name for row in rows) == ["china.jpg", "flower.jpg"]
        china = next(row for row in rows if row.origin.endswith("china.jpg"))
        expected = tf.io.decode_jpeg((PHOTOS / "china.jpg").read_bytes()).numpy()
        np.testing.assert_array_equal(pixels_of(china), expected)

    def test_resizes_and_converts(self, folder):
        frame = NNImageReader.readImages(
            f"{folder}/a,{folder}/b", minPartitions=5, resizeH=8, resizeW=6, image_codec=0
        )
        assert frame.rdd.getNumPartitions() == 5
        rows = frame.select("image.*").collect()
        assert {(r.height, r.width, r.nChannels, r.mode) for r in rows} == {(8, 6, 1, 0)}
        assert len(rows) == 3

    def test_a_file_that_is_no_image_is_named(self, folder, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
        (tmp_path / "good.png").write_bytes((folder / "a/colour.png").read_bytes())
        assert NNImageReader.readImages(str(tmp_path), dropInvalid=True).count() == 1
        with pytest.raises(Exception, match=r"Received: 'file:.*broken\.png'") as caught:
            NNImageReader.readImages(str(tmp_path)).collect()
        assert "dropInvalid=True" in str(caught.value)

    def test_wrong_arguments(self):
        with pytest.raises(InvalidInputError, match="both directions"):
            NNImageReader.readImages("x", resizeH=8)
        with pytest.raises(InvalidInputError, match="image_codec"):
            NNImageReader.readImages("x", image_codec=7)


class TestInModels:
    def test_an_image_is_resized_to_the_input(self, folder):
        model = keras.Sequential([keras.Input([8, 8, 3]), keras.layers.Flatten()])
        frame = NNImageReader.readImages(str(folder))
        scored = NNModel(model, featuresCol="image").transform(frame).collect()
        for row in scored:
            expected = tf.image.resize(pixels_of(row.image), [8, 8]).numpy().reshape(-1)
            np.testing.assert_allclose(row.prediction, expected, atol=1e-3)
        assert len(scored) == 3

    def test_preprocessing_gets_rgb_of_any_size(self, folder):
        def red(image):
            return tf.reduce_mean(tf.cast(image, tf.float32), axis=[0, 1])[:1]

        model = keras.Sequential([keras.Input([1]), keras.layers.Rescaling(2.0)])
        frame = NNImageReader.readImages(str(folder))
        for row in NNModel(model, red, featuresCol="image").transform(frame).collect():
            assert row.prediction == pytest.approx(
                2 * pixels_of(row.image)[:, :, 0].mean(), rel=1e-4
            )

    def test_preprocessing_by_layers_and_functions_of_keras(self, folder):
        model = keras.Sequential([keras.Input([8, 8, 3]), keras.layers.Flatten()])
        chain = [keras.layers.Resizing(8, 8), keras.applications.mobilenet_v2.preprocess_input]
        frame = NNImageReader.readImages(str(folder))
        for row in NNModel(model, chain, featuresCol="image").transform(frame).collect():
            resized = tf.image.resize(pixels_of(row.image), [8, 8]).numpy().reshape(-1)
            np.testing.assert_allclose(row.prediction, resized / 127.5 - 1, atol=1e-4)

    def test_a_classifier_of_crops(self, spark, tmp_path):
        """Crops of two photos, told apart by a small convolutional net."""
        for name in ("china", "flower"):
            photo = tf.io.decode_jpeg((PHOTOS / f"{name}.jpg").read_bytes())
            (tmp_path / name).mkdir()
            for index in range(12):
                top, left = 30 * index, 40 * index
                crop = photo[top : top + 64, left : left + 64]
                (tmp_path / name / f"{index}.png").write_bytes(tf.io.encode_png(crop).numpy())
        frame = NNImageReader.readImages(str(tmp_path)).withColumn(
            "label", F.col("image.origin").contains("flower").cast("int")
        )
        keras.utils.set_random_seed(0)
        layers = keras.layers
        model = keras.Sequential(
            [
                keras.Input([16, 16, 3]),
                layers.Rescaling(1 / 255),
                layers.Conv2D(8, 3, activation="relu"),
                layers.GlobalAveragePooling2D(),
                layers.Dense(2, "softmax", name="top"),
            ]
        )
        stage = NNClassifier(model, featuresCol="image", batchSize=8, maxEpoch=40)
        fitted = stage.setLearningRate(0.03).setSettings(engine="local", num_ranks=1).fit(frame)
        fitted.save(str(tmp_path / "model"))
        loaded = type(fitted).load(str(tmp_path / "model"))
        assert loaded.transform(frame).filter("label = prediction").count() >= 20
        embedded = NNFeaturizer(fitted.getModel(), featuresCol="image").transform(frame).first()
        assert embedded.embedding.size == 8

    def test_other_structs_are_refused(self, spark):
        frame = spark.range(3).select(F.struct("id", F.lit(1).alias("one")).alias("pair"))
        with pytest.raises(DataError, match=r"Name its fields: pair\.id, pair\.one"):
            model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
            NNModel(model, featuresCol="pair").transform(frame)

    def test_a_model_of_images_is_not_used_on_numbers(self, spark, folder):
        scorer = NNModel(keras.Sequential([keras.Input([8, 8, 3]), keras.layers.Flatten()]))
        scorer.setFeaturesCol("image").transform(NNImageReader.readImages(str(folder)))
        with pytest.raises(DataError, match=r"trained on: image\. Received: no image in id"):
            scorer.setFeaturesCol("id").transform(spark.range(3))
