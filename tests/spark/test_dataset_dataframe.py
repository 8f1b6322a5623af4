"""DataFrames against the rows that Spark itself collects."""

import datetime
from decimal import Decimal

import numpy as np
import pytest
from pyspark.ml.linalg import Vectors
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from tfspark.data.dataset import TFDataset
from tfspark.data.store import Store
from tfspark.errors import DataError


@pytest.fixture
def spark(sc):
    return SparkSession(sc)


def read(dataset, sc, num_ranks=1):
    """The rows of all ranks as one array per field, by name."""
    handles = dataset.materialise(sc, num_ranks).handles
    parts = [Store.open(handle).read_range(0, handle.rows) for handle in handles]
    names = dataset.spec.names
    return {
        name: np.concatenate([p[i] for p in parts if len(p[i])]) for i, name in enumerate(names)
    }


def test_every_type_of_column(spark, sc):
    noon = datetime.datetime(2024, 5, 6, 12, 0, 0, 7, tzinfo=datetime.timezone.utc)
    schema = T.StructType(
        [
            T.StructField("flag", T.BooleanType()),
            T.StructField("byte", T.ByteType()),
            T.StructField("short", T.ShortType()),
            T.StructField("int", T.IntegerType()),
            T.StructField("long", T.LongType()),
            T.StructField("float", T.FloatType()),
            T.StructField("double", T.DoubleType()),
            T.StructField("text", T.StringType()),
            T.StructField("raw", T.BinaryType()),
            T.StructField("day", T.DateType()),
            T.StructField("time", T.TimestampType()),
            T.StructField("matrix", T.ArrayType(T.ArrayType(T.FloatType()))),
            T.StructField("words", T.ArrayType(T.StringType())),
        ]
    )
    times = (datetime.date(1970, 1, 3), noon)
    rows = [
        (
            i % 2 == 0,
            i,
            -i,
            i,
            2**40 + i,
            i / 2,
            i / 3,
            f"é{i}",
            bytes([0, i]),
            *times,
            [[1.0 * i, 2.0]] * 3,
            ["a", f"{i}"],
        )
        for i in range(7)
    ]
    frame = spark.createDataFrame(rows, schema).coalesce(1)
    columns = read(TFDataset.from_dataframe(frame, schema.names), sc)
    dtypes = {name: values.dtype for name, values in columns.items()}
    assert [dtypes[n] for n in schema.names[:7]] == [
        np.dtype(n) for n in ("bool", "i1", "i2", "i4", "i8", "f4", "f8")
    ]
    for index, name in enumerate(schema.names[:7]):
        expected = [row[index] for row in rows]
        assert columns[name].tolist() == np.array(expected, dtypes[name]).tolist()
    assert columns["text"].tolist() == [f"é{i}".encode() for i in range(7)]
    assert columns["raw"].tolist() == [bytes([0, i]) for i in range(7)]
    assert columns["day"].tolist() == [2] * 7 and dtypes["day"] == np.int32
    assert columns["time"].tolist() == [int(noon.timestamp()) * 10**6 + 7] * 7
    assert columns["matrix"].shape == (7, 3, 2) and columns["matrix"][4, 0, 0] == 4
    assert columns["words"].tolist()[3] == [b"a", b"3"]


def test_vectors_and_structs(spark, sc):
    frame = spark.createDataFrame(
        [
            (Vectors.dense([1.0, 2.0, 3.0]), ("a", Vectors.dense([0.5])), 0),
            (Vectors.sparse(3, {1: 5.0}), ("b", Vectors.sparse(1, {})), 1),
        ],
        T.StructType(
            [
                T.StructField("v", Vectors.dense([1.0]).__UDT__),
                T.StructField(
                    "s",
                    T.StructType(
                        [
                            T.StructField("z", T.StringType()),
                            T.StructField("b", Vectors.dense([1.0]).__UDT__),
                        ]
                    ),
                ),
                T.StructField("y", T.LongType()),
            ]
        ),
    ).coalesce(1)
    dataset = TFDataset.from_dataframe(frame, ["v", "s"], "y", batch_size=2)
    structure = dataset.spec.structure()
    assert isinstance(structure, tuple) and isinstance(structure[0], list)
    assert set(structure[0][1]) == {"b", "z"} and structure[0][0].shape == (3,)
    columns = read(dataset, sc)
    assert columns["v"].tolist() == [[1, 2, 3], [0, 5, 0]]
    assert columns["s.z"].tolist() == [b"a", b"b"] and columns["s.b"].tolist() == [[0.5], [0]]
    assert columns["y"].tolist() == [0, 1]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_all_rows_arrive_whatever_the_partitions(spark, sc, num_ranks):
    frame = spark.range(0, 1000, 1, 2).withColumn("x", F.col("id") * 2)
    columns = read(TFDataset.from_dataframe(frame, "x", "id"), sc, num_ranks)
    assert sorted(columns["id"].tolist()) == list(range(1000))
    assert (columns["x"] == 2 * columns["id"]).all()


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("if(id = 70, null, id)", "null in 'x'.*na.drop"),
        ("if(id = 70, array(1), array(1, 2))", "1 elements in 'x' instead of 2.*Pad or cut"),
        ("array(id, if(id = 70, null, 1))", "null in 'x'"),
        ("if(id = 70, null, named_struct('a', 1))", "null in 'x.a'"),
    ],
)
def test_rows_that_break_the_declaration(spark, sc, expression, message, num_ranks):
    frame = spark.range(0, 100, 1, 2).withColumn("x", F.expr(expression))
    with pytest.raises(DataError, match="(?s)" + message) as caught:
        TFDataset.from_dataframe(frame, "x").materialise(sc, num_ranks)
    assert (caught.value.partition, caught.value.row) == (1, 20)


def test_columns_that_cannot_be_tensors(spark, sc):
    schema = "amount decimal(9,2), pairs map<string,int>"
    frame = spark.createDataFrame([(Decimal("1.50"), {"a": 1})], schema)
    with pytest.raises(DataError, match=r'decimal\(9,2\) in \'amount\'.*cast\("double"\)'):
        TFDataset.from_dataframe(frame, "amount")
    with pytest.raises(DataError, match="map<string,int> in 'pairs'"):
        TFDataset.from_dataframe(frame, "pairs")
    with pytest.raises(DataError, match="'price', which is not among amount, pairs"):
        TFDataset.from_dataframe(frame, "price")


def test_an_empty_frame(spark, sc):
    frame = spark.createDataFrame([], "x array<float>")
    with pytest.raises(DataError, match="at least one row"):
        TFDataset.from_dataframe(frame, "x").materialise(sc, 2)


def test_validation_has_the_same_columns(spark, sc):
    frame = spark.range(5)
    dataset = TFDataset.from_dataframe(frame, "id", batch_size=2, validation_df=frame.limit(2))
    assert dataset.validation.spec == dataset.spec
    assert sorted(read(dataset.validation, sc)["id"].tolist()) == [0, 1]
