"""Files that Keras writes and reads, on any file system that fsspec reaches."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from tfspark.errors import InvalidInputError


def write_file(path: str, overwrite: bool, save: Callable[[str], Any]) -> None:
    """Has a file written, and brings it to where it belongs.

    Args:
        path: a file or an fsspec URL; its folder is made.
        overwrite: whether a file that is there may be replaced.
        save: writes a local file, whose name ends as that of `path`.

    Raises:
        InvalidInputError: there is one, and it may not.
    """
    system, target = fsspec.core.url_to_fs(path)
    if not overwrite and system.exists(target):
        raise InvalidInputError(
            f"A file is kept with overwrite=False. Received: {path!r}, which is there."
        )
    with tempfile.TemporaryDirectory(prefix="tfspark-") as folder:
        file = str(Path(folder) / Path(target).name)
        save(file)
        system.makedirs(system._parent(target), exist_ok=True)
        system.put_file(file, target)


@contextmanager
def fetched_file(path: str) -> Iterator[str]:
    """A local copy of a file or an fsspec URL, while the block runs.

    Raises:
        InvalidInputError: there is no such file.
    """
    system, source = fsspec.core.url_to_fs(path)
    if not system.exists(source):
        raise InvalidInputError(f"A file is loaded. Received: {path!r}, where there is none.")
    with tempfile.TemporaryDirectory(prefix="tfspark-") as folder:
        file = str(Path(folder) / Path(source).name)
        system.get_file(source, file)
        yield file
