"""How the messages of a task reach others: all of them through Spark, or the large ones in files.

What Spark's shuffle carries crosses two pipes and is copied some ten times on the way. Where every
task runs on the same host, a file that the receiver maps into its memory costs one copy, and Spark
carries its path.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tfspark.errors import TrainingError
from tfspark.sync.engine import RankState, Run
from tfspark.sync.frames import Message, chunks, decode, encode
from tfspark.sync.messages import shard_message, state_to_message

_PATH = b"TFSP"


class Carrier(ABC):
    """Makes frames of messages and messages of frames, in the tasks of one round.

    Packing the same message again gives a frame with the same content, so any task may run again.
    """

    @abstractmethod
    def pack(self, message: Message, step: int, target: int) -> bytes:
        """A frame that Spark carries to rank `target`, for the step after `step` finished ones."""

    @abstractmethod
    def unpack(self, frame: bytes) -> Message:
        """The message of a frame; its arrays are read-only."""

    @abstractmethod
    def state_to_all(self, run: Run, state: RankState, step: int) -> Iterator[tuple[int, bytes]]:
        """(rank, frame) for every rank: the shard, and to its owner all that it owns."""

    @abstractmethod
    def forget(self, rank: int, step: int) -> None:
        """Frees what a rank packed for a step that every rank has finished."""


class FrameCarrier(Carrier):
    """The frame is the message: Spark carries all of it, to any host."""

    def pack(self, message: Message, step: int, target: int) -> bytes:
        """See `Carrier`."""
        return encode(message)

    def unpack(self, frame: bytes) -> Message:
        """See `Carrier`."""
        return decode(frame)

    def state_to_all(self, run: Run, state: RankState, step: int) -> Iterator[tuple[int, bytes]]:
        """See `Carrier`."""
        shard = encode(shard_message(state, run))
        for target in range(run.num_ranks):
            yield target, encode(state_to_message(state)) if target == state.rank else shard

    def forget(self, rank: int, step: int) -> None:
        """Spark deletes its files at the end of the round."""


@dataclass(frozen=True)
class FileCarrier(Carrier):
    """Large messages are files, written once and never changed; a frame is a path.

    Attributes:
        folder: of the round, on a disk or in memory that all ranks share.
        least_bytes: of a message that is worth a file; what is smaller fills no pipe's buffer.
    """

    folder: str
    least_bytes: int = 65536

    def pack(self, message: Message, step: int, target: int | str) -> bytes:
        """See `Carrier`."""
        parts = chunks(message)
        if sum(map(len, parts)) < self.least_bytes:
            return b"".join(parts)
        # Without its parents: a task that outlives its round must not bring the folder back.
        folder = self._folder(message.source, step)
        with suppress(FileExistsError):
            os.mkdir(folder)
        path = os.path.join(folder, f"{message.kind}-{target}")
        unfinished = f"{path}.{uuid.uuid4().hex}"
        with open(unfinished, "wb") as file:
            for part in parts:
                file.write(part)
        os.replace(unfinished, path)
        return _PATH + os.fsencode(path)

    def unpack(self, frame: bytes) -> Message:
        """See `Carrier`."""
        if not frame.startswith(_PATH):
            return decode(frame)
        path = os.fsdecode(frame[len(_PATH) :])
        try:
            with open(path, "rb") as file:
                # The map stays for as long as one of the message's arrays does.
                return decode(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError:
            raise TrainingError(
                "What ranks tell each other in a round stays in Spark's local folder until it "
                f"ends. Received: no file {path}. Keep other programs from deleting files there."
            ) from None

    def state_to_all(self, run: Run, state: RankState, step: int) -> Iterator[tuple[int, bytes]]:
        """See `Carrier`."""
        # A state has all that a shard message has, and only what is looked at is read. Receivers
        # round the weights of a run that rounds them.
        frame = self.pack(state_to_message(state), step, "all")
        for target in range(run.num_ranks):
            yield target, frame

    def forget(self, rank: int, step: int) -> None:
        """See `Carrier`."""
        shutil.rmtree(self._folder(rank, step), ignore_errors=True)

    def _folder(self, rank: int, step: int) -> str:
        return os.path.join(self.folder, f"{step}-{rank}")


@contextmanager
def through_spark() -> Iterator[Carrier]:
    """A round whose messages go through Spark's shuffle: on any cluster."""
    yield FrameCarrier()


@contextmanager
def through_files(parent: str) -> Iterator[Carrier]:
    """A round whose large messages are files, where all ranks run on the driver's host.

    Args:
        parent: an existing folder. The round makes one of its own there, and deletes it.
    """
    folder = tempfile.mkdtemp(prefix="round-", dir=parent)
    try:
        yield FileCarrier(folder)
    finally:
        # A task that was cancelled may still be writing there.
        shutil.rmtree(folder, ignore_errors=True)
