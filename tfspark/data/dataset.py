"""`TFDataset`: the rows that a model is trained, evaluated or used on."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optree
from pyspark import SparkContext, StorageLevel
from pyspark.rdd import RDD

from tfspark.data.chunks import write_store, write_stores
from tfspark.data.failures import driver_errors
from tfspark.data.sources import ArraySource, RddSource, RecordSource, Source
from tfspark.data.spec import STRING, Field, RowSpec, declared, dtype_name, inferred
from tfspark.data.store import Handle, check_agreement
from tfspark.errors import DataError, InvalidInputError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from tfspark.data.mapping import RowMapping
    from tfspark.graphdef.pure import PureGraph


@dataclass(frozen=True)
class Materialised:
    """A data set whose rows lie in stores, one per rank.

    Attributes:
        handles: by rank.
        rdd: RDD of the handles, partition `r` holding that of rank `r`, persisted; its lineage
            rebuilds a lost store. None where the stores were written in this process.
    """

    handles: tuple[Handle, ...]
    rdd: RDD | None = None

    @property
    def rows_per_rank(self) -> tuple[int, ...]:
        """Rows in each store."""
        return tuple(handle.rows for handle in self.handles)

    def release(self) -> None:
        """Frees the handles, and removes the stores that lie on this machine.

        Those on other machines go with their executor's folder.
        """
        if self.rdd is not None:
            self.rdd.unpersist()
        for handle in self.handles:
            if handle.host == socket.gethostname():
                Path(handle.path).unlink(missing_ok=True)


@dataclass(frozen=True)
class Batching:
    """How rows become batches.

    Attributes:
        batch_size: rows of a global batch in training, over all ranks.
        batch_per_thread: rows of one call in evaluation and prediction.
        hard_code_batch_size: placeholders have the batch size as their first dimension.
        shuffle: draw rows at random, anew in every epoch.
        seed: of the order of rows, and of randomness in map().
    """

    batch_size: int | None
    batch_per_thread: int | None
    hard_code_batch_size: bool
    shuffle: bool
    seed: int

    @classmethod
    def of(
        cls,
        batch_size: int,
        batch_per_thread: int,
        hard_code_batch_size: bool = False,
        sequential_order: bool = False,
        shuffle: bool = True,
        seed: int = 0,
    ) -> Batching:
        """From the arguments of the constructors, where -1 means: not given."""
        given = {"batch_size": batch_size, "batch_per_thread": batch_per_thread}
        given = {name: value for name, value in given.items() if value not in (-1, None)}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise InvalidInputError(
                    f"A batch needs at least one row. Received: {name}={value!r}. "
                    "Pass a positive integer."
                )
        if len(given) == 2:
            raise InvalidInputError(
                "batch_size is for training, batch_per_thread for evaluation and prediction. "
                f"Received: both, {batch_size} and {batch_per_thread}. Pass one of them."
            )
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise InvalidInputError(f"A seed is an integer. Received: seed={seed!r}.")
        return cls(
            given.get("batch_size"),
            given.get("batch_per_thread"),
            bool(hard_code_batch_size),
            bool(shuffle) and not sequential_order,
            int(seed),
        )


class TFDataset:
    """Rows for TensorFlow, from an RDD, arrays, a DataFrame, tf.data or TFRecord files.

    Nothing is read before training starts, except, where shapes are not declared, the first row.
    A data set does not change; `map` returns a new one. Make it with one of the constructors.

    All of them share these arguments:

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
            batch_size: see the class.
            batch_per_thread: see the class.
            hard_code_batch_size: see the class.
            val_rdd: rows to validate on, in the same structure.
            features: structure of `(dtype, shape)`.
            labels: structure of `(dtype, shape)`, or None.
            memory_type: see the class.
            sequential_order: see the class.
            shuffle: see the class.
            seed: see the class.

        Raises:
            DataError: the declaration is not one; the RDD is empty and nothing is declared.
            InvalidInputError: a batch size is not positive, or both are given.

        Example:
            >>> dataset = TFDataset.from_rdd(  # doctest: +SKIP
            ...     rdd, names=["image", "label"], shapes=[[28, 28, 1], []],
            ...     types=[tf.float32, tf.int32], batch_size=320,
            ... )
        """
        _check_type("rdd", rdd, RDD)
        batching = _batching(locals())
        structure = _declared_rows(names, shapes, types, features, labels)
        spec = RowSpec.of(_first_row(rdd) if structure is None else structure)
        validation = None
        if val_rdd is not None:
            _check_type("val_rdd", val_rdd, RDD)
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
            batch_size: see the class.
            batch_per_thread: see the class.
            hard_code_batch_size: see the class.
            val_tensors: to validate on, in the same structure.
            memory_type: see the class.
            sequential_order: see the class.
            shuffle: see the class.
            seed: see the class.

        Raises:
            DataError: there is no row, or the arrays differ in their number of rows.
        """
        batching = _batching(locals())
        source = _arrays("tensors", tensors)
        validation = None
        if val_tensors is not None:
            held = _arrays("val_tensors", val_tensors)
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
        seed: int = 0,
    ) -> TFDataset:
        """Rows of a DataFrame, through Arrow. `columns.py` lists what column becomes what tensor.

        Args:
            df: the DataFrame.
            feature_cols: one column for one tensor, several for a list of tensors.
            labels_cols: likewise.
            batch_size: see the class.
            batch_per_thread: see the class.
            hard_code_batch_size: see the class.
            validation_df: rows to validate on, with the same columns.
            memory_type: see the class.
            sequential_order: see the class.
            shuffle: see the class.
            seed: see the class.

        Raises:
            DataError: a column is missing or of a type that cannot become a tensor. A null, or an
                array of another length, is found when training starts.
        """
        from pyspark.sql import DataFrame

        from tfspark.data.columns import DataFrameSource

        _check_type("df", df, DataFrame)
        batching = _batching(locals())
        structure = _columns_structure(feature_cols)
        if labels_cols is not None and len(labels_cols):
            structure = (structure, _columns_structure(labels_cols))
        source = DataFrameSource.of(df, structure)
        validation = None
        if validation_df is not None:
            held = DataFrameSource.of(validation_df, structure)
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
            batch_size: see the class.
            batch_per_thread: see the class.
            hard_code_batch_size: see the class.
            validation_dataset: to validate on; like `dataset`.
            memory_type: see the class.
            sequential_order: see the class.
            shuffle: see the class.
            auto_shard_files: let tf.data shard by files where it finds enough of them, so that
                not every rank reads all.
            seed: see the class; also seeds operations of the data set that have no seed.

        Raises:
            DataError: the data set is infinite, runs Python code (py_function, from_generator),
                or its elements are not dense tensors.
        """
        batching = _batching(locals())
        source = _tf_data(dataset, auto_shard_files, batching.seed)
        validation = None
        if validation_dataset is not None:
            held = _tf_data(validation_dataset, auto_shard_files, batching.seed)
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
            batch_size: see the class.
            batch_per_thread: see the class.
            hard_code_batch_size: see the class.
            validation_file_path: to validate on.
            memory_type: see the class.
            sequential_order: see the class.
            shuffle: see the class.
            features: `{name: tf.io.FixedLenFeature}` to parse `tf.train.Example`s into dicts;
                without it a row is the record's bytes, for `map` to parse.
            seed: see the class.

        Raises:
            DataError: there is no such file, or a feature has no fixed length.
        """
        from tfspark.data.records import TFRecordReader, feature_fields, find_files

        batching = _batching(locals())
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
        return cls._of_strings("text", string_rdd, validation_string_rdd, _batching(locals()))

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
        return cls._of_strings("record", bytes_rdd, validation_bytes_rdd, _batching(locals()))

    @classmethod
    def _of_strings(
        cls, name: str, rdd: RDD, validation_rdd: RDD | None, batching: Batching
    ) -> TFDataset:
        _check_type("the RDD", rdd, RDD)
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

    # ---- materialising --------------------------------------------------------------------------

    @cached_property
    def _id(self) -> str:
        return uuid.uuid4().hex[:12]

    def materialise(self, sc: SparkContext, num_ranks: int) -> Materialised:
        """Writes one store per rank on the executors.

        Args:
            sc: the SparkContext.
            num_ranks: N.

        Raises:
            DataError: there is no row, or a row breaks its declaration.
            UserFunctionError: a function of the user that computes rows raised.
        """
        with driver_errors():
            rdd = write_stores(self._source.chunks(sc, num_ranks), self.spec, self._id)
            rdd.persist(StorageLevel.MEMORY_AND_DISK)  # of one executor, like the stores
            handles = tuple(rdd.collect())
        result = Materialised(handles, rdd)
        try:
            self._check(handles)
        except DataError:
            result.release()
            raise
        return result

    def materialise_local(self, num_ranks: int) -> Materialised:
        """Writes one store per rank in this process, with the same rows as `materialise`.

        Args:
            num_ranks: N.

        Raises:
            DataError: there is no row, or a row breaks its declaration.
            UserFunctionError: a function of the user that computes rows raised.
        """
        name = f"local-{self._id}"
        handles: list[Handle] = []
        for rank, chunks in self._source.local_chunks(num_ranks):
            while len(handles) < rank:
                handles.append(write_store(self.spec, (), len(handles), name))
            handles.append(write_store(self.spec, chunks, rank, name))
        while len(handles) < num_ranks:
            handles.append(write_store(self.spec, (), len(handles), name))
        self._check(handles)
        return Materialised(tuple(handles))

    def _check(self, handles: Sequence[Handle]) -> None:
        if not any(handle.rows for handle in handles):
            raise DataError(
                "A data set needs at least one row. Received: none in "
                f"{self.get_num_partitions()} partitions. Check the filters and joins that made "
                "it, and the paths it is read from."
            )
        check_agreement(handles)


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


