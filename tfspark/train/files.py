"""Files on any fsspec file system that readers see whole or not at all."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tfspark.errors import CheckpointError, CheckpointWriteError

TEMPORARY = re.compile(r"\.[^/]+\.[0-9a-f]{8}\.part")
"""Names of files that are being written, or were when their writer died."""

# Stores where a rename is atomic and a write is not; on object stores it is the other way round.
_RENAMING = frozenset({"file", "local", "hdfs", "webhdfs", "viewfs", "sftp", "ssh", "smb"})

# What the next try would meet again; other errors of a file system may pass.
_LASTING = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)


def list_names(fs: Any, root: str) -> list[str]:
    """The names in a folder; none if the folder is not there."""
    fs.invalidate_cache(root)
    try:
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in fs.ls(root, detail=False)]
    except FileNotFoundError:
        return []


def make_folder(fs: Any, path: str) -> None:
    """Makes a folder, private where the file system is local, and those above it."""
    if _is_local(fs):
        os.makedirs(path, mode=0o700, exist_ok=True)
    else:
        fs.makedirs(path, exist_ok=True)


def write(fs: Any, path: str, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes a file, private where the file system is local.

    A writer that dies leaves at most a `TEMPORARY` file behind.
    """
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if not protocols & _RENAMING:
        fs.pipe_file(path, b"".join(chunks))
        return
    folder, name = path.rsplit("/", 1)
    temporary = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.part"
    if not _is_local(fs):
        with fs.open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
        fs.mv(temporary, path)
        return
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(folder)


@dataclass(frozen=True)
class Explained:
    """Turns an operating system's error into one that names the rule and `model_dir`."""

    rule: str
    where: dict[str, Any]

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: Any, error: BaseException | None, _traceback: Any) -> None:
        if isinstance(error, OSError):
            kind = CheckpointError if isinstance(error, _LASTING) else CheckpointWriteError
            raise kind(f"{self.rule} ({type(error).__name__}: {error}).", **self.where) from error


def _is_local(fs: Any) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _sync_folder(path: str) -> None:
    """Makes a rename survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
