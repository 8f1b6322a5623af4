"""Folders of saved stages, beside the metadata that Spark ML writes, through Spark's own storage.

A stage is saved with a path that Spark resolves (`hdfs:`, `s3a:`, `dbfs:`, or one without a scheme,
which is the cluster's default), so what tfspark adds must go the same way.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark import SparkContext

from tfspark.errors import InvalidInputError


def put_files(context: SparkContext, folder: Path, path: str) -> dict[str, str]:
    """Copies the files of a local folder.

    Args:
        context: of Spark, whose storage it goes to.
        folder: with files only.
        path: of the folder that they become.

    Returns:
        SHA-256 by name, for `fetched_files` to compare.
    """
    digests = {}
    system, target = _resolved(context, path)
    system.mkdirs(target)
    for file in sorted(folder.iterdir()):
        digests[file.name] = digest_of(file)
        source = _hadoop_path(context, file.resolve().as_uri())
        # Keeps the source, replaces what is there.
        system.copyFromLocalFile(False, True, source, _hadoop_path(context, path, file.name))
    return digests


def exists(context: SparkContext, path: str) -> bool:
    """Whether there is a file or a folder."""
    system, target = _resolved(context, path)
    return system.exists(target)


@contextmanager
def fetched_files(context: SparkContext, path: str, digests: Mapping[str, str]) -> Iterator[Path]:
    """A local folder with copies of files, while the block runs.

    Args:
        context: of Spark.
        path: of the folder.
        digests: SHA-256 by name.

    Raises:
        InvalidInputError: one is missing, or is not what was saved.
    """
    with tempfile.TemporaryDirectory(prefix="tfspark-") as name:
        system, _ = _resolved(context, path)
        for file, digest in digests.items():
            local = Path(name) / Path(file).name  # a name from a file does not lead elsewhere
            target = _hadoop_path(context, local.as_uri())
            try:
                # Keeps the source; writes no file of checksums beside the copy.
                system.copyToLocalFile(False, _hadoop_path(context, path, local.name), target, True)
            except Py4JJavaError as error:
                raise InvalidInputError(
                    "A stage is loaded from the files it was saved as. "
                    f"Received: {path!r} without {file!r} ({error.java_exception.getMessage()})."
                ) from error
            found = digest_of(local)
            if found != digest:
                raise InvalidInputError(
                    "A stage is loaded from the files it was saved as. "
                    f"Received: {path}/{file}, which was changed since (SHA-256 {found[:12]}… "
                    f"instead of {digest[:12]}…). Save the stage again."
                )
        yield Path(name)


def write_json(path: Path, content: Any) -> None:
    """A small file."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def _resolved(context: SparkContext, path: str) -> tuple[Any, Any]:
    """The file system of Hadoop that a path is on, and the path as an object of it."""
    target = _hadoop_path(context, path)
    return target.getFileSystem(context._jsc.hadoopConfiguration()), target


def _hadoop_path(context: SparkContext, *parts: str) -> Any:
    jvm: Any = context._jvm
    return jvm.org.apache.hadoop.fs.Path(*parts)


def digest_of(file: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
