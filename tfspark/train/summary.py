"""Scalars over steps, as TensorBoard event files.

An event file is a TFRecord file of `tensorflow.Event` messages, the first of which names the
format (`brain.Event:2`); see `tensorflow/core/util/event.proto`.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfspark.errors import InvalidInputError
from tfspark.train.triggers import Progress, Trigger, check_trigger

_FILE_NUMBER = itertools.count()


class _Summary:
    """A folder of event files; see the two public classes.

    Attributes:
        arguments: `log_dir` and `app_name`, as given.
        log_dir: the folder of the files.
    """

    _folder = ""

    def __init__(self, log_dir: str | os.PathLike[str], app_name: str):
        for argument, value in (("log_dir", log_dir), ("app_name", app_name)):
            if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
                raise InvalidInputError(
                    f"{type(self).__name__}'s {argument} is a string that is not empty. "
                    f"Received: {value!r}."
                )
        self.arguments = (os.fspath(log_dir), os.fspath(app_name))
        self.log_dir = os.path.join(os.fspath(log_dir), os.fspath(app_name), self._folder)
        self._writer: tf.io.TFRecordWriter | None = None
        try:
            tf.io.gfile.makedirs(self.log_dir)
        except tf.errors.OpError as error:
            raise InvalidInputError(
                f"{type(self).__name__} needs a folder that it can write. "
                f"Received: {self.log_dir!r}, and {error.message}. Choose another log_dir."
            ) from error

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.log_dir!r})"

    def add_scalar(self, tag: str, value: float, step: int, wall_time: float | None = None) -> None:
        """Writes one value; `flush` makes it visible to readers.

        Args:
            tag: the curve it belongs to, such as `"Loss"`.
            value: stored as float32.
            step: finished steps.
            wall_time: seconds since 1970; now by default.
        """
        event = tf.compat.v1.Event(
            wall_time=time.time() if wall_time is None else wall_time,
            step=step,
            summary=tf.compat.v1.Summary(
                value=[tf.compat.v1.Summary.Value(tag=tag, simple_value=value)]
            ),
        )
        self._open().write(event.SerializeToString())

    def read_scalar(self, tag: str) -> np.ndarray:
        """All values of a tag on disk, also those of earlier runs in the same folder.

        Steps that were taken twice, after a failure or a resume, are there twice, in the order
        in which they were written.

        Returns:
            float64 `[values, 3]`: step, value, wall time in seconds since 1970. Empty for an
            unknown tag; `tags()` lists the known ones.

        Example:
            >>> import tempfile
            >>> summary = TrainSummary(tempfile.mkdtemp(), "lenet")
            >>> summary.add_scalar("Loss", 0.5, step=1, wall_time=1.7e9)
            >>> summary.read_scalar("Loss")
            array([[1.0e+00, 5.0e-01, 1.7e+09]])
        """
        found = [
            (event.step, value.simple_value, event.wall_time)
            for event, value in self._values()
            if value.tag == tag
        ]
        return np.array(found, dtype=np.float64).reshape(-1, 3)

    def tags(self) -> list[str]:
        """The tags that have values on disk, sorted."""
        return sorted({value.tag for _, value in self._values()})

    def flush(self) -> None:
        """Brings everything written so far to disk, where a running TensorBoard sees it."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Closes the event file; a value added later opens a new one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> tf.io.TFRecordWriter:
        """The writer; its file is made with the first value, so that none stays empty."""
        if self._writer is None:
            now = time.time()
            # TensorBoard and read_scalar read files in the order of their names.
            name = (
                f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}."
                f"{next(_FILE_NUMBER):06d}"
            )
            self._writer = tf.io.TFRecordWriter(os.path.join(self.log_dir, name))
            version = tf.compat.v1.Event(wall_time=now, file_version="brain.Event:2")
            self._writer.write(version.SerializeToString())
        return self._writer

    def _values(self) -> Iterator[tuple[Any, Any]]:
        self.flush()
        for path in sorted(tf.io.gfile.glob(os.path.join(self.log_dir, "events.out.tfevents.*"))):
            for record in _records(path):
                event = tf.compat.v1.Event.FromString(record)
                for value in event.summary.value:
                    if value.WhichOneof("value") == "simple_value":
                        yield event, value