def _batching(arguments: Mapping[str, Any]) -> Batching:
    """The batching that a constructor's arguments ask for."""
    memory_type = arguments["memory_type"]
    if not isinstance(memory_type, str):
        raise InvalidInputError(f"memory_type is a string. Received: {memory_type!r}.")
    names = "batch_size batch_per_thread hard_code_batch_size sequential_order shuffle seed"
    return Batching.of(**{name: arguments[name] for name in names.split()})


def _declared_rows(names: Any, shapes: Any, types: Any, features: Any, labels: Any) -> Any:
    """The structure of fields that `from_rdd` was given, or None."""
    by_lists = names is not None or shapes is not None or types is not None
    if by_lists and (features is not None or labels is not None):
        raise DataError(
            "Rows are declared by names, shapes and types, or by features and labels. "
            "Received: some of both. Leave one of them out."
        )
    if labels is not None and features is None:
        raise DataError("Labels need features beside them. Received: labels without features.")
    if features is not None:
        if labels is None:
            return declared(features, "features")
        return declared(features, "features"), declared(labels, "labels")
    if not by_lists:
        return None
    counts = {len(given) for given in (names, shapes, types) if given is not None}
    if len(counts) != 1 or shapes is None:
        raise DataError(
            "names, shapes and types have one entry per element of a row, and shapes are needed. "
            f"Received: names={names!r}, shapes={shapes!r}, types={types!r}."
        )
    (count,) = counts
    names = names or [f"input_{index}" for index in range(count)]
    types = types or ["float32"] * count
    return tuple(
        declared((dtype_name(dtype), shape), name)
        for name, shape, dtype in zip(names, shapes, types, strict=True)
    )


