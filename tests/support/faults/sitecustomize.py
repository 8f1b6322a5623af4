"""Kills ranks of a gang where an order says so; imported by every Python that finds this folder.

An order is a file at the path in `TFSPARK_ORDER`: `rank phase when step`. The rank that obeys it
deletes it first, so that it is obeyed once. Phases are those of exchanges ("weights", "gradient"
and so on), and "join" and "done" of a rank's membership; `when` is before, during or after. Other
orders, for whoever comes first: `drop` (a connection between ranks breaks), `delay 3.5` (seconds
before an exchange), `files executor replace` (this function fails when a checkpoint is written, on
an executor or the driver), `raise` (see `spark_app.Sulky`). What ends in `always` is obeyed until
the file is gone. The code of tfspark knows nothing of this.
"""

import errno
import importlib.abc
import importlib.machinery
import os
import socket
import sys
import time
from contextlib import suppress


def order_file():
    """Where orders are; one process may have several clusters, each with a file of its own."""
    return os.environ["TFSPARK_ORDER"]


def ordered():
    """The words of the order, if there is one."""
    try:
        with open(order_file()) as file:
            return file.read().split(" ")
    except FileNotFoundError:
        return []


def taken():
    """Whether this process is the one that obeys."""
    if ordered()[-1:] == ["always"]:
        return True
    with suppress(FileNotFoundError):
        os.unlink(order_file())
        return True
    return False


def obey(rank, phase, when, step):
    """Dies, if that is ordered."""
    order = ordered()
    here = [str(rank), phase.replace(" ", "-"), when]
    if order[:3] == here and step >= int(order[3]) and taken():
        os.kill(os.getpid(), 9)


def disturb(sockets):
    """Breaks a connection, or is late, if that is ordered."""
    order = ordered()
    if order[:1] == ["drop"] and sockets and taken():
        next(iter(sockets.values())).shutdown(socket.SHUT_RDWR)
    elif order[:1] == ["delay"] and taken():
        time.sleep(float(order[1]))


class FailingSystem:
    """The module `os`, whose functions fail where that is ordered."""

    HERE = "executor" if "SPARK_EXECUTOR_DIRS" in os.environ else "driver"

    def __getattr__(self, name):
        function = getattr(os, name)
        if name not in ("makedirs", "open", "fsync", "replace"):
            return function

        def call(*arguments, **more):
            if ordered()[:3] == ["files", self.HERE, name] and taken():
                raise OSError(errno.EIO, f"{name} was told to fail")
            return function(*arguments, **more)

        return call


def wrap_files(module):
    """Around what writes a checkpoint."""
    module.os = FailingSystem()


def wrap_links(module):
    """Around and within every exchange."""
    exchange, move = module.Links.exchange, module._move
    here = {}

    def exchange_and_obey(self, outgoing, *, phase, step, **more):
        obey(self.rank, phase, "before", step)
        disturb(self._sockets)
        here.update(rank=self.rank, phase=phase, step=step)
        received = exchange(self, outgoing, phase=phase, step=step, **more)
        obey(self.rank, phase, "after", step)
        return received

    def move_and_obey(*arguments):
        moved = move(*arguments)
        if moved:
            obey(here["rank"], here["phase"], "during", here["step"])
        return moved

    module.Links.exchange, module._move = exchange_and_obey, move_and_obey


def wrap_member(module):
    """Around joining and leaving."""
    join, done = module.Member.join.__func__, module.Member.done

    def join_and_obey(cls, address, token, rank, *arguments, **more):
        obey(rank, "join", "before", 10**9)
        member = join(cls, address, token, rank, *arguments, **more)
        obey(rank, "join", "after", 10**9)
        return member

    def done_and_obey(self):
        obey(self.rank, "done", "before", 10**9)
        done(self)
        obey(self.rank, "done", "after", 10**9)

    module.Member.join, module.Member.done = classmethod(join_and_obey), done_and_obey


WRAPPERS = {
    "tfspark.sync.links": wrap_links,
    "tfspark.sync.member": wrap_member,
    "tfspark.train.files": wrap_files,
}


class Finder(importlib.abc.MetaPathFinder):
    """Wraps the modules right after they were loaded."""

    def find_spec(self, name, path, target=None):
        """Of a module to wrap."""
        if name not in WRAPPERS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def load_and_wrap(module):
            load(module)
            WRAPPERS[name](module)

        spec.loader.exec_module = load_and_wrap
        return spec


if os.environ.get("TFSPARK_ORDER"):
    sys.meta_path.insert(0, Finder())
