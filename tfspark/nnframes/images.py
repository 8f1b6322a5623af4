"""`NNImageReader`: files of images as a DataFrame."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyspark import SparkContext
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import types as T

from tfspark.data.failures import reporting
from tfspark.errors import DataError, InvalidInputError
from tfspark.nnframes.features import IMAGE_SCHEMA

PHASE = "images"

_MODES = {1: 0, 3: 16, 4: 24}
"""OpenCV's numbers of types with so many channels of bytes: CV_8UC1, CV_8UC3, CV_8UC4."""

_CHANNELS = {-1: 0, 0: 1, 1: 3}
"""By `image_codec`: channels that TensorFlow decodes into; 0: as they are."""

_ARROW = pa.struct(
    [
        ("origin", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("nChannels", pa.int32()),
        ("mode", pa.int32()),
        ("data", pa.binary()),
    ]
)


class NNImageReader:
    """Reads images as a DataFrame that `NNEstimator`, `NNModel` and Spark ML take."""

    @staticmethod
    def readImages(
        path: str | Sequence[str],
        sc: SparkContext | None = None,
        minPartitions: int = 1,
        resizeH: int = -1,
        resizeW: int = -1,
        image_codec: int = -1,
        *,
        dropInvalid: bool = False,
    ) -> DataFrame:
        """A DataFrame with one column, `image`, in the schema of Spark's own image source.

        Files are read by Spark, from any storage that it reaches, and decoded in its tasks by
        TensorFlow: JPEG, PNG, BMP, and the first picture of a GIF.

        Args:
            path: a file, a folder, a glob pattern, several with commas between, or a list.
                Folders are searched with all that is in them.
            sc: of Analytics Zoo; the active one is used.
            minPartitions: at least so many.
            resizeH, resizeW: of all images, in pixels (bilinear); -1: as they are.
            image_codec: -1: channels as stored, 0: grey, 1: colour.
            dropInvalid: leave out files that are no images, instead of an error.

        Returns:
            Rows `(origin, height, width, nChannels, mode, data)` in a struct; `data` are rows of
            pixels, one byte for each channel in the order BGR.

        Raises:
            InvalidInputError: an argument is wrong.
            DataError: a file is no image, when the DataFrame is used; names it.

        Example:
            >>> images = NNImageReader.readImages("photos/", resizeH=96, resizeW=96)
            ... # doctest: +SKIP
        """
        if (resizeH == -1) != (resizeW == -1) or 0 in (resizeH, resizeW):
            raise InvalidInputError(
                "Images are resized in both directions, or not at all. "
                f"Received: resizeH={resizeH}, resizeW={resizeW}."
            )
        if image_codec not in _CHANNELS:
            raise InvalidInputError(
                f"image_codec is -1 (as stored), 0 (grey) or 1 (colour). Received: {image_codec}."
            )
        paths = path.split(",") if isinstance(path, str) else list(path)
        reader = SparkSession.builder.getOrCreate().read.format("binaryFile")
        files = reader.option("recursiveFileLookup", "true").load(paths).select("path", "content")
        if files.rdd.getNumPartitions() < minPartitions:
            files = files.repartition(minPartitions)
        size = None if resizeH == -1 else (resizeH, resizeW)
        decode = _Decode(size, _CHANNELS[image_codec], dropInvalid)
        schema = T.StructType([T.StructField("image", IMAGE_SCHEMA)])
        return files.mapInArrow(decode, schema)


@dataclass(frozen=True)
class _Decode:
    """What a task does with files.

    Attributes:
        size: height and width, or None.
        channels: 0: as they are.
        drop_invalid: leave out what is no image.
    """

    size: tuple[int, int] | None
    channels: int
    drop_invalid: bool

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        with reporting(phase=PHASE):
            for batch in batches:
                paths, contents = batch.column(0).to_pylist(), batch.column(1)
                # One at a time: pixels are many times what a file is.
                for path, content in zip(paths, contents, strict=True):
                    image = self._image(path, content.as_py())
                    if image is not None:
                        rows = pa.array([image], _ARROW)
                        yield pa.RecordBatch.from_arrays([rows], names=["image"])

    def _image(self, path: str, content: bytes) -> dict[str, Any] | None:
        import tensorflow as tf

        try:
            pixels = tf.io.decode_image(content, self.channels, expand_animations=False)
        except tf.errors.InvalidArgumentError as error:
            if self.drop_invalid:
                return None
            raise DataError(
                "A file of images is a JPEG, PNG, BMP or GIF. "
                f"Received: {path!r}: {error.message.splitlines()[0]:.200} "
                "Take it away, or pass dropInvalid=True.",
                file=path,
            ) from error
        if self.size is not None:
            resized = tf.image.resize(pixels, self.size)
            pixels = tf.cast(tf.round(resized), tf.uint8)
        pixels = pixels.numpy()
        if pixels.shape[2] == 2:  # grey and alpha
            pixels = pixels[:, :, :1]
        if pixels.shape[2] == 3:
            pixels = pixels[:, :, ::-1]
        elif pixels.shape[2] == 4:
            pixels = pixels[:, :, [2, 1, 0, 3]]
        height, width, channels = pixels.shape
        return {
            "origin": path,
            "height": height,
            "width": width,
            "nChannels": channels,
            "mode": _MODES[channels],
            "data": pixels.tobytes(),
        }
