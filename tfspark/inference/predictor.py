"""Models in use: `TFPredictor` over a data set, `TFNet` over whatever there is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optree
import tensorflow as tf
from pyspark.rdd import RDD
from pyspark.sql import DataFrame

from tfspark.data.dataset import TFDataset, dataset_of
from tfspark.data.spec import RowSpec
from tfspark.errors import InvalidInputError, ProgramError
from tfspark.graph.metrics import metrics_from
from tfspark.graph.prediction import (
    prediction_from_graph,
    prediction_from_keras,
    prediction_from_saved_model,
)
from tfspark.graph.program import Prediction
from tfspark.graphdef.nodes import ancestors
from tfspark.inference.dataframe import ModelUdf, predict_columns
from tfspark.inference.evaluation import evaluate_outputs
from tfspark.inference.models import BATCH_SIZE
from tfspark.inference.rows import check_inputs, predict_arrays, predict_dataset, predict_rdd
from tfspark.inference.shipping import active_context


def predict(
    prediction: Prediction,
    x: Any,
    *,
    batch_size: int = BATCH_SIZE,
    feature_cols: Any = None,
    output_cols: str | Sequence[str] = "prediction",
) -> Any:
    """What a model makes of each row of whatever `x` is.

    Args:
        prediction: the model.
        x: a `TFDataset`, an RDD of rows, a DataFrame, or arrays `[rows, *shape]`; in the structure
            of the model's inputs.
        batch_size: most rows of one call of the model.
        feature_cols: of a DataFrame; see `predict_columns`.
        output_cols: of a DataFrame.

    Returns:
        Of a data set or an RDD: an RDD of outputs, arrays `[*shape]` in their structure. Of a
        DataFrame: one with more columns. Of arrays: arrays, computed in this process.
    """
    if isinstance(x, TFDataset):
        return predict_dataset(prediction, x, batch_size)
    if isinstance(x, RDD):
        return predict_rdd(prediction, x, batch_size)
    if isinstance(x, DataFrame):
        if feature_cols is None:
            raise InvalidInputError(
                "Of a DataFrame it must be said which columns a model takes. "
                f"Received: no feature_cols=; there are {', '.join(x.columns)}."
            )
        udf = ModelUdf(prediction, active_context(), batch_size)
        return predict_columns(x, udf, feature_cols, output_cols)
    return predict_arrays(prediction, x, batch_size)


class TFPredictor:
    """Tensors of a TensorFlow graph for each row of a data set.

    Args:
        sess: the session that holds the variables.
        outputs: a tensor, or a list or dict of them: `[rows, …]`.
        inputs: placeholders for the fields of the data set, in the structure of its features;
            default: `dataset.tensors`, or its feature tensors where it has labels.
        dataset: the rows; default: the one whose tensors the outputs depend on. Its
            `batch_per_thread` are the rows of one call.

    Example:
        >>> import tensorflow.compat.v1 as tf
        >>> dataset = TFDataset.from_ndarrays(np.ones([8, 3], np.float32), batch_per_thread=4)
        >>> with tf.Graph().as_default(), tf.Session() as sess:
        ...     kernel = tf.get_variable("kernel", [3, 1])
        ...     sess.run(tf.global_variables_initializer())
        ...     predictor = TFPredictor(sess, tf.matmul(dataset.tensors, kernel))
        >>> predictor.predict().count()  # doctest: +SKIP
        8
    """

    def __init__(self, sess: Any, outputs: Any, inputs: Any = None, dataset: Any = None):
        found = dataset if dataset is not None else _dataset_behind(outputs)
        if inputs is None:
            with sess.graph.as_default():
                inputs = found.feature_tensors if found.labelled else found.tensors
        self._dataset = found
        self.prediction = prediction_from_graph(outputs, session=sess, inputs=inputs)

    @classmethod
    def from_outputs(cls, sess: Any, outputs: Any) -> TFPredictor:
        """Of tensors that depend on those of a data set."""
        return cls(sess, outputs)

    @classmethod
    def from_keras(cls, keras_model: Any, dataset: TFDataset) -> TFPredictor:
        """Of a Keras model, on the features of a data set."""
        self = cls.__new__(cls)
        structure = dataset.row_spec.structure()
        features = structure[0] if dataset.labelled else structure
        self._dataset = dataset
        self.prediction = prediction_from_keras(keras_model, type(dataset.row_spec).of(features))
        return self

    def predict(self) -> RDD:
        """RDD of the outputs, arrays `[*shape]` in their structure, in the order of the rows.

        Those of tf.data and TFRecord data sets are in the order in which partitions read them.
        """
        rows = self._dataset.batch_per_thread or self._dataset.batch_size or BATCH_SIZE
        return predict_dataset(self.prediction, self._dataset, rows)


class TFNet:
    """A TensorFlow model, wherever it came from, for prediction.

    Make one with `from_saved_model`, `from_session` or `from_export_folder`.

    Attributes:
        prediction: the model as a graph without variables.
    """

    def __init__(self, prediction: Prediction):
        self.prediction = prediction

    @classmethod
    def from_saved_model(
        cls,
        path: str,
        tag: str | None = None,
        signature: str | None = None,
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> TFNet:
        """Of a SavedModel of TensorFlow 1 or 2.

        Args:
            path: its folder, on any file system that TensorFlow reads.
            tag: of the graph; default: the only one.
            signature: default: "serving_default".
            inputs, outputs: names of the signature's tensors in the order wanted; default: all,
                sorted by name.

        Raises:
            ProgramError: there is no such signature or tensor; names those there are.
        """
        return cls(prediction_from_saved_model(path, tag, signature, inputs, outputs))

    @classmethod
    def from_session(cls, sess: Any, inputs: Any, outputs: Any) -> TFNet:
        """Of tensors of a session's graph, with the variables as they are now.

        Args:
            sess: the session.
            inputs: placeholders, `[rows, …]`: one, or a list or dict of them.
            outputs: tensors, `[rows, …]`, likewise.
        """
        return cls(prediction_from_graph(outputs, session=sess, inputs=inputs))

    @classmethod
    def from_export_folder(
        cls,
        folder: str,
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> TFNet:
        """Of a frozen graph as Analytics Zoo exports it.

        Args:
            folder: has `frozen_inference_graph.pb`, and `graph_meta.json` with the names of its
                tensors.
            inputs, outputs: names of tensors, instead of those in `graph_meta.json`.
        """
        names = {"input_names": inputs, "output_names": outputs}
        if inputs is None or outputs is None:
            meta = json.loads((Path(folder) / "graph_meta.json").read_text())
            names = {key: given or meta[key] for key, given in names.items()}
        definition = tf.compat.v1.GraphDef.FromString(
            (Path(folder) / "frozen_inference_graph.pb").read_bytes()
        )
        with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph) as session:
            tf.import_graph_def(definition, name="")
            fed, fetched = (
                [graph.get_tensor_by_name(name) for name in names[key] or ()]
                for key in ("input_names", "output_names")
            )
            return cls.from_session(session, _one(fed), _one(fetched))

    def predict(
        self,
        x: Any,
        batch_per_thread: int = BATCH_SIZE,
        distributed: bool = True,
        *,
        feature_cols: Any = None,
        output_cols: str | Sequence[str] = "prediction",
    ) -> Any:
        """What the model makes of each row; see `predict` of this module.

        Args:
            x: a `TFDataset`, an RDD of rows, a DataFrame, or arrays.
            batch_per_thread: most rows of one call of the model.
            distributed: has no meaning: arrays stay in this process, all else is distributed.
            feature_cols, output_cols: of a DataFrame.
        """
        return predict(
            self.prediction,
            x,
            batch_size=batch_per_thread,
            feature_cols=feature_cols,
            output_cols=output_cols,
        )

    def evaluate(
        self, dataset: TFDataset, metrics: Any, batch_per_thread: int | None = None
    ) -> dict[str, Any]:
        """Metrics of the model's outputs over all rows, computed by Spark.

        Args:
            dataset: rows `(x, y)`; weights of rows are not looked at, as in metrics of Keras.
            metrics: Keras metrics of labels and outputs, or their names; one, a list, or a dict by
                name. Of several outputs a metric gets a list.
            batch_per_thread: most rows of one call of the model; default: that of the data set.

        Returns:
            By name: a float, or an array.

        Raises:
            InvalidInputError: rows without labels.
            DataError: the rows are not what the model takes.
        """
        if not dataset.labelled:
            raise InvalidInputError(
                "An evaluation compares outputs with labels. Received: a data set without labels. "
                "Make rows (x, y)."
            )
        rows = batch_per_thread or dataset.batch_per_thread or dataset.batch_size or BATCH_SIZE
        check_inputs(RowSpec.of(dataset.row_spec.structure()[0]), self.prediction.inputs)
        return evaluate_outputs(self.prediction, dataset, metrics_from(metrics), rows)


def _one(tensors: list[Any]) -> Any:
    return tensors[0] if len(tensors) == 1 else tensors


def _dataset_behind(outputs: Any) -> TFDataset:
    """The data set whose placeholders tensors depend on."""
    tensors = optree.tree_leaves(outputs)
    found = {
        id(entry[0]): entry[0]
        for op in ancestors([tensor.op for tensor in tensors]).values()
        if op.type == "Placeholder" and (entry := dataset_of(op.outputs[0])) is not None
    }
    if len(found) != 1:
        raise ProgramError(
            "Outputs depend on the tensors of one data set. "
            f"Received: {', '.join(t.name for t in tensors)}, which depend on those of "
            f"{len(found)}. Build them from dataset.tensors, or pass dataset= and inputs=."
        )
    return next(iter(found.values()))
