"""Stages of Spark ML against plain Keras on the same rows, and against Spark ML's own customs."""

import json

import keras
import numpy as np
import pytest
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.classification import LogisticRegression
from pyspark.ml.evaluation import MulticlassClassificationEvaluator, RegressionEvaluator
from pyspark.ml.feature import StringIndexer, VectorAssembler
from pyspark.ml.linalg import Vectors
from pyspark.ml.tuning import (
    CrossValidator,
    CrossValidatorModel,
    ParamGridBuilder,
    TrainValidationSplit,
)
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from tfspark import (
    EveryEpoch,
    MaxEpoch,
    MaxIteration,
    SeveralIteration,
    TrainSummary,
    TriggerOr,
    ValidationSummary,
)
from tfspark.errors import DataError, InvalidInputError, ProgramError
from tfspark.nnframes import (
    NNClassifier,
    NNClassifierModel,
    NNEstimator,
    NNFeaturizer,
    NNModel,
)

ROWS, BATCH = 60, 12
DENSE = keras.layers.Dense
LOCAL = {"engine": "local", "num_ranks": 1}


@pytest.fixture(scope="module")
def spark(sc):
    return SparkSession(sc)


def rows():
    x = np.random.default_rng(0).normal(size=(ROWS, 4))
    y = (x[:, 0] > 0).astype(int) + (x[:, 1] > 0.5).astype(int)
    return x, y


@pytest.fixture(scope="module")
def frame(spark):
    x, y = rows()
    names = ["no", "yes", "maybe"]
    content = [
        (i, Vectors.dense(v), v.tolist(), *v.tolist(), float(k), names[k], float(v.sum()))
        for i, (v, k) in enumerate(zip(x, y, strict=True))
    ]
    columns = ["id", "features", "array", "a", "b", "c", "d", "label", "name", "total"]
    return spark.createDataFrame(content, columns).coalesce(1).cache()


def classifier(logits=False):
    keras.utils.set_random_seed(3)
    last = DENSE(3) if logits else DENSE(3, "softmax")
    return keras.Sequential([keras.Input([4]), DENSE(8, "relu"), last])


def regressor():
    keras.utils.set_random_seed(4)
    return keras.Sequential([keras.Input([4]), DENSE(1)])