class TrainSummary(_Summary):
    """What happens in each training step, for TensorBoard and for `read_scalar`.

    The event files lie in `log_dir/app_name/train`, on any file system TensorFlow writes to.
    Curves: `Loss`, `LearningRate`, `Throughput` (rows per second) and `Phase/…` (seconds of each
    phase of a step); with `leave_out` also `LeftOut` (ranks that the step went on without).

    Args:
        log_dir: folder of all applications' logs.
        app_name: folder of this one.

    Raises:
        InvalidInputError: a name is empty, or the folder cannot be made.

    Example:
        >>> from tfspark import SeveralIteration
        >>> summary = TrainSummary("/tmp/logs", "lenet")
        >>> summary.set_summary_trigger("Phase", SeveralIteration(10))
        TrainSummary('/tmp/logs/lenet/train')
    """

    _folder = "train"
    SCALARS = ("Loss", "LearningRate", "Throughput", "Phase", "LeftOut")
    """What `set_summary_trigger` knows; "Phase" stands for all of them."""

    def __init__(self, log_dir: str | os.PathLike[str], app_name: str):
        super().__init__(log_dir, app_name)
        self.triggers: dict[str, Trigger] = {}

    def set_summary_trigger(self, name: str, trigger: Trigger) -> TrainSummary:
        """Writes a curve only after the steps at which a trigger fires, not after each.

        Args:
            name: `"Loss"`, `"LearningRate"`, `"Throughput"`, `"Phase"` or `"LeftOut"`.
            trigger: asked with the progress after each step.

        Returns:
            This summary.

        Raises:
            InvalidInputError: an unknown name, or something that is not a trigger.
        """
        if name == "Parameters":
            raise InvalidInputError(
                "Weights do not pass through the driver during training, so there are no curves "
                "of them. Received: 'Parameters'. Read them from a checkpoint."
            )
        if name not in self.SCALARS:
            known = ", ".join(self.SCALARS)
            raise InvalidInputError(f"A summary's name is one of {known}. Received: {name!r}.")
        self.triggers[name] = check_trigger(trigger, "trigger")
        return self

    def add_step(self, progress: Progress, scalars: Mapping[str, float]) -> None:
        """Writes the values of one step whose triggers fire.

        Args:
            progress: after the step.
            scalars: value by tag. `"Phase/update"` follows the trigger of `"Phase"`.
        """
        for tag, value in scalars.items():
            trigger = self.triggers.get(tag.partition("/")[0])
            if trigger is None or trigger(progress):
                self.add_scalar(tag, value, progress.step)


class ValidationSummary(_Summary):
    """The scores of each validation by metric name, for TensorBoard and for `read_scalar`.

    The event files lie in `log_dir/app_name/validation`.

    Args:
        log_dir: folder of all applications' logs.
        app_name: folder of this one.

    Raises:
        InvalidInputError: a name is empty, or the folder cannot be made.

    Example:
        >>> summary = ValidationSummary("/tmp/logs", "lenet")
        >>> summary.add_scalar("sparse_categorical_accuracy", 0.98, step=100)
    """

    _folder = "validation"


def _records(path: str) -> Iterator[bytes]:
    """The records of a TFRecord file, without the one that a writer may just be at.

    By hand, because TensorFlow's reader needs eager mode and takes an unfinished end for an error.
    A record is its length (uint64, little endian), a checksum, the bytes, a checksum.
    """
    with tf.io.gfile.GFile(path, "rb") as file:
        while len(header := file.read(12)) == 12:
            (length,) = struct.unpack("<Q", header[:8])
            record = file.read(length + 4)
            if len(record) < length + 4:
                return
            yield record[:length]
