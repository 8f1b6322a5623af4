"""How the messages of a task reach others: all of them through Spark, or the large ones in files.

What Spark carries crosses two pipes, is copied some ten times on the way, and is kept in the JVM's
heap. Where every task runs on the same host, a file that the receiver maps into its memory costs
one copy, and Spark carries its path.
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
from tfspark.sync.messages import shard_message, state_from_message, state_to_message

_PATH = b"TFSP"


class Carrier(ABC):
    """Makes frames of messages, in the tasks of one round; `message_of` is the way back.

    Packing the same message again gives a frame with the same content, so any task may run again.

    Attributes:
        is_light: whether frames are small however large messages are.
    """

    is_light: bool

    @abstractmethod
    def pack(self, message: Message, step: int, target: int | str) -> bytes:
        """A frame for Spark to carry.

        Args:
            message: what the frame is to say.
            step: finished ones.
            target: the rank that it goes to, or another word that tells it from the rest of the
                messages of that kind, rank and step.
        """

    @abstractmethod
    def state_to_all(self, run: Run, state: RankState, step: int) -> Iterator[tuple[int, bytes]]:
        """(rank, frame) for every rank: the shard, and to its owner all that it owns."""

    @abstractmethod
    def forget(self, rank: int, step: int) -> None:
        """Frees what a rank packed for a step that every rank has finished."""


class FrameCarrier(Carrier):
    """The frame is the message: Spark carries all of it, to any host."""

    is_light = False

    def pack(self, message: Message, step: int, target: int | str) -> bytes:
        """See `Carrier`."""
        return encode(message)

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

    is_light = True

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


def message_of(frame: bytes) -> Message:
    """The message of a frame that any carrier has packed; its arrays are read-only.

    Raises:
        TrainingError: its file has gone, or it is no frame.
    """
    if not frame.startswith(_PATH):
        return decode(frame)
    path = os.fsdecode(frame[len(_PATH) :])
    try:
        with open(path, "rb") as file:
            # The map stays for as long as one of the message's arrays does.
            return decode(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        raise TrainingError(
            "What ranks tell each other and themselves stays in Spark's local folder until the "
            f"next round has ended. Received: no file {path}. Keep other programs from deleting "
            "files there."
        ) from None


def shard_frame(frame: bytes) -> bytes:
    """The part of a state that every rank needs for its gradient, from the frame of a commit."""
    # In a file only what is looked at is read.
    return frame if frame.startswith(_PATH) else encode(shard_message(state_of(frame)))


def state_of(frame: bytes) -> RankState:
    """The state of a rank, from the frame of a commit."""
    return state_from_message(message_of(frame))


@contextmanager
def through_spark() -> Iterator[Carrier]:
    """Messages go through Spark: on any cluster."""
    yield FrameCarrier()


@contextmanager
def through_files(parent: str) -> Iterator[Carrier]:
    """Large messages are files, where all ranks run on the driver's host.

    Args:
        parent: an existing folder. A folder there holds the files and is deleted with them.
    """
    folder = tempfile.mkdtemp(prefix="messages-", dir=parent)
    try:
        yield FileCarrier(folder)
    finally:
        # A task that was cancelled may still be writing there.
        shutil.rmtree(folder, ignore_errors=True)