def by_keras(model, y, loss, epochs, rate=0.05, **arguments):
    """Weights and losses of plain Keras in the order of rows."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    copy.compile(keras.optimizers.Adam(rate), loss)
    x = rows()[0].astype(np.float32)
    history = copy.fit(x, y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, **arguments)
    return copy, history.history["loss"]


def estimator(kind, model, *arguments, **params):
    given = {"batchSize": BATCH, "maxEpoch": 3, "shuffle": False, "learningRate": 0.05, **params}
    return kind(model, *arguments, **given).setSettings(**LOCAL)


def assert_weights(ours, theirs, exact=False):
    """Two models, of which each is a stage or of Keras, have the same weights."""
    pair = [m.getModel() if isinstance(m, NNModel) else m for m in (ours, theirs)]
    for one, other in zip(*(model.get_weights() for model in pair), strict=True):
        if exact:
            np.testing.assert_array_equal(one, other)
        else:
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


class TestTrainingIsThatOfKeras:
    def test_of_a_regression(self, frame):
        model = regressor()
        fitted = estimator(NNEstimator, model, "mse", labelCol="total").fit(frame)
        reference, losses = by_keras(model, rows()[0].sum(axis=1), "mse", 3)
        assert_weights(fitted, reference)
        assert fitted.summary.objectiveHistory == pytest.approx(losses, rel=1e-4)
        assert fitted.summary.totalIterations == 3 * ROWS // BATCH
        predicted = [row.prediction for row in fitted.transform(frame).orderBy("id").collect()]
        expected = reference.predict(rows()[0], verbose=0)[:, 0]
        np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("logits", [False, True])
    def test_of_a_classifier(self, frame, logits):
        model = classifier(logits)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=logits)
        fitted = estimator(NNClassifier, model, loss).fit(frame)
        reference, losses = by_keras(model, rows()[1], loss, 3)
        assert fitted.summary.objectiveHistory == pytest.approx(losses, rel=1e-4)
        found = fitted.transform(frame).orderBy("id").collect()
        raw = reference.predict(rows()[0], verbose=0)
        expected = np.asarray(keras.ops.softmax(raw)) if logits else raw
        np.testing.assert_allclose(
            [row.probability.toArray() for row in found], expected, rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(
            [row.rawPrediction.toArray() for row in found], raw, rtol=1e-3, atol=1e-4
        )
        assert [row.prediction for row in found] == expected.argmax(axis=1).tolist()

    def test_with_weights_of_rows(self, frame):
        model = classifier()
        weighted = frame.withColumn("weight", F.col("id") % 3 + 0.5)
        fitted = estimator(NNClassifier, model, weightCol="weight").fit(weighted)
        weights = np.arange(ROWS) % 3 + 0.5
        reference, _ = by_keras(
            model, rows()[1], "sparse_categorical_crossentropy", 3, sample_weight=weights
        )
        assert_weights(fitted, reference)

    def test_by_ranks_in_spark_as_well(self, frame):
        model = classifier()
        params = {"batchSize": BATCH, "maxEpoch": 2, "learningRate": 0.05}
        local = NNClassifier(model, **params).setSettings(engine="local", num_ranks=2)
        gang = NNClassifier(model, **params).setSettings(engine="gang", num_ranks=2)
        assert_weights(gang.fit(frame), local.fit(frame).getModel())


class TestTheEstimatorStaysAsItIs:
    def test_its_model_is_not_trained(self, frame):
        model = classifier()
        before = model.get_weights()
        stage = estimator(NNClassifier, model)
        first, second = stage.fit(frame), stage.fit(frame)
        for now, then in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(now, then)
        assert_weights(first, second, exact=True)

    def test_with_other_params_for_a_fit(self, frame):
        stage = estimator(NNClassifier, classifier())
        short = stage.fit(frame, {stage.maxEpoch: 1})
        assert len(short.summary.objectiveHistory) == 1
        assert stage.getMaxEpoch() == 3

    def test_and_so_does_its_optimizer(self, frame):
        adam = keras.optimizers.Adam(0.05)
        stage = estimator(NNClassifier, classifier(), learningRate=None).setOptimMethod(adam)
        same = estimator(NNClassifier, classifier())
        assert stage.fit(frame).summary.objectiveHistory == same.fit(frame).summary.objectiveHistory

    def test_a_function_makes_the_model(self, frame):
        stage = estimator(NNClassifier, classifier)
        same = estimator(NNClassifier, classifier())
        assert stage.fit(frame).summary.objectiveHistory == same.fit(frame).summary.objectiveHistory

    def test_frozen_layers_stay_frozen(self, frame):
        model = classifier()
        model.layers[0].trainable = False
        fitted = estimator(NNClassifier, model).fit(frame)
        before, after = model.get_weights(), fitted.getModel().get_weights()
        np.testing.assert_array_equal(before[0], after[0])
        assert not np.array_equal(before[2], after[2])

    def test_the_compiled_loss_and_optimizer_are_used(self, frame):
        model = regressor()
        model.compile(keras.optimizers.Adam(0.05), "mae")
        stage = estimator(NNEstimator, model, labelCol="total", learningRate=None)
        _, losses = by_keras(model, rows()[0].sum(axis=1), "mae", 3)
        assert stage.fit(frame).summary.objectiveHistory == pytest.approx(losses, rel=1e-4)


class TestColumns:
    @pytest.mark.parametrize("columns", ["array", ["a", "b", "c", "d"]])
    def test_arrays_and_several_numbers_are_as_a_vector(self, frame, columns):
        same = estimator(NNClassifier, classifier()).fit(frame)
        other = estimator(NNClassifier, classifier(), featuresCol=columns).fit(frame)
        assert other.summary.objectiveHistory == same.summary.objectiveHistory
        first, second = (m.transform(frame).orderBy("id").collect() for m in (same, other))
        assert [row.prediction for row in first] == [row.prediction for row in second]

    def test_a_model_is_used_on_a_vector_where_it_was_trained_on_an_array(self, frame):
        fitted = estimator(NNClassifier, classifier(), featuresCol="array").fit(frame)
        fitted.setFeaturesCol("features")
        assert fitted.transform(frame).count() == ROWS

    def test_inputs_are_matched_by_name(self, frame):
        a, b = keras.Input([1], name="a"), keras.Input([1], name="b")
        model = keras.Model([a, b], DENSE(1, use_bias=False)(keras.layers.Concatenate()([a, b])))
        model.set_weights([np.array([[1.0], [10.0]])])
        scored = NNModel(model, featuresCol=["b", "a"]).transform(frame).orderBy("id").collect()
        x = rows()[0]
        np.testing.assert_allclose(
            [r.prediction for r in scored], x[:, 0] + 10 * x[:, 1], rtol=1e-5
        )
        trained = estimator(NNEstimator, model, "mse", featuresCol=["b", "a"], labelCol="total")
        scored = trained.setEndWhen(MaxIteration(1)).fit(frame)
        assert scored.transform(frame).count() == ROWS

    def test_preprocessing_is_a_part_of_the_model(self, frame):
        chain = [lambda x: x[::-1], lambda x: x / 2]
        fitted = estimator(NNClassifier, classifier(), None, chain).fit(frame)
        turned = frame.withColumn("array", F.transform(F.reverse("array"), lambda v: v / 2))
        plain = estimator(NNClassifier, classifier(), featuresCol="array").fit(turned)
        assert fitted.summary.objectiveHistory == pytest.approx(
            plain.summary.objectiveHistory, rel=1e-5
        )
        ours = fitted.transform(frame).orderBy("id").collect()
        theirs = plain.transform(turned).orderBy("id").collect()
        assert [row.prediction for row in ours] == [row.prediction for row in theirs]

    def test_shapes_as_preprocessing(self, frame):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input([2, 2]), keras.layers.Flatten(), DENSE(1)])
        stage = estimator(NNEstimator, model, "mse", [2, 2], [1], labelCol="total")
        assert stage.fit(frame).transform(frame).count() == ROWS

    def test_other_columns_and_their_order_stay(self, frame):
        fitted = estimator(NNClassifier, classifier(), maxEpoch=1).fit(frame)
        scored = fitted.transform(frame.repartition(3))
        added = ["rawPrediction", "probability", "prediction"]
        assert scored.columns == [*frame.columns, *added]
        fitted.setRawPredictionCol("").setProbabilityCol("")
        assert fitted.transform(frame).columns == [*frame.columns, "prediction"]


class TestClasses:
    def test_of_one_output(self, frame):
        binary = frame.withColumn("label", (F.col("label") > 0).cast("int"))
        keras.utils.set_random_seed(3)
        model = keras.Sequential([keras.Input([4]), DENSE(1)])
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
        fitted = estimator(NNClassifier, model, loss).fit(binary)
        row = fitted.transform(binary).first()
        z = row.rawPrediction[1]
        assert row.rawPrediction.toArray() == pytest.approx([-z, z])
        assert row.probability[1] == pytest.approx(1 / (1 + np.exp(-z)), rel=1e-5)
        assert fitted.numClasses == 2

    def test_thresholds_move_the_choice(self, frame):
        fitted = estimator(NNClassifier, classifier()).fit(frame)
        found = fitted.setThresholds([0.9, 0.9, 0.05]).transform(frame).collect()
        for row in found:
            scaled = row.probability.toArray() / [0.9, 0.9, 0.05]
            assert row.prediction == scaled.argmax()
        # Every probability is above 0.
        never = fitted.setThresholds([1.0, 1.0, 0.0]).transform(frame)
        assert never.filter("prediction != 2").count() == 0

    def test_threshold_of_two_classes(self, frame):
        model = keras.Sequential([keras.Input([4]), DENSE(1, "sigmoid")])
        scored = NNClassifierModel(model, threshold=0.7).transform(frame).collect()
        assert all(row.prediction == (row.probability[1] > 0.7) for row in scored)
        with pytest.raises(InvalidInputError, match="for two classes"):
            NNClassifierModel(classifier(), threshold=0.7).transform(frame)

    def test_a_threshold_for_each_class(self, frame):
        with pytest.raises(InvalidInputError, match="threshold for each of 3 classes"):
            NNClassifierModel(classifier(), thresholds=[0.5, 0.5]).transform(frame)

    def test_evaluators_of_spark_read_the_columns(self, frame):
        fitted = estimator(NNClassifier, classifier(), maxEpoch=40).fit(frame)
        accuracy = MulticlassClassificationEvaluator(metricName="accuracy")
        log_loss = MulticlassClassificationEvaluator(metricName="logLoss")
        scored = fitted.transform(frame)
        assert accuracy.evaluate(scored) > 0.9
        expected = -np.mean([np.log(row.probability[int(row.label)]) for row in scored.collect()])
        assert log_loss.evaluate(scored) == pytest.approx(expected, rel=1e-4)


class TestValidation:
    def test_by_a_column(self, frame):
        told = frame.withColumn("held", F.col("id") >= 48)
        stage = estimator(NNClassifier, classifier(), validationIndicatorCol="held")
        fitted = stage.setValidationMethods(["accuracy", "top5"]).fit(told)
        steps = [step for step, _ in fitted.summary.validationHistory]
        assert steps == [4, 8, 12]
        assert set(fitted.summary.validationHistory[-1][1]) == {"loss", "accuracy", "top5"}
        scored = fitted.transform(told.filter("held"))
        right = scored.filter("label = prediction").count() / 12
        assert fitted.summary.validationHistory[-1][1]["accuracy"] == pytest.approx(right)

    def test_by_a_frame_with_summaries(self, frame, tmp_path):
        stage = estimator(NNClassifier, classifier())
        stage.setValidation(SeveralIteration(3), frame.limit(10), ["accuracy"], 4)
        stage.setTrainSummary(TrainSummary(tmp_path, "app"))
        stage.setValidationSummary(ValidationSummary(tmp_path, "app"))
        fitted = stage.fit(frame)
        assert [step for step, _ in fitted.summary.validationHistory] == [3, 6, 9, 12, 15]
        assert len(TrainSummary(tmp_path, "app").read_scalar("Loss")) == 15
        assert len(ValidationSummary(tmp_path, "app").read_scalar("accuracy")) == 5

    def test_early_stopping_keeps_the_best_weights(self, frame):
        told = frame.withColumn("held", F.col("id") >= 48)
        stage = estimator(NNClassifier, classifier(), validationIndicatorCol="held")
        stage.setMaxEpoch(60).setLearningRate(0.5).setEarlyStopping(patience=2)
        fitted = stage.fit(told)
        losses = [scores["loss"] for _, scores in fitted.summary.validationHistory]
        assert len(losses) < 60
        assert np.argmin(losses) == len(losses) - 3
        scored = fitted.transform(told.filter("held")).collect()
        loss = -np.mean([np.log(row.probability[int(row.label)]) for row in scored])
        assert loss == pytest.approx(min(losses), rel=1e-3)

    def test_early_stopping_needs_its_score(self, frame):
        stage = estimator(NNClassifier, classifier()).setEarlyStopping(2)
        with pytest.raises(InvalidInputError, match=r"looks at loss. Received: monitor='val_loss'"):
            stage.fit(frame)
        told = frame.withColumn("held", F.col("id") >= 48)
        stage.setValidationIndicatorCol("held").setEarlyStopping(2, monitor="val_accuracy")
        with pytest.raises(InvalidInputError, match=r"loss, val_loss. Received"):
            stage.fit(told)


class TestCheckpoints:
    def test_an_interrupted_fit_goes_on(self, frame, tmp_path):
        whole = estimator(NNClassifier, classifier()).fit(frame)
        stage = estimator(NNClassifier, classifier())
        stage.setCheckpoint(str(tmp_path), EveryEpoch())
        stage.fit(frame, {stage.maxEpoch: 1})
        resumed = stage.setResume(True).fit(frame)
        assert resumed.summary.objectiveHistory == whole.summary.objectiveHistory
        assert_weights(resumed, whole, exact=True)
        assert len(list(tmp_path.iterdir())) == 1

    def test_every_other_fit_starts_anew(self, frame, tmp_path):
        stage = estimator(NNClassifier, classifier())
        stage.setCheckpoint(str(tmp_path), EveryEpoch())
        first, second = stage.fit(frame), stage.fit(frame)
        assert first.summary.objectiveHistory == second.summary.objectiveHistory
        assert len(list(tmp_path.iterdir())) == 2


class TestPipelines:
    def test_one_is_cross_validated_saved_and_loaded_elsewhere(self, frame, tmp_path, run_python):
        stage = estimator(NNClassifier, classifier(), labelCol="index", featuresCol="vector")
        pipeline = Pipeline(
            stages=[
                StringIndexer(inputCol="name", outputCol="index", stringOrderType="alphabetAsc"),
                VectorAssembler(inputCols=["a", "b", "c", "d"], outputCol="vector"),
                stage,
            ]
        )
        grid = ParamGridBuilder().addGrid(stage.learningRate, [1e-6, 0.05]).build()
        validator = CrossValidator(
            estimator=pipeline,
            estimatorParamMaps=grid,
            evaluator=MulticlassClassificationEvaluator(labelCol="index", metricName="accuracy"),
            numFolds=2,
            parallelism=2,
            seed=1,
        )
        found = validator.fit(frame)
        assert found.avgMetrics[1] > found.avgMetrics[0]
        found.write().overwrite().save(str(tmp_path / "validated"))
        again = CrossValidatorModel.load(str(tmp_path / "validated"))
        assert again.avgMetrics == found.avgMetrics
        again.bestModel.save(str(tmp_path / "best"))
        expected = found.bestModel.transform(frame).orderBy("id").collect()
        plain = frame.select("id", "name", "a", "b", "c", "d")
        plain.write.parquet(str(tmp_path / "rows"))
        run_python(f"""
            from pyspark.ml import PipelineModel
            from pyspark.sql import SparkSession
            spark = SparkSession.builder.master("local[2]").config(
                "spark.ui.enabled", "false").getOrCreate()
            model = PipelineModel.load({str(tmp_path / "best")!r})
            rows = spark.read.parquet({str(tmp_path / "rows")!r})
            scored = model.transform(rows).orderBy("id")
            scored.select("id", "prediction").coalesce(1).write.json({str(tmp_path / "out")!r})
            spark.stop()
        """)
        (file,) = (tmp_path / "out").glob("*.json")
        scored = [json.loads(line) for line in file.read_text().splitlines()]
        assert [each["prediction"] for each in scored] == [row.prediction for row in expected]

    @pytest.mark.parametrize("settings", [{}, {"num_ranks": 2}, {"engine": "shuffle"}])
    def test_fits_run_side_by_side_in_spark(self, frame, settings):
        stage = NNClassifier(classifier(), batchSize=BATCH, maxEpoch=2, learningRate=0.05)
        stage.setSettings(**settings)
        validator = CrossValidator(
            estimator=stage,
            estimatorParamMaps=ParamGridBuilder().addGrid(stage.learningRate, [1e-6, 0.05]).build(),
            evaluator=MulticlassClassificationEvaluator(metricName="accuracy"),
            numFolds=2,
            seed=1,
        )
        alone = validator.setParallelism(1).fit(frame).avgMetrics
        assert validator.setParallelism(2).fit(frame).avgMetrics == alone

    def test_a_pipeline_that_is_not_fitted_is_saved(self, frame, tmp_path):
        stage = estimator(NNClassifier, classifier(), keras.losses.SparseCategoricalCrossentropy())
        stage.setEndWhen(TriggerOr(MaxEpoch(2), MaxIteration(100)))
        stage.setOptimMethod(keras.optimizers.SGD(0.1, momentum=0.9))
        stage.setTrainSummary(
            TrainSummary(tmp_path / "logs", "a").set_summary_trigger("Loss", SeveralIteration(2))
        )
        stage.setCheckpoint(str(tmp_path / "checkpoints"), EveryEpoch())
        Pipeline(stages=[stage]).save(str(tmp_path / "pipeline"))
        (loaded,) = Pipeline.load(str(tmp_path / "pipeline")).getStages()
        assert loaded.uid == stage.uid
        assert loaded.extractParamMap().keys() == stage.extractParamMap().keys()
        assert loaded.getOrDefault("endWhen") == stage.getOrDefault("endWhen")
        assert loaded.getOrDefault("trainSummary").triggers == {"Loss": SeveralIteration(2)}
        assert (
            loaded.fit(frame).summary.objectiveHistory == stage.fit(frame).summary.objectiveHistory
        )

    def test_a_train_validation_split(self, frame):
        stage = estimator(NNEstimator, regressor(), "mse", labelCol="total")
        grid = ParamGridBuilder().addGrid(stage.batchSize, [6, 60]).build()
        found = TrainValidationSplit(
            estimator=stage,
            estimatorParamMaps=grid,
            evaluator=RegressionEvaluator(labelCol="total"),
            parallelism=2,
            seed=3,
        ).fit(frame)
        assert found.validationMetrics[0] < found.validationMetrics[1]
        assert isinstance(found.bestModel, NNModel)


class TestSaving:
    def test_a_model_keeps_params_and_predictions(self, frame, tmp_path):
        fitted = estimator(NNClassifier, classifier(), None, lambda x: x * 2).fit(frame)
        fitted.setThresholds([0.2, 0.3, 0.5]).setProbabilityCol("p")
        fitted.save(str(tmp_path / "model"))
        loaded = NNClassifierModel.load(str(tmp_path / "model"))
        assert not loaded.hasSummary
        assert loaded.getThresholds() == [0.2, 0.3, 0.5]
        ours, theirs = (m.transform(frame).orderBy("id").collect() for m in (fitted, loaded))
        assert ours == theirs
        assert_weights(fitted, loaded, exact=True)

    def test_what_is_there_is_kept_unless_told(self, frame, tmp_path):
        model = NNModel(regressor())
        model.save(str(tmp_path / "model"))
        with pytest.raises(InvalidInputError, match=r"overwrite\(\)"):
            model.save(str(tmp_path / "model"))
        model.write().overwrite().save(str(tmp_path / "model"))

    def test_a_loaded_one_replaces_itself_without_its_classes(self, frame, tmp_path):
        model = keras.Sequential([keras.Input([4]), keras.layers.Lambda(lambda x: x), DENSE(1)])
        path = str(tmp_path / "model")
        NNModel(model).save(path)
        loaded = NNModel.load(path)
        loaded.setPredictionCol("p").write().overwrite().save(path)
        again = NNModel.load(path)
        assert again.transform(frame).columns[-1] == "p"
        with pytest.raises(InvalidInputError, match="without code"):
            again.getModel()
        assert again.getModel(safe_mode=False).name == model.name

    def test_what_cannot_replace_another_leaves_it(self, tmp_path):
        path = str(tmp_path / "stage")
        NNEstimator(regressor(), "mse").save(path)
        with pytest.raises(InvalidInputError, match="saved without code"):
            NNEstimator(regressor(), lambda y, p: p).write().overwrite().save(path)
        assert NNEstimator.load(path).getOrDefault("criterion") == "mse"

    def test_files_are_checked(self, tmp_path):
        path = tmp_path / "model"
        NNModel(regressor()).save(str(path))
        with pytest.raises(InvalidInputError, match=r"where a tfspark.nnframes.NNModel is"):
            NNClassifierModel.load(str(path))
        weights = path / "data" / "weights.bin"
        weights.write_bytes(bytes(len(weights.read_bytes())))
        (path / "data" / ".weights.bin.crc").unlink(missing_ok=True)  # of Hadoop itself
        with pytest.raises(InvalidInputError, match="was changed since"):
            NNModel.load(str(path))
        weights.unlink()
        with pytest.raises(InvalidInputError, match=r"without 'weights\.bin'"):
            NNModel.load(str(path))

    def test_newer_ones_are_refused(self, spark, tmp_path):
        path = tmp_path / "model"
        NNModel(regressor()).save(str(path))
        (part,) = (path / "metadata").glob("part-*")
        text = part.read_text().replace('"format":1', '"format":2')
        (path / "metadata" / f".{part.name}.crc").unlink()
        part.write_text(text)
        with pytest.raises(InvalidInputError, match="Update tfspark"):
            NNModel.load(str(path))

    def test_an_estimator_keeps_its_preprocessing(self, frame, tmp_path):
        chain = [keras.layers.Rescaling(2.0), [4], keras.ops.tanh]
        stage = estimator(NNClassifier, classifier(), None, chain)
        stage.setOptimMethod({"": keras.optimizers.SGD(0.1)}).clear(stage.learningRate)
        stage.save(str(tmp_path / "stage"))
        loaded = NNClassifier.load(str(tmp_path / "stage"))
        assert (
            loaded.fit(frame).summary.objectiveHistory == stage.fit(frame).summary.objectiveHistory
        )

    def test_code_is_not_written(self, tmp_path):
        stage = NNEstimator(regressor(), "mse", lambda x: x)
        with pytest.raises(InvalidInputError, match=r"saved without code.*featurePreprocessing"):
            stage.save(str(tmp_path / "stage"))
        assert not (tmp_path / "stage").exists()
        with pytest.raises(InvalidInputError, match="a function that makes the model"):
            NNEstimator(regressor, "mse").save(str(tmp_path / "stage"))

    def test_a_frame_is_left_out_with_a_warning(self, frame, tmp_path):
        stage = NNEstimator(regressor(), "mse").setValidation(EveryEpoch(), frame, ["mae"])
        with pytest.warns(UserWarning, match="validationIndicatorCol"):
            stage.save(str(tmp_path / "stage"))
        loaded = NNEstimator.load(str(tmp_path / "stage"))
        assert not loaded.isSet(loaded.validationData)
        assert loaded.getOrDefault("validationMethods") == ["mae"]


class TestFeaturizer:
    def test_drops_the_top(self, frame, tmp_path):
        model = classifier()
        embed = NNFeaturizer(model, featuresCol="array", outputCol="v")
        found = embed.transform(frame).orderBy("id").collect()
        expected = keras.Model(model.inputs, model.layers[0].output).predict(rows()[0], verbose=0)
        np.testing.assert_allclose([row.v.toArray() for row in found], expected, rtol=1e-5)
        embed.save(str(tmp_path / "embed"))
        loaded = NNFeaturizer.load(str(tmp_path / "embed"))
        assert loaded.transform(frame).orderBy("id").collect() == found

    def test_feeds_a_classifier_of_spark(self, frame):
        embed = NNFeaturizer(classifier(), featuresCol="array", outputCol="v")
        logistic = LogisticRegression(featuresCol="v")
        fitted = Pipeline(stages=[embed, logistic]).fit(frame)
        assert isinstance(fitted, PipelineModel)
        assert fitted.transform(frame).filter("label = prediction").count() > ROWS / 2

    def test_names_layers(self):
        with pytest.raises(InvalidInputError, match="the last ones are dense"):
            NNFeaturizer(classifier(), layer="top")


class TestBadInput:
    def test_a_missing_column_is_named_with_those_there_are(self, frame):
        with pytest.raises(DataError, match="'nothing', which is not among id, features"):
            estimator(NNClassifier, classifier(), featuresCol="nothing").fit(frame)
        with pytest.raises(DataError, match="'nothing', which is not among id, features"):
            NNModel(regressor(), featuresCol="nothing").transform(frame)

    def test_a_label_out_of_range(self, frame):
        wrong = frame.withColumn("label", F.when(F.col("id") == 7, 3.0).otherwise(F.col("label")))
        with pytest.raises(DataError, match=r"3 classes, from 0 to 2. Received: 3.0") as caught:
            estimator(NNClassifier, classifier()).fit(wrong)
        assert caught.value.row == 7
        wrong = frame.withColumn("label", F.col("label") + 0.5)
        with pytest.raises(DataError, match=r"Received: .*5 in 'label'"):
            estimator(NNClassifier, classifier()).fit(wrong)

    def test_a_label_of_text(self, frame):
        with pytest.raises(DataError, match="StringIndexer"):
            estimator(NNClassifier, classifier(), labelCol="name").fit(frame)

    def test_vectors_of_two_lengths(self, frame):
        short = F.when(F.col("id") == 7, F.slice("array", 1, 3)).otherwise(F.col("array"))
        with pytest.raises(DataError, match="3 elements in 'array' instead of 4") as caught:
            estimator(NNClassifier, classifier(), featuresCol="array").fit(
                frame.withColumn("array", short)
            )
        assert caught.value.row == 7

    def test_a_null(self, frame):
        empty = F.when(F.col("id") != 7, F.col("a"))
        with pytest.raises(DataError, match="null in 'a'"):
            estimator(NNClassifier, classifier(), featuresCol=["a", "b", "c", "d"]).fit(
                frame.withColumn("a", empty)
            )

    def test_a_model_that_does_not_match(self, frame):
        with pytest.raises(DataError, match=r"takes \[4\] per row. Received: \[3\]"):
            estimator(NNClassifier, classifier(), featuresCol=["a", "b", "c"]).fit(frame)
        with pytest.raises(DataError, match="joined"):
            estimator(NNClassifier, classifier(), featuresCol=["a", "name"]).fit(frame)
        with pytest.raises(ProgramError, match="A classifier has one output"):
            NNClassifierModel(keras.Sequential([keras.Input([4]), keras.layers.Reshape([2, 2])]))

    def test_wrong_params(self, frame):
        with pytest.raises(InvalidInputError, match="Did you mean maxEpoch"):
            NNEstimator(regressor(), "mse", maxEpochs=3)
        with pytest.raises(InvalidInputError, match="batchSize is at least 1"):
            NNEstimator(regressor(), "mse", batchSize=0)
        with pytest.raises(InvalidInputError, match="endWhen is a trigger"):
            NNEstimator(regressor(), "mse").setEndWhen(5)
        with pytest.raises(InvalidInputError, match=r"num_rank.*Did you mean num_ranks"):
            NNEstimator(regressor(), "mse").setSettings(num_rank=3)
        with pytest.raises(InvalidInputError, match="without learningRate"):
            estimator(
                NNEstimator, regressor(), "mse", learningRate=None, labelCol="total"
            ).setLearningRateDecay(0.1).fit(frame)

    def test_an_error_leaves_the_estimator_usable(self, frame):
        stage = estimator(NNClassifier, classifier())
        with pytest.raises(DataError):
            stage.fit(frame.withColumn("label", F.lit(9)))
        assert stage.fit(frame).hasSummary
