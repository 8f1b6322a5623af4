"""Models on DataFrames, RDDs, data sets and in SQL, against Keras on the same rows."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from pyspark.errors import PythonException, StreamingQueryException
from pyspark.ml.linalg import Vectors, VectorUDT
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, DoubleType, FloatType, IntegerType, StructType

from tfspark import TFDataset
from tfspark.errors import DataError, InvalidInputError, ProgramError
from tfspark.graph.prediction import prediction_from_keras
from tfspark.inference.dataframe import ModelUdf, predict_columns
from tfspark.inference.models import prediction_of, register_model_udf
from tfspark.inference.predictor import TFNet, TFPredictor, predict

ROWS = 300
DENSE = keras.layers.Dense


@pytest.fixture(scope="module")
def spark(sc):
    return SparkSession(sc)


def features(rows=ROWS):
    return np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32)


def classifier():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [keras.Input([4]), DENSE(8, "relu"), keras.layers.Dropout(0.5), DENSE(3, "softmax")]
    )


def two_in_two_out():
    keras.utils.set_random_seed(4)
    left, right = keras.Input([4], name="left"), keras.Input([], name="right")
    joined = keras.layers.Concatenate()([left, keras.layers.Reshape([1])(right)])
    return keras.Model(
        [left, right], [DENSE(1, name="value")(joined), DENSE(2, name="pair")(joined)]
    )


@pytest.fixture(scope="module")
def frame(spark):
    rows = [
        (
            i,
            x.tolist(),
            Vectors.dense(x) if i % 2 else Vectors.sparse(4, range(4), x),
            float(x.sum()),
        )
        for i, x in enumerate(features())
    ]
    schema = (
        StructType()
        .add("id", IntegerType())
        .add("x", ArrayType(FloatType()))
        .add("v", VectorUDT())
        .add("total", DoubleType())
    )
    return spark.createDataFrame(rows, schema).repartition(3).sortWithinPartitions("id")


def in_order(frame, column="prediction"):
    rows = sorted(frame.select("id", column).collect())
    assert [row[0] for row in rows] == list(range(ROWS))
    return np.array([row[1] for row in rows])


@pytest.mark.parametrize("column", ["x", "v"])
@pytest.mark.parametrize("batch_size", [7, 1000])
def test_a_column_of_predictions_is_what_keras_predicts(frame, column, batch_size):
    model = classifier()
    predicted = predict(
        prediction_from_keras(model), frame, feature_cols=column, batch_size=batch_size
    )
    assert predicted.columns == [*frame.columns, "prediction"]
    expected = model.predict(features(), verbose=0)
    np.testing.assert_allclose(in_order(predicted), expected, rtol=1e-5)


def test_rows_keep_their_order_and_their_other_columns(frame):
    predicted = predict(prediction_from_keras(classifier()), frame, feature_cols="x")
    assert predicted.drop("prediction").collect() == frame.collect()


def test_several_inputs_and_outputs(frame):
    model = two_in_two_out()
    prediction = prediction_from_keras(model)
    predicted = predict(
        prediction, frame, feature_cols=["x", "total"], output_cols=["value", "pair"]
    )
    assert dict(predicted.dtypes)["value"] == "float"
    assert dict(predicted.dtypes)["pair"] == "array<float>"
    x = features()
    value, pair = model.predict([x, x.sum(axis=1)], verbose=0)
    np.testing.assert_allclose(in_order(predicted, "value"), value[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(in_order(predicted, "pair"), pair, rtol=1e-4, atol=1e-5)


def test_a_model_is_a_function_of_sql(spark, frame):
    model = classifier()
    register_model_udf(spark, "classify", model)
    frame.createOrReplaceTempView("flowers")
    found = spark.sql("SELECT id, classify(v) AS prediction FROM flowers WHERE id >= 0")
    np.testing.assert_allclose(in_order(found), model.predict(features(), verbose=0), rtol=1e-5)
    both = register_model_udf(spark, "both", two_in_two_out())
    assert both.returnType.simpleString() == "struct<value:float,pair:array<float>>"
    (first,) = spark.sql("SELECT both(x, total).pair FROM flowers WHERE id = 0").collect()
    assert len(first[0]) == 2


def test_a_row_is_predicted_once(spark, frame):
    counted = spark.sparkContext.accumulator(0)
    count = F.udf(lambda x: (counted.add(1), x)[1], "array<float>").asNondeterministic()
    prediction = prediction_from_keras(two_in_two_out())
    udf = ModelUdf(prediction, spark.sparkContext, 64)
    calls = frame.select("id", "total", count("x").alias("x"))
    predicted = predict_columns(calls, udf, ["x", "total"], ["value", "pair"])
    assert len(predicted.where("pair[0] > -1e9 AND value > -1e9").collect()) == ROWS
    assert counted.value == ROWS
    assert str(predicted._jdf.queryExecution().executedPlan()).count("model(") == 1


def test_text_and_lists_of_any_length(spark):
    lookup = keras.layers.StringLookup(vocabulary=["a", "b", "c"])

    @tf.function
    def lengths(batch):
        words = batch
        return {
            "known": tf.reduce_sum(tf.cast(lookup(words) > 0, tf.int64), axis=1),
            "joined": tf.strings.reduce_join(words, axis=1, separator="-"),
        }

    prediction = prediction_of(lengths, inputs=("string", [None]))
    rows = [(0, ["a", "b"]), (1, ["é"]), (2, []), (3, ["c", "c", "c"])]
    frame = spark.createDataFrame(rows, "id int, words array<string>").coalesce(1)
    predicted = predict(
        prediction, frame, feature_cols="words", output_cols=["joined", "known"]
    ).collect()
    assert [row.known for row in predicted] == [2, 0, 0, 3]
    # A batch is padded to its longest row.
    assert [row.joined for row in predicted] == ["a-b-", "é--", "--", "c-c-c"]


def test_preprocessing_runs_with_the_model(spark):
    from sklearn.datasets import load_sample_images

    image = load_sample_images().images[0][:32, :48]
    encoded = [tf.io.encode_png(image[i : i + 16]).numpy() for i in range(3)]
    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input([8, 8, 3]), keras.layers.Flatten(), DENSE(2)])

    def decoded(data):
        return tf.image.resize(tf.io.decode_png(data, channels=3), [8, 8]) / 255.0

    function = register_model_udf(spark, "look", model, inputs=("string", []), preprocess=decoded)
    frame = spark.createDataFrame(
        [(i, data) for i, data in enumerate(encoded)], "id int, png binary"
    )
    rows = frame.select("id", function("png").alias("p")).collect()
    expected = model.predict(np.stack([decoded(data) for data in encoded]), verbose=0)
    np.testing.assert_allclose([row.p for row in sorted(rows)], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidInputError, match="inputs="):
        prediction_of(model, preprocess=decoded)
    with pytest.raises(ProgramError, match=r"float32 \[8, 8, 3\].*float32 \[4, 4, 3\]"):
        prediction_of(
            prediction_from_keras(model),
            inputs=("string", []),
            preprocess=lambda data: tf.image.resize(tf.io.decode_png(data, channels=3), [4, 4]),
        )


@pytest.mark.parametrize("labelled", [False, True])
def test_a_data_set_in_its_order(sc, labelled):
    model, x = classifier(), features()
    arrays = (x, np.zeros(ROWS, np.int32)) if labelled else x
    dataset = TFDataset.from_ndarrays(arrays, batch_per_thread=16)
    found = np.stack(TFPredictor.from_keras(model, dataset).predict().collect())
    np.testing.assert_allclose(found, model.predict(x, verbose=0), rtol=1e-5)


def test_a_mapped_rdd_data_set(sc):
    model, x = classifier(), features()
    rdd = sc.parallelize(x.astype(np.float64) * 2, 3)
    dataset = TFDataset.from_rdd(rdd, features=("float64", [4]), batch_per_thread=50).map(
        lambda row: tf.cast(row / 2, tf.float32)
    )
    found = np.stack(TFPredictor.from_keras(model, dataset).predict().collect())
    np.testing.assert_allclose(found, model.predict(x, verbose=0), rtol=1e-5)


def test_tensors_of_a_session(sc):
    x = features()
    dataset = TFDataset.from_ndarrays(x, batch_per_thread=64)
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        kernel = v1.get_variable("kernel", [4, 2])
        outputs = {"out": tf.matmul(dataset.tensors, kernel), "first": dataset.tensors[:, 0]}
        session.run(v1.global_variables_initializer())
        expected = session.run(outputs["out"], {dataset.tensors: x})
        found = TFPredictor.from_outputs(session, outputs).predict().collect()
        net = TFNet.from_session(session, dataset.tensors, outputs["out"])
    np.testing.assert_allclose(np.stack([row["out"] for row in found]), expected, rtol=1e-5)
    np.testing.assert_array_equal([row["first"] for row in found], x[:, 0])
    np.testing.assert_allclose(net.predict(x), expected, rtol=1e-5)
    np.testing.assert_allclose(net.predict(sc.parallelize(x, 3)).collect(), expected, rtol=1e-5)


def test_a_net_is_evaluated(sc):
    model, x = classifier(), features()
    y = np.random.default_rng(1).integers(0, 3, len(x))
    net = TFNet(prediction_from_keras(model))
    dataset = TFDataset.from_ndarrays((x, y), batch_per_thread=64)
    found = net.evaluate(dataset, ["accuracy", "sparse_categorical_crossentropy"])
    predicted = model.predict(x, verbose=0)
    assert found == {
        "accuracy": pytest.approx(np.mean(predicted.argmax(1) == y)),
        "sparse_categorical_crossentropy": pytest.approx(
            -np.mean(np.log(predicted[np.arange(len(y)), y])), rel=1e-5
        ),
    }
    with pytest.raises(InvalidInputError, match="without labels"):
        net.evaluate(TFDataset.from_ndarrays(x, batch_per_thread=64), "mse")
    with pytest.raises(DataError, match="must be what the model takes"):
        net.evaluate(TFDataset.from_ndarrays((x[:, :2], y), batch_per_thread=64), "mse")


def test_a_saved_model_and_an_export_folder(sc, tmp_path):
    model, x = classifier(), features()
    model.export(str(tmp_path / "saved"), verbose=False)
    net = TFNet.from_saved_model(str(tmp_path / "saved"))
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(net.predict(x), expected, rtol=1e-5)
    with pytest.raises(ProgramError, match=r"'classify'; .* has .*serving_default"):
        TFNet.from_saved_model(str(tmp_path / "saved"), signature="classify")
    with pytest.raises(ProgramError, match="nothing; there are output_0"):
        TFNet.from_saved_model(str(tmp_path / "saved"), outputs=["nothing"])

    v1 = tf.compat.v1
    with tf.Graph().as_default() as graph:
        placeholder = v1.placeholder(tf.float32, [None, 4], "x")
        tf.matmul(placeholder, tf.constant(np.eye(4, 2, dtype=np.float32)), name="y")
    (tmp_path / "frozen_inference_graph.pb").write_bytes(graph.as_graph_def().SerializeToString())
    meta = {"input_names": ["x:0"], "output_names": ["y:0"]}
    (tmp_path / "graph_meta.json").write_text(json.dumps(meta))
    frozen = TFNet.from_export_folder(str(tmp_path))
    np.testing.assert_allclose(frozen.predict(x), x[:, :2])


def test_bad_input_is_one_clear_error(spark, frame):
    prediction = prediction_from_keras(classifier())
    with pytest.raises(DataError, match="'y', which is not among id, x, v, total"):
        predict(prediction, frame, feature_cols="y")
    with pytest.raises(InvalidInputError, match="there are id, x, v, total"):
        predict(prediction, frame)
    with pytest.raises(DataError, match="for each input of a model"):
        predict(prediction, frame, feature_cols=["x", "total"])
    with pytest.raises(DataError, match="for each output of a model"):
        predict(prediction, frame, feature_cols="x", output_cols=["a", "b"])
    with pytest.raises(InvalidInputError, match="at least one row"):
        predict(prediction, frame, feature_cols="x", batch_size=0)
    with pytest.raises(InvalidInputError, match="no inputs="):
        prediction_of(lambda batch: batch)
    with pytest.raises(InvalidInputError, match=r"Received: int"):
        register_model_udf(spark, "nothing", 3)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("array(1f, 2f, 3f)", r"partition 0, phase prediction, row \d+.*3 elements instead of 4"),
        ("CAST(NULL AS array<float>)", "null for"),
        ("array(1f, 2f, NULL, 4f)", "null for"),
        ("array('a', 'b', 'c', 'd')", "string values"),
    ],
)
def test_a_row_that_a_model_cannot_take(spark, frame, values, said):
    prediction = prediction_from_keras(classifier())
    bad = frame.coalesce(1).withColumn("x", F.expr(f"IF(id = 77, {values}, x)"))
    if "'a'" in values:
        bad = frame.withColumn("x", F.expr(values))
    with pytest.raises(PythonException, match=said):
        predict(prediction, bad, feature_cols="x").collect()


def test_an_operation_that_fails(sc):
    net = TFNet(prediction_of(lambda x: tf.ensure_shape(x, [3]), inputs=("float32", [])))
    with pytest.raises(PythonException, match="must predict every row"):
        net.predict(sc.parallelize([1.0, 2.0], 1)).collect()


def test_a_worker_loads_a_model_once(spark, frame):
    import os

    udf = ModelUdf(prediction_from_keras(classifier()), spark.sparkContext, 64)
    predict_columns(frame, udf, "x").collect()
    fingerprint = udf._shipped.fingerprint

    def loaded(_):
        from tfspark.inference import worker

        folder = os.environ["SPARK_LOCAL_DIRS"].split(",")[0] + "/tfspark"
        models = {key: id(value) for key, value in worker._LOADED.items()}
        files = [name for name in os.listdir(folder) if name.startswith("weights-")]
        return [(os.getpid(), models.get(fingerprint), len(files))]

    def look():
        found = spark.sparkContext.parallelize(range(4), 4).mapPartitions(loaded).collect()
        return {pid: model for pid, model, _ in found if model}, max(n for *_, n in found)

    before, files = look()
    predict_columns(frame, udf, "x").collect()
    after, _ = look()
    assert before and all(after.get(pid, model) == model for pid, model in before.items())
    assert 1 <= files <= 8


def run_stream(spark, folder):
    """Predicts what is new in `in/`, by a query that goes on from its checkpoint."""
    stream = spark.readStream.schema("id int, x array<float>").json(str(folder / "in"))
    query = (
        stream.selectExpr("id", "classify(x) AS prediction")
        .writeStream.format("json")
        .option("checkpointLocation", str(folder / "checkpoint"))
        .trigger(availableNow=True)
        .start(str(folder / "out"))
    )
    query.awaitTermination()


def test_a_stream_is_predicted_without_loss_or_repetition(spark, tmp_path):
    model, x = classifier(), features(60)
    source = tmp_path / "in"
    source.mkdir()
    register_model_udf(spark, "classify", model)

    def write(part):
        frame = spark.createDataFrame(
            [(i, x[i].tolist()) for i in range(part * 20, part * 20 + 20)], "id int, x array<float>"
        )
        frame.coalesce(1).write.mode("append").json(str(source))

    for part in range(3):  # each time a new query goes on from the checkpoint
        write(part)
        run_stream(spark, tmp_path)
    rows = spark.read.schema("id int, prediction array<float>").json(str(tmp_path / "out"))
    found = sorted(rows.collect())
    assert [row.id for row in found] == list(range(60))
    np.testing.assert_allclose(
        [row.prediction for row in found], model.predict(x, verbose=0), rtol=1e-4, atol=1e-6
    )


def test_a_malformed_record_stops_a_stream_and_loses_nothing(spark, tmp_path):
    model, x = classifier(), features(40)
    source = tmp_path / "in"
    source.mkdir()
    register_model_udf(spark, "classify", model)

    def write(name, numbers, spoilt=None):
        lines = [json.dumps({"id": i, "x": x[i].tolist()}) for i in numbers]
        if spoilt is not None:
            lines[spoilt] = lines[spoilt][:15]  # cut off within the array
        (source / name).write_text("\n".join(lines))

    write("first.json", range(20))
    run_stream(spark, tmp_path)
    write("second.json", range(20, 40), spoilt=7)
    with pytest.raises(StreamingQueryException, match=r"row 7.*Received: null") as caught:
        run_stream(spark, tmp_path)
    assert "phase prediction" in str(caught.value)
    write("second.json", range(20, 40))
    run_stream(spark, tmp_path)
    rows = spark.read.schema("id int, prediction array<float>").json(str(tmp_path / "out"))
    assert sorted(row.id for row in rows.collect()) == list(range(40))
