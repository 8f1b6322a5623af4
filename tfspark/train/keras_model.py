"""`KerasModel`: fit, evaluate and predict as Keras spells them, on rows that Spark holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import optree
import tensorflow as tf
from keras.src.trainers.data_adapters import array_slicing
from pyspark.rdd import RDD
from pyspark.sql import DataFrame

from tfspark.data.dataset import TFDataset
from tfspark.data.spec import RowSpec
from tfspark.errors import InvalidInputError
from tfspark.graph.from_keras import check_model, view_of
from tfspark.graph.keras_files import load_model
from tfspark.graph.keras_metrics import results_of
from tfspark.graph.keras_sums import check_additive, sums_from_keras
from tfspark.graph.prediction import prediction_from_keras
from tfspark.inference.evaluation import evaluate_dataset, evaluate_locally
from tfspark.inference.predictor import predict
from tfspark.train.frontends import KerasFrontEnd
from tfspark.train.keras_callbacks import callback_list, check_callback
from tfspark.train.model_files import fetched_file, write_file
from tfspark.train.optimizer import TFOptimizer
from tfspark.train.recipe import Settings
from tfspark.train.triggers import MaxIteration

BATCH_SIZE = 32
"""Rows of a batch where nobody says, as in Keras."""

_NEVER = MaxIteration(2**62)


class KerasModel:
    """A compiled Keras model that trains, is evaluated and predicts where the rows are.

    Rows are a `TFDataset`, a Spark DataFrame (with `feature_cols` and `label_cols`), or arrays.
    Arrays stay in this process, and Keras does the work, unless `distributed=True`; all else runs
    in Spark. Afterwards `model` holds the weights.

    Args:
        model: Sequential, functional or subclassed, and compiled; of Keras 3, or of tf-keras (Keras
            2), whose optimizer is applied as the one of Keras 3 with the same formula.
        model_dir: a folder or fsspec URL for the checkpoints of distributed training. `fit` with
            the same folder goes on from the newest one, and `epochs` counts those that are done.
        optimizer: instead of the compiled one: a Keras optimizer or its name.
        **settings: of `TFOptimizer`, such as `engine` and `num_ranks`.

    Attributes:
        model: as given.

    Example:
        >>> x, y = np.ones([8, 3], np.float32), np.ones([8, 1], np.float32)
        >>> model = keras.Sequential([keras.layers.Dense(1)])
        >>> model.compile("adam", "mse", metrics=["mae"])
        >>> history = KerasModel(model, engine="local").fit(
        ...     TFDataset.from_ndarrays((x, y), batch_size=4), epochs=2, verbose=0
        ... )
        >>> sorted(history.history), len(history.history["loss"])
        (['loss', 'mae'], 2)
    """

    def __init__(
        self, model: Any, model_dir: str | None = None, optimizer: Any = None, **settings: Any
    ):
        check_model(model)
        self._view = view_of(model)
        if optimizer is not None:
            model.optimizer = self._view.keras.optimizers.get(optimizer)
        if not self._view.compiled or model.optimizer is None:
            raise InvalidInputError(
                "A KerasModel is compiled. "
                f"Received: {model.name!r}, which is not. Call model.compile(optimizer, loss)."
            )
        self.model = model
        self._settings = Settings.of(model_dir=model_dir, **{"progress": False, **settings})
        if self._settings.average_every > 1:
            raise InvalidInputError(
                "Metrics of an epoch are sums over synchronous steps. Received: "
                f"average_every={self._settings.average_every}. Use TFOptimizer.from_keras."
            )

    # -- training -------------------------------------------------------------------------------

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Sequence[Any] | None = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: Mapping[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_freq: int | Sequence[int] = 1,
        *,
        distributed: bool | None = None,
        feature_cols: Any = None,
        label_cols: Any = None,
        weight_col: str | None = None,
        seed: int = 0,
    ) -> keras.callbacks.History:
        """Trains for some epochs, as `keras.Model.fit` does.

        Loss and metrics of an epoch are those of Keras on the same batches: sums over all rows of
        the epoch, as the weights were in each step. After each epoch the model holds the weights,
        for callbacks to look at, and the optimizer its slots, from which the next `fit` goes on.
        Those of `tf_keras.optimizers.legacy` start anew.

        Args:
            x: a `TFDataset` of rows `(x, y)` or `(x, y, sample_weight)`, a DataFrame, or arrays in
                the structure of the model's inputs.
            y: arrays of labels, with arrays only.
            batch_size: rows of a global batch, 32 where not given; a `TFDataset` has its own.
            epochs: number of the epoch after the last one.
            verbose: 0: silent, 1 or "auto": a progress bar, 2: a line per epoch.
            callbacks: of Keras, called between epochs, by the driver.
            validation_split: part of the rows that is kept for validation: of arrays the last
                ones, of a DataFrame random ones.
            validation_data: a `TFDataset`, a DataFrame with the same columns, or a tuple of arrays.
            shuffle: whether to draw rows at random; a `TFDataset` says so itself.
            class_weight: weight of each class, by its number.
            sample_weight: array, with arrays only.
            initial_epoch: number of the first epoch.
            steps_per_epoch: default: as many as use every row once.
            validation_freq: validate after every so many epochs, or after these.
            distributed: whether arrays, too, go to Spark.
            feature_cols, label_cols: of a DataFrame: names in the structure of inputs and labels.
            weight_col: of a DataFrame: the column of sample weights.
            seed: of the order of rows, and of `validation_split` of a DataFrame.

        Returns:
            The history, with `history.history` as of Keras.

        Raises:
            InvalidInputError: a callback that wants to be called for every batch; names it. Or
                one that has set weights between epochs.
            ProgramError: a metric that cannot be added over ranks; names it.
            TFSparkError: as of `TFOptimizer.optimize`. After every error the model holds the
                weights of the last good commit.
        """
        if not self._is_distributed(x, distributed):
            return self.model.fit(
                x,
                y,
                batch_size=batch_size,
                epochs=epochs,
                verbose=verbose,
                callbacks=callbacks,
                validation_split=validation_split,
                validation_data=validation_data,
                shuffle=shuffle,
                class_weight=class_weight,
                sample_weight=sample_weight,
                initial_epoch=initial_epoch,
                steps_per_epoch=steps_per_epoch,
                validation_freq=validation_freq,
            )
        for callback in callbacks or ():
            check_callback(callback, self._view)  # before anything is computed
        columns = _Columns(feature_cols, label_cols, weight_col)
        batching = {"batch_size": batch_size or BATCH_SIZE, "shuffle": shuffle, "seed": seed}
        if validation_split and validation_data is None:
            if isinstance(x, DataFrame):
                x, validation_data = x.randomSplit([1 - validation_split, validation_split], seed)
            elif isinstance(x, TFDataset):
                raise InvalidInputError(
                    "validation_split divides arrays or a DataFrame. Received: a TFDataset. Give "
                    "it validation rows, or pass validation_data=."
                )
            else:
                (x, y, sample_weight), validation_data = array_slicing.train_validation_split(
                    (x, y, sample_weight), validation_split=validation_split
                )
        dataset = _dataset(x, y, sample_weight, columns, batching)
        if class_weight:
            dataset = (
                dataset.validated_on(None)
                .map(_Weighted(class_weight))
                .validated_on(dataset.validation)
            )
        if validation_data is not None:
            parts = validation_data if isinstance(validation_data, tuple) else (validation_data,)
            val_x, val_y, val_weight = (*parts, None, None)[:3]
            held = _dataset(val_x, val_y, val_weight, columns, batching)
            dataset = dataset.validated_on(held)
        return self._fit(
            dataset,
            callbacks,
            verbose,
            range(initial_epoch, epochs),
            steps_per_epoch,
            validation_freq,
        )

    def _fit(
        self,
        dataset: TFDataset,
        callbacks: Sequence[Any] | None,
        verbose: Any,
        epochs: range,
        steps_per_epoch: int | None,
        validation_freq: int | Sequence[int],
    ) -> keras.callbacks.History:
        model, view = self.model, self._view
        front_end = KerasFrontEnd(model, dataset, tracks_metrics=True)
        check_additive(view, sums_from_keras(view, dataset.row_spec))
        optimizer = TFOptimizer(
            front_end, dataset, front_end.compiled_optimizer(), self._settings, remembers=True
        )
        try:
            optimizer.start()
            steps = steps_per_epoch or optimizer.steps_per_epoch
            called = callback_list(callbacks, view, verbose, epochs.stop, steps)
            model.stop_training = False
            trained = front_end.fingerprint()
            called.on_train_begin()
            logs, before = None, front_end.metric_sums()
            for epoch in epochs[optimizer.step // steps :]:
                called.on_epoch_begin(epoch)
                if front_end.fingerprint() != trained:
                    raise InvalidInputError(
                        "While a fit goes on, ranks hold the weights, and callbacks look at a "
                        f"copy. Received: weights that were set before epoch {epoch}, with the "
                        f"callbacks {', '.join(type(each).__name__ for each in callbacks or ())}. "
                        "End the fit there, and set them before the next one."
                    )
                last = MaxIteration((epoch - epochs.start + 1) * steps)
                validates = dataset.validation is not None and _validates(epoch, validation_freq)
                optimizer.optimize(last, None, last if validates else _NEVER)
                trained = front_end.fingerprint()
                after = front_end.metric_sums()
                added = [new - old for new, old in zip(after, before, strict=True)]
                logs, before = results_of(view, added), after
                if validates:
                    logs |= {f"val_{name}": value for name, value in optimizer.scores.items()}
                called.on_epoch_end(epoch, logs)
                if model.stop_training:
                    break
            called.on_train_end(logs)
        finally:
            optimizer.close()
        return model.history

    # -- evaluation and prediction --------------------------------------------------------------

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        sample_weight: Any = None,
        return_dict: bool = False,
        *,
        distributed: bool | None = None,
        feature_cols: Any = None,
        label_cols: Any = None,
        weight_col: str | None = None,
    ) -> Any:
        """Loss and metrics over all rows, as `keras.Model.evaluate` returns them.

        Args:
            x, y, sample_weight: see `fit`.
            batch_size: most rows of one call of the model.
            verbose: of Keras, with arrays.
            return_dict: by name; else a list in the order of Keras, or the loss alone.
            distributed, feature_cols, label_cols, weight_col: see `fit`.
        """
        if not self._is_distributed(x, distributed):
            return self.model.evaluate(
                x,
                y,
                batch_size=batch_size,
                verbose=verbose,
                sample_weight=sample_weight,
                return_dict=return_dict,
            )
        columns = _Columns(feature_cols, label_cols, weight_col)
        dataset = _dataset(x, y, sample_weight, columns, {"batch_size": batch_size or BATCH_SIZE})
        rows = batch_size or dataset.batch_per_thread or dataset.batch_size or BATCH_SIZE
        sums = sums_from_keras(self._view, dataset.row_spec)
        check_additive(self._view, sums)
        evaluate = evaluate_locally if self._settings.engine == "local" else evaluate_dataset
        found = results_of(self._view, evaluate(sums, dataset, rows))
        if return_dict:
            return found
        return list(found.values()) if len(found) > 1 else next(iter(found.values()))

    def predict(
        self,
        x: Any,
        batch_size: int | None = None,
        verbose: Any = "auto",
        *,
        distributed: bool | None = None,
        feature_cols: Any = None,
        output_cols: str | Sequence[str] = "prediction",
    ) -> Any:
        """What the model makes of each row.

        Args:
            x: a `TFDataset` (labels are left out), an RDD of rows, a DataFrame, or arrays.
            batch_size: most rows of one call of the model.
            verbose: of Keras, with arrays.
            distributed: whether arrays, too, go to Spark.
            feature_cols: of a DataFrame: names in the structure of the model's inputs.
            output_cols: names of the columns that a DataFrame gets, one per output.

        Returns:
            Of arrays: arrays. Of a `TFDataset` or an RDD: an RDD of arrays, one row each. Of a
            DataFrame: one with more columns, which is computed when it is used.
        """
        if not isinstance(x, RDD) and not self._is_distributed(x, distributed):
            return self.model.predict(x, batch_size=batch_size, verbose=verbose)
        rows = batch_size or BATCH_SIZE
        if isinstance(x, TFDataset):
            structure = x.row_spec.structure()
            spec = RowSpec.of(structure[0] if x.labelled else structure)
            rows = batch_size or x.batch_per_thread or x.batch_size or BATCH_SIZE
            return predict(prediction_from_keras(self.model, spec), x, batch_size=rows)
        if isinstance(x, (RDD, DataFrame)):
            return predict(
                prediction_from_keras(self.model),
                x,
                batch_size=rows,
                feature_cols=feature_cols,
                output_cols=output_cols,
            )
        dataset = TFDataset.from_ndarrays(x, batch_per_thread=rows)
        found = predict(
            prediction_from_keras(self.model, dataset.row_spec), dataset, batch_size=rows
        )
        return optree.tree_map(lambda *parts: np.stack(parts), *found.collect())

    # -- what Keras does by itself ----------------------------------------------------------------

    def train_on_batch(self, *arguments: Any, **keywords: Any) -> Any:
        """`keras.Model.train_on_batch`, in this process."""
        return self.model.train_on_batch(*arguments, **keywords)

    def test_on_batch(self, *arguments: Any, **keywords: Any) -> Any:
        """`keras.Model.test_on_batch`, in this process."""
        return self.model.test_on_batch(*arguments, **keywords)

    def predict_on_batch(self, x: Any) -> Any:
        """`keras.Model.predict_on_batch`, in this process."""
        return self.model.predict_on_batch(x)

    def get_weights(self) -> list[np.ndarray]:
        """The weights as arrays."""
        return self.model.get_weights()

    def set_weights(self, weights: Sequence[np.ndarray]) -> None:
        """Sets the weights."""
        self.model.set_weights(weights)

    def save_model(self, path: str, overwrite: bool = True) -> None:
        """Saves model, weights and compilation.

        Args:
            path: ends in `.keras` or `.h5`; a file or an fsspec URL.
            overwrite: whether a file that is there may be replaced.

        Raises:
            InvalidInputError: there is one, and it may not.
        """
        write_file(path, overwrite, self.model.save)

    @classmethod
    def load_model(
        cls,
        path: str,
        *,
        custom_objects: Mapping[str, Any] | None = None,
        safe_mode: bool = True,
        **settings: Any,
    ) -> KerasModel:
        """A model that was saved by `save_model` or by Keras.

        Args:
            path: a file or an fsspec URL.
            custom_objects: classes and functions by name.
            safe_mode: whether to refuse code that is stored in the file.
            **settings: see the class.
        """
        with fetched_file(path) as file:
            loaded = load_model(file, custom_objects, safe_mode=safe_mode)
        return cls(loaded, **settings)

    def save_weights(self, path: str, overwrite: bool = True) -> None:
        """Saves the weights.

        Args:
            path: ends in `.weights.h5`; a file or an fsspec URL.
            overwrite: whether a file that is there may be replaced.

        Raises:
            InvalidInputError: there is one, and it may not.
        """
        write_file(path, overwrite, self.model.save_weights)

    def load_weights(self, path: str) -> None:
        """Loads weights that `save_weights` has saved; of a file or an fsspec URL."""
        with fetched_file(path) as file:
            self.model.load_weights(file)

    def _is_distributed(self, x: Any, distributed: bool | None) -> bool:
        if isinstance(x, (TFDataset, DataFrame)):
            if distributed is False:
                raise InvalidInputError(
                    f"A {type(x).__name__} is used where its rows are. "
                    "Received: distributed=False. Use arrays, or engine='local'."
                )
            return True
        return bool(distributed)


class _Columns:
    """Which columns of a DataFrame are what."""

    def __init__(self, features: Any, labels: Any, weight: str | None):
        self.features, self.labels, self.weight = features, labels, weight


def _dataset(
    x: Any, y: Any, sample_weight: Any, columns: _Columns, batching: Mapping[str, Any]
) -> TFDataset:
    """The rows, whatever they come as."""
    if isinstance(x, (TFDataset, DataFrame)) and (y is not None or sample_weight is not None):
        raise InvalidInputError(
            f"The rows of a {type(x).__name__} hold their labels and weights. Received: y= or "
            "sample_weight= besides. Name columns, or make rows (x, y, sample_weight)."
        )
    if isinstance(x, TFDataset):
        return x
    if not isinstance(x, DataFrame):
        parts = [part for part in (x, y, sample_weight) if part is not None]
        return TFDataset.from_ndarrays(tuple(parts) if len(parts) > 1 else x, **batching)
    if columns.features is None:
        raise InvalidInputError(
            "Of a DataFrame it must be said which columns are features and labels. Received: no "
            f"feature_cols=; there are {', '.join(x.columns)}."
        )
    return TFDataset.from_dataframe(
        x, columns.features, columns.labels, weights_col=columns.weight, **batching
    )


class _Weighted:
    """Gives each row the weight of its class, as a function for `TFDataset.map`.

    Args:
        weights: by class; those not named weigh 1.
    """

    def __init__(self, weights: Mapping[int, float]):
        if not all(isinstance(each, (int, np.integer)) and each >= 0 for each in weights):
            raise InvalidInputError(
                f"class_weight has whole numbers of at least 0 as keys. Received: {[*weights]}."
            )
        self._table = np.ones(max(weights) + 1, np.float32)
        for each, weight in weights.items():
            self._table[each] = weight

    @tf.autograph.experimental.do_not_convert
    def __call__(self, x: Any, y: Any, sample_weight: Any = None) -> tuple[Any, Any, Any]:
        if sample_weight is not None:
            raise InvalidInputError(
                "Rows are weighted by class or one by one. Received: class_weight= for rows with "
                "sample weights."
            )
        labels = y
        if labels.shape.rank and labels.shape[-1] > 1:
            labels = tf.argmax(labels, axis=-1)  # one-hot
        labels = tf.cast(tf.reshape(labels, []), tf.int64)
        table = tf.constant(self._table)
        known = tf.logical_and(labels >= 0, labels < len(self._table))
        weight = tf.where(known, tf.gather(table, tf.where(known, labels, 0)), 1.0)
        return x, y, weight


def _validates(epoch: int, frequency: int | Sequence[int]) -> bool:
    if isinstance(frequency, int):
        return (epoch + 1) % frequency == 0
    return epoch + 1 in frequency
