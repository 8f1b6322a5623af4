"""Feeds damaged bytes to what reads bytes of others, guided by coverage: needs `atheris`.

    pip install atheris
    python tools/fuzz.py frames -max_total_time=60
    python tools/fuzz.py manifest -max_total_time=60
    python tools/fuzz.py store -max_total_time=60

Frames come from other ranks, over sockets; manifests and stores are files. Each may answer with the
error that is meant for it and with no other. Tests with hypothesis try the same within `make test`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/support"))

with atheris.instrument_imports(include=["tfspark"]):
    from stored import SPEC, columns, manifest_of, rows_of, write

    from tfspark.data.store import Store
    from tfspark.errors import CheckpointError, DataError, TrainingError
    from tfspark.sync.frames import Message
    from tfspark.sync.stream import decode, encode
    from tfspark.train.manifest import Manifest


def frames() -> Callable[[bytes], None]:
    """A message of another rank, byte by byte as it comes over a socket."""

    def run(data: bytes) -> None:
        decoder, rest = decode(1, None, None, TrainingError), memoryview(data)
        try:
            for views in decoder:
                for view in views:
                    # Memory is taken by what a header announces: what is too much was refused.
                    part = rest[: view.nbytes]
                    view[: len(part)] = part
                    rest = rest[len(part) :]
                    if len(part) < view.nbytes:
                        return  # the rest would still have to come
        except TrainingError:
            return

    return run


def manifest() -> Callable[[bytes], None]:
    """The document of a checkpoint."""

    def run(data: bytes) -> None:
        try:
            Manifest.from_json(data)
        except CheckpointError:
            return

    return run


def store() -> Callable[[bytes], None]:
    """The file of a partition."""
    folder = Path(tempfile.mkdtemp())
    handle = write(folder / "a.arrow", SPEC, rows=rows_of(columns(20)), chunk_bytes=300)

    def run(data: bytes) -> None:
        path = folder / "damaged.arrow"
        path.write_bytes(data)
        try:
            opened = Store.open(replace(handle, path=str(path), bytes=len(data)))
            opened.read_range(0, opened.rows)
        except DataError:
            return

    return run


def seeds(name: str, folder: Path) -> None:
    """A good input to start from."""
    if name == "manifest":
        (folder / "good").write_text(manifest_of(5, 2).to_json())
    elif name == "store":
        write(folder / "good", SPEC, rows=rows_of(columns(20)), chunk_bytes=300)
    else:
        import numpy as np

        message = Message("x", 1, {"step": 3}, {"a": np.arange(6, dtype=np.float32)})
        (folder / "good").write_bytes(b"".join(encode(message)))


def main() -> None:
    """Runs one target for as long as libFuzzer is told."""
    targets = {"frames": frames, "manifest": manifest, "store": store}
    if len(sys.argv) < 2 or sys.argv[1] not in targets:
        sys.exit(__doc__)
    name = sys.argv.pop(1)
    corpus = Path(tempfile.mkdtemp())
    seeds(name, corpus)
    atheris.Setup([*sys.argv, str(corpus)], targets[name]())
    atheris.Fuzz()


if __name__ == "__main__":
    main()
