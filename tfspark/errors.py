"""Every error tfspark raises on purpose.

```
TFSparkError                      catch this to catch them all
├── ClusterError                  the machine: Java, Python, slots, versions   (also RuntimeError)
├── InvalidInputError             the caller's arguments                       (also ValueError)
│   ├── DataError                 a row, a column, a store
│   ├── ProgramError              a graph, a model, a loss
│   └── UnsupportedRuleError      an optimizer rule that cannot be sharded
├── TrainingError                 while steps run                              (also RuntimeError)
│   ├── NonFiniteError            NaN or infinity in a loss or a gradient
│   ├── UserFunctionError         the user's own function raised on an executor
│   ├── StoreLostError            a partition's store is not on this host any more
│   ├── WorkerLostError           a Python worker died while it ran a task
│   ├── PeerLostError             another rank of a round is gone, or silent
│   ├── ResourceError             a host is out of disk, memory or open files
│   ├── SparkJobError             Spark gave up a job for a reason of its own
│   └── CommitLostError           all copies of a commit are lost
└── CheckpointError               reading or writing a checkpoint              (also RuntimeError)
    └── CheckpointWriteError      its files cannot be written now
```

A message names the rule that was broken, what was received ("Received: …") and the remedy. Where
several processes are involved it also names the rank, the step and the phase: pass them as
keywords, and they are put in front of the message and kept as attributes. Every error pickles,
attributes included, so it crosses a process boundary unchanged.

Example:
    >>> error = TrainingError("The gradient is not finite.", rank=1, step=7, phase="update")
    >>> str(error)
    '[rank 1, step 7, phase update] The gradient is not finite.'
"""

from __future__ import annotations

from typing import Any


class TFSparkError(Exception):
    """Base of every error of tfspark.

    Args:
        message: the rule, what was received, the remedy.
        **where: where it happened, for example `rank=`, `step=`, `phase=`, `partition=`, `row=`;
            each becomes an attribute. `None` values are dropped.
    """

    def __init__(self, message: str, **where: Any):
        self.message = message
        self.where = {name: value for name, value in where.items() if value is not None}
        prefix = ", ".join(f"{name} {value}" for name, value in self.where.items())
        super().__init__(f"[{prefix}] {message}" if prefix else message)

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that are not set: the keys of `where`.
        where = self.__dict__.get("where", {})
        if name in where:
            return where[name]
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.where)


def _rebuild(cls: type[TFSparkError], message: str, where: dict[str, Any]) -> TFSparkError:
    return cls(message, **where)


class ClusterError(TFSparkError, RuntimeError):
    """The machine or the cluster lacks something: Java, a Python version, slots."""


class InvalidInputError(TFSparkError, ValueError):
    """An argument breaks a rule."""


class DataError(InvalidInputError):
    """A row, a column or a whole data set breaks a rule; names partition, row and field."""


class ProgramError(InvalidInputError):
    """A graph, a model or a loss cannot become a program."""


class UnsupportedRuleError(InvalidInputError):
    """An optimizer rule cannot be applied to a shard."""


class TrainingError(TFSparkError, RuntimeError):
    """Training stopped; names rank, step and phase where they are known."""


class NonFiniteError(TrainingError):
    """The loss or the gradient is NaN or infinite; the last good commit stays."""


class UserFunctionError(TrainingError):
    """The user's function raised on an executor; the message carries its traceback."""


class StoreLostError(TrainingError):
    """A partition's store is not on this host; the engine rebuilds it from lineage."""


class WorkerLostError(TrainingError):
    """A Python worker died while it ran a task; the task may run again."""


class PeerLostError(TrainingError):
    """Another rank of a round closed its connection, or was silent for too long."""


class ResourceError(TrainingError):
    """A host has run out of what training needs: disk, memory, open files; or its disk fails."""


class SparkJobError(TrainingError):
    """Spark gave up a job, and not because of Python code in it."""


class CommitLostError(TrainingError):
    """All copies of a commit are lost with their executors; only a checkpoint helps.

    Its attribute `block` is Spark's name of the lost one.
    """


class CheckpointError(TFSparkError, RuntimeError):
    """A checkpoint cannot be written or read."""


class CheckpointWriteError(CheckpointError):
    """The file system refused a write; it may take the next one."""


def require(condition: bool, rule: str, **received: Any) -> None:
    """Raises an InvalidInputError of the usual form where a rule about arguments is broken."""
    if not condition:
        values = ", ".join(f"{name}={value!r}" for name, value in received.items())
        raise InvalidInputError(f"{rule}. Received: {values}.")
