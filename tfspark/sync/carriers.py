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
_FREE = "free-"
_ABOUT = 1 << 16  # bytes by which a message may be shorter or longer than what it is written over


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
    """Large messages are files, written once; a frame is a path.

    What a rank forgets, others write over: a new file costs the clearing of its pages, which takes
    several times as long as the copy. By then all tasks of the step have ended that count; one that
    Spark has given up and that still runs may read what belongs to a later step. So nobody writes
    a message that is there already: what came first was made of what was meant.

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
        path = os.path.join(self._folder(message.source, step), f"{message.kind}-{target}")
        if not os.path.exists(path):
            unfinished = self._room(sum(map(len, parts)))
            with open(unfinished, "r+b") as file:
                for part in parts:
                    file.write(part)
            # Without its parents: a task that outlives its round must not bring the folder back.
            with suppress(FileExistsError):
                os.mkdir(os.path.dirname(path))
            os.replace(unfinished, path)
        return _PATH + os.fsencode(path)

    def _room(self, num_bytes: int) -> str:
        """A file of about so many bytes, or a new one, that nobody else has."""
        mine = os.path.join(self.folder, f"unfinished-{uuid.uuid4().hex}")
        for name in os.listdir(self.folder):
            if not name.startswith(_FREE):
                continue
            # Messages of a step differ by some bytes from those of the next: times, losses.
            if abs(int(name.split("-")[1]) - num_bytes) <= _ABOUT:
                with suppress(FileNotFoundError):  # another rank was faster
                    os.rename(os.path.join(self.folder, name), mine)
                    return mine
        with open(mine, "wb"):
            return mine

    def state_to_all(self, run: Run, state: RankState, step: int) -> Iterator[tuple[int, bytes]]:
        """See `Carrier`."""
        # A state has all that a shard message has, and only what is looked at is read. Receivers
        # round the weights of a run that rounds them.
        frame = self.pack(state_to_message(state), step, "all")
        for target in range(run.num_ranks):
            yield target, frame

    def forget(self, rank: int, step: int) -> None:
        """See `Carrier`."""
        folder = self._folder(rank, step)
        with suppress(FileNotFoundError):  # a task that ran before has done it
            for name in os.listdir(folder):
                path = os.path.join(folder, name)
                free = f"{_FREE}{os.path.getsize(path)}-{uuid.uuid4().hex}"
                os.rename(path, os.path.join(self.folder, free))
            with suppress(OSError):  # a task that does not count has just written there
                os.rmdir(folder)

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