def _first_row(rdd: RDD) -> Any:
    with driver_errors():
        rows = rdd.take(1)
    if not rows:
        raise DataError(
            "A data set needs at least one row. Received: an empty RDD. Check the filters and "
            "joins that made it, or declare the rows with names, shapes and types."
        )
    (row,) = rows
    if isinstance(row, (tuple, list)) and len(row) in (2, 3) and _has_arrays(row):
        prefixes = ("features", "labels", "weights")
        return tuple(inferred(part, name) for part, name in zip(row, prefixes, strict=False))
    return inferred(row)


def _has_arrays(row: Any) -> bool:
    return isinstance(row, tuple) or any(hasattr(part, "dtype") for part in row)


def _arrays(argument: str, tensors: Any) -> ArraySource:
    def is_array(node: Any) -> bool:
        if isinstance(node, list):
            return not any(
                hasattr(item, "dtype") or isinstance(item, (list, tuple)) for item in node
            )
        return not isinstance(node, (tuple, dict))

    leaves, treedef = optree.tree_flatten(tensors, is_leaf=is_array, none_is_leaf=True)
    arrays = tuple(np.asarray(leaf) for leaf in leaves)
    lengths = sorted({len(array) if array.ndim else -1 for array in arrays})
    if len(lengths) != 1 or lengths[0] < 0:
        raise DataError(
            f"The arrays of {argument} need one first dimension: their rows. "
            f"Received: shapes {', '.join(str(list(array.shape)) for array in arrays)}."
        )
    if lengths == [0]:
        raise DataError(f"A data set needs at least one row. Received: {argument} of 0 rows.")
    structure = optree.tree_unflatten(treedef, [_RowOf(array) for array in arrays])
    if isinstance(structure, tuple) and len(structure) in (2, 3):
        prefixes = ("features", "labels", "weights")
        fields: Any = tuple(
            declared(part, name) for part, name in zip(structure, prefixes, strict=False)
        )
    else:
        fields = declared(structure)
    return ArraySource(arrays, RowSpec.of(fields))


@dataclass(frozen=True)
class _RowOf:
    """What one row of an array declares."""

    array: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape[1:]


def _tf_data(dataset: Any, auto_shard_files: bool, seed: int) -> RecordSource:
    from tensorflow.python.eager import context

    from tfspark.data.records import FunctionReader, GraphReader, element_spec_of, serialised

    if callable(dataset):
        with context.eager_mode():
            spec = element_spec_of(dataset(1, 0))
        return RecordSource(FunctionReader(dataset), spec)
    spec = element_spec_of(dataset)
    reader = GraphReader(serialised(dataset, seed), dataset.element_spec, auto_shard_files)
    return RecordSource(reader, spec)


def _columns_structure(columns: str | Sequence[str]) -> Any:
    names = [columns] if isinstance(columns, str) else list(columns)
    if not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"Columns are given by their names. Received: {columns!r}.")
    return names[0] if len(names) == 1 else names


def _check_type(argument: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise InvalidInputError(
            f"{argument} must be of type {kind.__name__}. Received: {type(value).__name__}."
        )
