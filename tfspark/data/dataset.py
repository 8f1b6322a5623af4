"""`TFDataset`: the rows that a model is trained, evaluated or used on."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pyspark import SparkContext
from pyspark.rdd import RDD

from tfspark.data.arguments import (
    array_source,
    check_type,
    columns_structure,
    declared_rows,
    first_row,
    tf_data_source,
)
from tfspark.data.batching import Batching, batching_of
from tfspark.data.materialised import Materialised, materialise, materialise_local
from tfspark.data.sources import ArraySource, RddSource, RecordSource, Source
from tfspark.data.spec import STRING, Field, RowSpec
from tfspark.errors import DataError, InvalidInputError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from tfspark.data.mapping import RowMapping
    from tfspark.graphdef.pure import PureGraph


class TFDataset:
    """Rows for TensorFlow, from an RDD, arrays, a DataFrame, tf.data or TFRecord files.

    Nothing is read before training starts, except, where shapes are not declared, the first row.
    A data set does not change; `map` returns a new one. Make it with one of the constructors.

    All of them share these arguments, which their own pages do not repeat:

    * `batch_size`: rows of a global batch in training, any positive number. Every row is used once
      per epoch; the last batch may have fewer rows.
    * `batch_per_thread`: rows of one call in evaluation and prediction. Not together with
      `batch_size`.
    * `hard_code_batch_size`: make the batch size the first dimension of the placeholders. Training
      may still use smaller last batches, so use it only for graphs that cannot do without.
    * `memory_type`: accepted for scripts written for Analytics Zoo, and without effect: rows are
      memory-mapped from local disk.
    * `sequential_order=True` or `shuffle=False`: read rows in their order.
    * `seed`: of the order of rows and of randomness in `map`.

    Attributes:
        spec: of the rows as they are stored.
        row_spec: of the rows after `map`.
        batch_size, batch_per_thread: None where not given.
        shuffle, seed: of the order.
        validation: the data set to validate on, or None.

    Example:
        >>> dataset = TFDataset.from_ndarrays(
        ...     (np.zeros((8, 2), np.float32), np.zeros(8, np.int32)), batch_size=4
        ... )
        >>> dataset.row_spec.names, dataset.row_spec.fields[0].shape
        (('features', 'labels'), (2,))
    """

    def __init__(
        self,
        source: Source,
        batching: Batching,
        validation: TFDataset | None = None,
        mapping: RowMapping | None = None,
    ):
        self._source = source
        self._batching = batching
        self._row_mapping = mapping
        self.validation = validation

    # ---- constructors ---------------------------------------------------------------------------

    @classmethod
    def from_rdd(
        cls,
        rdd: RDD,
        names: Sequence[str] | None = None,
        shapes: Sequence[Sequence[int | None]] | None = None,
        types: Sequence[Any] | None = None,
        batch_size: int = -1,
        batch_per_thread: int = -1,
        hard_code_batch_size: bool = False,
        val_rdd: RDD | None = None,
        features: Any = None,
        labels: Any = None,
        memory_type: str = "DRAM",
        sequential_order: bool = False,
        shuffle: bool = True,
        *,
        seed: int = 0,
    ) -> TFDataset:
        """Rows of an RDD.

        Declare the rows by `names`, `shapes` and `types`, one entry per element of a row, or by
        `features` and `labels`, structures of `(dtype, shape)`. Without either, the first row
        says what all others must look like. A row is a tuple or list of the named elements, or
        `(features, labels)`, or the features alone where there are no labels.

        Args:
            rdd: of rows: arrays, numbers, text, bytes, and tuples, lists and dicts of these.
            names: of the elements; `input_0` … where not given.
            shapes: of the elements, without the batch dimension. None in a shape stands for the
                size that the first row has.
            types: dtypes of the elements; float32 where not given.
            val_rdd: rows to validate on, in the same structure.
            features: structure of `(dtype, shape)`.
            labels: structure of `(dtype, shape)`, or None.

        Raises:
            DataError: the declaration is not one; the RDD is empty and nothing is declared.
            InvalidInputError: a batch size is not positive, or both are given.

        Example:
            >>> dataset = TFDataset.from_rdd(  # doctest: +SKIP
            ...     rdd, names=["image", "label"], shapes=[[28, 28, 1], []],
            ...     types=[tf.float32, tf.int32], batch_size=320,
            ... )
        """
        check_type("rdd", rdd, RDD)
        batching = batching_of(locals())
        structure = declared_rows(names, shapes, types, features, labels)
        spec = RowSpec.of(first_row(rdd) if structure is None else structure)
        validation = None
        if val_rdd is not None:
            check_type("val_rdd", val_rdd, RDD)
            validation = cls(RddSource(val_rdd, spec), batching)
        return cls(RddSource(rdd, spec), batching, validation)

    @classmethod
    def from_ndarrays(
        cls,
        tensors: Any,
        batch_size: int = -1,
        batch_per_thread: int = -1,
        hard_code_batch_size: bool = False,
        val_tensors: Any = None,
        memory_type: str = "DRAM",
        sequential_order: bool = False,
        shuffle: bool = True,
        *,
        seed: int = 0,
    ) -> TFDataset:
        """Rows of NumPy arrays; needs no Spark with the engine `local`.

        Args:
            tensors: a structure of arrays `[rows, *shape]`; `(features, labels)` where there are
                labels. Rank `r` of `N` gets the r-th of N equal slices.
            val_tensors: to validate on, in the same structure.

        Raises:
            DataError: there is no row, or the arrays differ in their number of rows.
        """
        batching = batching_of(locals())
        source = array_source("tensors", tensors)
        validation = None
        if val_tensors is not None:
            held = array_source("val_tensors", val_tensors)
            if held.spec.treedef != source.spec.treedef:
                raise DataError(
                    "val_tensors must have the structure of tensors. "
                    f"Received: {held.spec.treedef} instead of {source.spec.treedef}."
                )
            validation = cls(ArraySource(held.arrays, source.spec), batching)
        return cls(source, batching, validation)

    @classmethod
    def from_dataframe(
        cls,
        df: DataFrame,
        feature_cols: str | Sequence[str],
        labels_cols: str | Sequence[str] | None = None,
        batch_size: int = -1,
        batch_per_thread: int = -1,
        hard_code_batch_size: bool = False,
        validation_df: DataFrame | None = None,
        memory_type: str = "DRAM",
        sequential_order: bool = False,
        shuffle: bool = True,
        *,
        weights_col: str | None = None,
        num_classes: Mapping[str, int] | None = None,
        seed: int = 0,
    ) -> TFDataset:
        """Rows of a DataFrame, through Arrow. `columns.py` lists what column becomes what tensor.

        Args:
            df: the DataFrame.
            feature_cols: one column for one tensor, several for a list of tensors.
            labels_cols: likewise.
            weights_col: of sample weights; goes with labels.
            num_classes: how many classes there are, by column of labels: another number than of
                one of them, from 0, is refused when training starts.
            validation_df: rows to validate on, with the same columns.

        Raises:
            DataError: a column is missing or of a type that cannot become a tensor. A null, or an
                array of another length, is found when training starts.
        """
        from pyspark.sql import DataFrame

        from tfspark.data.columns import DataFrameSource

        check_type("df", df, DataFrame)
        batching = batching_of(locals())
        structure = columns_structure(feature_cols)
        if labels_cols is not None and len(labels_cols):
            structure = (structure, columns_structure(labels_cols))
        if weights_col is not None:
            if not isinstance(structure, tuple):
                raise DataError(
                    "Sample weights weight losses of labels. "
                    f"Received: weights_col={weights_col!r} without labels_cols."
                )
            structure = (*structure, weights_col)
        source = DataFrameSource.of(df, structure, num_classes)
        validation = None
        if validation_df is not None:
            held = DataFrameSource.of(validation_df, structure, num_classes)
            validation = cls(replace(held, spec=source.spec), batching)
        return cls(source, batching, validation)

    @classmethod
    def from_tf_data_dataset(
        cls,
        dataset: Any,
        batch_size: int = -1,
        batch_per_thread: int = -1,
        hard_code_batch_size: bool = False,
        validation_dataset: Any = None,
        memory_type: str = "DRAM",
        sequential_order: bool = False,
        shuffle: bool = True,
        auto_shard_files: bool = False,
        *,
        seed: int = 0,
    ) -> TFDataset:
        """Rows of a tf.data data set: its elements, so do not batch it.

        Args:
            dataset: a `tf.data.Dataset`, whose graph is shipped to the executors, where rank `r`
                of `N` keeps every N-th element; or a function `build(num_shards, index)` that
                returns the elements of one rank, and is called there.
            validation_dataset: to validate on; like `dataset`.
            auto_shard_files: let tf.data shard by files where it finds enough of them, so that
                not every rank reads all.
            seed: also seeds operations of the data set that have no seed.

        Raises:
            DataError: the data set is infinite, runs Python code (py_function, from_generator),
                or its elements are not dense tensors.
        """
        batching = batching_of(locals())
        source = tf_data_source(dataset, auto_shard_files, batching.seed)
        validation = None
        if validation_dataset is not None:
            held = tf_data_source(validation_dataset, auto_shard_files, batching.seed)
            validation = cls(replace(held, spec=source.spec), batching)
        return cls(source, batching, validation)

    @classmethod
    def from_tfrecord_file(
        cls,
        sc: SparkContext | None,
        file_path: str | Sequence[str],
        batch_size: int = -1,
        batch_per_thread: int = -1,
        hard_code_batch_size: bool = False,
        validation_file_path: str | Sequence[str] | None = None,
        memory_type: str = "DRAM",
        sequential_order: bool = False,
        shuffle: bool = True,
        *,
        features: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> TFDataset:
        """Records of TFRecord files on any file system that TensorFlow reads.

        Args:
            sc: accepted for scripts written for Analytics Zoo, and without effect.
            file_path: a file, a folder, a glob pattern, or a list of these; every executor must
                reach them. Files are dealt to ranks; with fewer files than ranks, records are.
            validation_file_path: to validate on.
            features: `{name: tf.io.FixedLenFeature}` to parse `tf.train.Example`s into dicts;
                without it a row is the record's bytes, for `map` to parse.

        Raises:
            DataError: there is no such file, or a feature has no fixed length.
        """
        from tfspark.data.records import TFRecordReader, feature_fields, find_files

        batching = batching_of(locals())
        spec = RowSpec.of(feature_fields(features))
        source = RecordSource(TFRecordReader(find_files(file_path), features), spec)
        validation = None
        if validation_file_path is not None:
            reader = TFRecordReader(find_files(validation_file_path), features)
            validation = cls(RecordSource(reader, spec), batching)
        return cls(source, batching, validation)

    @classmethod
    def from_string_rdd(
        cls,
        string_rdd: RDD,
        batch_size: int = -1,
        batch_per_thread: int = -1,
        hard_code_batch_size: bool = False,
        validation_string_rdd: RDD | None = None,
        memory_type: str = "DRAM",
        sequential_order: bool = False,
        shuffle: bool = True,
        *,
        seed: int = 0,
    ) -> TFDataset:
        """Rows of text: one string tensor of shape `[]`, UTF-8. For arguments see the class."""
        return cls._of_strings("text", string_rdd, validation_string_rdd, batching_of(locals()))

    @classmethod
    def from_bytes_rdd(
        cls,
        bytes_rdd: RDD,
        batch_size: int = -1,
        batch_per_thread: int = -1,
        hard_code_batch_size: bool = False,
        validation_bytes_rdd: RDD | None = None,
        memory_type: str = "DRAM",
        sequential_order: bool = False,
        shuffle: bool = True,
        *,
        seed: int = 0,
    ) -> TFDataset:
        """Rows of bytes: one string tensor of shape `[]`. For arguments see the class."""
        return cls._of_strings("record", bytes_rdd, validation_bytes_rdd, batching_of(locals()))

    @classmethod
    def _of_strings(
        cls, name: str, rdd: RDD, validation_rdd: RDD | None, batching: Batching
    ) -> TFDataset:
        check_type("the RDD", rdd, RDD)
        spec = RowSpec.of(Field(name, STRING, ()))
        validation = None
        if validation_rdd is not None:
            validation = cls(RddSource(validation_rdd, spec), batching)
        return cls(RddSource(rdd, spec), batching, validation)

    # ---- what it is -----------------------------------------------------------------------------

    @property
    def spec(self) -> RowSpec:
        """Of the rows as they are stored."""
        return self._source.spec

    @property
    def row_spec(self) -> RowSpec:
        """Of the rows after `map`; what programs see."""
        return self.spec if self._row_mapping is None else self._row_mapping.target

    @property
    def mapping(self) -> PureGraph | None:
        """The functions given to `map` as one graph over batches, or None."""
        return None if self._row_mapping is None else self._row_mapping.batch

    @property
    def batch_size(self) -> int | None:
        """Rows of a global batch in training."""
        return self._batching.batch_size

    @property
    def batch_per_thread(self) -> int | None:
        """Rows of one call in evaluation and prediction."""
        return self._batching.batch_per_thread

    @property
    def shuffle(self) -> bool:
        """Whether rows are drawn at random."""
        return self._batching.shuffle

    @property
    def seed(self) -> int:
        """Of the order of rows and of randomness in `map`."""
        return self._batching.seed

    @property
    def labelled(self) -> bool:
        """Whether a row is `(features, labels)` or `(features, labels, sample_weight)`."""
        structure = self.row_spec.structure()
        return isinstance(structure, tuple) and len(structure) in (2, 3)

    def get_num_partitions(self) -> int:
        """Partitions of the rows as they were given; 1 where Spark does not compute them."""
        return self._source.num_partitions

    def map(self, map_fn: Callable[..., Any]) -> TFDataset:
        """A data set with a function applied to every row, each time it is read.

        Args:
            map_fn: as for `tf.data.Dataset.map`: gets a row in its structure, a tuple's elements
                as separate arguments, and returns a structure of tensors. It runs on the
                executors as a graph. Random operations in it draw anew in every epoch, and are a
                function of seed, epoch and row. It is applied to the validation set too.

        Raises:
            DataError: it calls Python code in every row (py_function), keeps a state, or its
                tensors have no fixed shape.

        Example:
            >>> import tensorflow as tf
            >>> dataset = TFDataset.from_ndarrays(np.zeros((8, 2), np.uint8), batch_size=4)
            >>> scaled = dataset.map(lambda pixels: tf.cast(pixels, tf.float32) / 255)
            >>> scaled.row_spec.fields[0].dtype
            'float32'
        """
        from tfspark.data.mapping import RowMapping

        mapping = self._row_mapping or RowMapping.identity(self.spec)
        validation = None if self.validation is None else self.validation.map(map_fn)
        return TFDataset(self._source, self._batching, validation, mapping.then(map_fn))

    # ---- placeholders for graph scripts ---------------------------------------------------------

    @property
    def tensors(self) -> Any:
        """Placeholders `[batch, *shape]` in the structure of a row, in the current graph.

        The same ones whenever they are asked for in one graph.

        Raises:
            InvalidInputError: eager execution is on and no graph is the default.
        """
        import tensorflow as tf

        if tf.executing_eagerly():
            raise InvalidInputError(
                "The tensors of a data set are placeholders of a graph. Received: eager execution, "
                "where there is none. Write `with tf.Graph().as_default():` around the script, or "
                "call tf.compat.v1.disable_eager_execution() first."
            )
        graph = tf.compat.v1.get_default_graph()
        known = _placeholders(graph)
        if self not in known:
            known[self] = [self._placeholder(field) for field in self.row_spec.fields]
        return self.row_spec.unflatten(known[self])

    @property
    def feature_tensors(self) -> Any:
        """The placeholders of the features."""
        return self.tensors[0] if self.labelled else self.tensors

    @property
    def label_tensors(self) -> Any:
        """The placeholders of the labels, or None."""
        return self.tensors[1] if self.labelled else None

    def _placeholder(self, field: Field) -> Any:
        import tensorflow as tf

        batch = self._batching
        rows = batch.batch_size or batch.batch_per_thread if batch.hard_code_batch_size else None
        return tf.compat.v1.placeholder(field.dtype, [rows, *field.shape], name=field.name)

    def validated_on(self, validation: TFDataset | None) -> TFDataset:
        """A data set of the same rows with another one, or none, to validate on."""
        return TFDataset(self._source, self._batching, validation, self._row_mapping)

    # ---- materialising --------------------------------------------------------------------------

    @cached_property
    def _id(self) -> str:
        return uuid.uuid4().hex[:12]

    def materialise(
        self, sc: SparkContext, num_ranks: int, shares_files: bool = False
    ) -> Materialised:
        """Writes one store per rank on the executors.

        Args:
            sc: the SparkContext.
            num_ranks: N.
            shares_files: whether executors read the files of this process, as in an embedded
                Spark: then rows that lie here need not travel.

        Raises:
            DataError: there is no row, or a row breaks its declaration.
            UserFunctionError: a function of the user that computes rows raised.
        """
        return materialise(self._source, self._id, sc, num_ranks, shares_files)

    def partitions(self, sc: SparkContext) -> RDD:
        """RDD of chunks of all rows as stored; lazy, and nothing is kept.

        They are in their order, but for tf.data and TFRecord: each partition reads a share.

        Args:
            sc: the SparkContext.
        """
        return self._source.partitions(sc)

    def local_chunks(self) -> Iterator[bytes]:
        """Chunks of all rows as stored, in their order, in this process."""
        for _, chunks in self._source.local_chunks(1):
            yield from chunks

    def materialise_local(self, num_ranks: int) -> Materialised:
        """Writes one store per rank in this process, with the same rows as `materialise`.

        Args:
            num_ranks: N.

        Raises:
            DataError: there is no row, or a row breaks its declaration.
            UserFunctionError: a function of the user that computes rows raised.
        """
        return materialise_local(self._source, self._id, num_ranks)


def dataset_of(tensor: Any) -> tuple[TFDataset, int] | None:
    """The data set that a placeholder belongs to, and the index of its field; or None.

    Args:
        tensor: of any graph.
    """
    for dataset, placeholders in _placeholders(tensor.graph).items():
        for index, placeholder in enumerate(placeholders):
            if placeholder is tensor:
                return dataset, index
    return None


def _placeholders(graph: Any) -> dict[TFDataset, list[Any]]:
    # On the graph, so that they go when it goes. A graph collection would do too, but every Saver
    # would warn that it cannot write it.
    if not hasattr(graph, "_tfspark_placeholders"):
        graph._tfspark_placeholders = {}
    return graph._tfspark_placeholders
