"""The classes of an embedded Spark, kept in a file from one start of its JVM to the next.

Until Spark runs, its JVM has read, checked and linked some ten thousand classes, which is half of
what a start costs the processor. Java's class data sharing (JEP 350) has a JVM write them into an
archive when it ends, and maps them from there when another one starts.

Writing takes a second or two, so a machine where few programs run, such as a container that is
thrown away, is spared it: the second start of the same Spark writes the archive, the third is the
first that maps it. The JVM itself looks whether an archive fits, and does without one that does
not.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

_WRITING_STARTS = range(2, 5)
"""The starts that write an archive while there is none. Where these have not, no later one will."""

_QUIET = "-Xlog:cds*=off -Xlog:class*=off"
"""Of classes that cannot be archived the JVM tells on standard output, line by line."""

_WRITING_S = 3600.0
"""No JVM writes for so long."""

_UNUSED_S = 60 * 24 * 3600.0
"""Archives of other versions of Spark or Java, of some 90 MB, go after so long without use."""

# What is passed in Java options must need no quotes.
_PLAIN = re.compile(r"[\w./+-]+")


def cache_folder() -> Path:
    """Where archives lie: `$XDG_CACHE_HOME/tfspark`, or its like in the user's home."""
    home = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(home)) / "tfspark"


def java_options(
    java: str, jars: Path, also: Iterable[str] = (), folder: Path | None = None
) -> str:
    """What to start an embedded Spark's JVM with; notes that it was started once more.

    Args:
        java: what `java -version` printed, and where it is.
        jars: the folder of Spark's own.
        also: whatever else the JVM's class path depends on.
        folder: of the archives; `cache_folder()`.

    Returns:
        Options that map an archive, options that write one, or none.
    """
    folder = folder or cache_folder()
    # HotSpot says so in the last line; other machines have other ways.
    if "sharing" not in java or not _PLAIN.fullmatch(str(folder)):
        return ""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = _name(java, jars, also)
        _take_written(folder, name)
        for archive in folder.glob(f"{name}-*.jsa"):
            if _is_whole(archive):
                os.utime(archive)
                return f"-XX:SharedArchiveFile={archive} {_QUIET}"
            archive.unlink(missing_ok=True)
        if _count_start(folder / f"{name}.starts") in _WRITING_STARTS:
            return f"-XX:ArchiveClassesAtExit={folder / name}-{os.getpid()}.part {_QUIET}"
    except OSError:  # a full disk, or a home that nobody may write to
        pass
    return ""


def _name(java: str, jars: Path, also: Iterable[str]) -> str:
    """Of what fits one Java and one Spark."""
    digest = hashlib.sha256("\0".join([java, str(jars), *also]).encode())
    for name, size, changed in sorted(_stats(jars)):
        digest.update(f"\0{name}\0{size}\0{changed}".encode())
    return f"spark-{digest.hexdigest()[:16]}"


def _stats(folder: Path) -> Iterator[tuple[str, int, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            stat = entry.stat()
            yield entry.name, stat.st_size, stat.st_mtime_ns


def _take_written(folder: Path, name: str) -> None:
    """Renames an archive that a JVM has written by now; its size becomes part of its name.

    A JVM that maps a file which was cut short since dies of it, so `_is_whole` compares them.
    """
    for part in folder.glob(f"{name}-*.part"):
        with part.open("rb") as file:
            # The JVM writes the head after all else.
            is_written = any(file.read(4))
        stat = part.stat()
        if is_written and not any(folder.glob(f"{name}-*.jsa")):
            part.replace(folder / f"{name}-{stat.st_size}.jsa")
            _forget_unused(folder)
        elif is_written or time.time() - stat.st_mtime > _WRITING_S:
            # Of one of two that ran at the same time, or that was killed while it wrote.
            part.unlink(missing_ok=True)


def _is_whole(archive: Path) -> bool:
    return archive.stem.endswith(f"-{archive.stat().st_size}")


def _forget_unused(folder: Path) -> None:
    for archive in folder.glob("spark-*.jsa"):
        if time.time() - archive.stat().st_mtime > _UNUSED_S:
            archive.unlink(missing_ok=True)


def _count_start(counter: Path) -> int:
    """Which start this is: 1 for the first. Two at the same time may count as one."""
    text = counter.read_text() if counter.exists() else ""
    number = (int(text) if text.isdigit() else 0) + 1
    if number <= _WRITING_STARTS.stop:
        counter.write_text(str(number))
    return number
