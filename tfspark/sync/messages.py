"""What ranks tell each other, and themselves in the next round, as messages.

| kind | from a rank to | holds |
|---|---|---|
| "shard" | every rank, before a gradient | its slice of the weights and of the model state |
| "gradient" | the owner of a slice | its part of the sums of that slice |
| "state" | itself, in a commit | all that it owns |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tfspark.sync.engine import Halt, RankState, Run, StepRecord
from tfspark.sync.frames import Message


@dataclass
class Contribution:
    """What one rank adds to a step.

    Attributes:
        rank: whose.
        rows: of the global batch that it holds.
        loss_sum: see `Program`.
        gradient: `[P]`, summed over its rows; None without rows or after a halt.
        mean: its averaged model state times its rows, packed; None like `gradient`.
        first: its handed-on model state.
        leads: whether it is the first rank in the sum that has rows: all take `first` from it.
        left_out: whether the step goes on without its rows.
        halt: why it did not compute, or what it found.
        seconds: by phase.
    """

    rank: int
    rows: int = 0
    loss_sum: float = 0.0
    gradient: np.ndarray | None = None
    mean: np.ndarray | None = None
    first: list[np.ndarray] = field(default_factory=list)
    leads: bool = False
    left_out: bool = False
    halt: Halt | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def shard_message(state: RankState, run: Run | None = None) -> Message:
    """What a rank tells every rank before the next gradient: its shard and model state.

    Args:
        state: of the rank.
        run: says how weights are rounded on their way; None: not at all.
    """
    shard = state.shard if run is None else run.compression.weights(state.shard)
    return Message(
        "shard",
        state.rank,
        {"step": state.step, "halt": _halt_meta(state.halt)},
        {"shard": shard, "mean": state.mean, **_numbered("first", state.first)},
    )


def gradient_message(
    run: Run, contribution: Contribution, owner: int, *, with_gradient: bool = True
) -> Message:
    """What a rank tells the owner of a slice: its part of the sums.

    Args:
        run, contribution: of the rank.
        owner: of the slice.
        with_gradient: false where the owner can read the gradient in memory.
    """
    arrays = _numbered("first", contribution.first) if contribution.leads else {}
    if contribution.gradient is not None and contribution.mean is not None:
        if with_gradient:
            arrays["gradient"] = run.compression.gradient(
                run.layout.shard(contribution.gradient, owner)
            )
        arrays["mean"] = run.state_layout.slice_of(contribution.mean, owner)
    return Message(
        "gradient",
        contribution.rank,
        {
            "rows": contribution.rows,
            "loss_sum": contribution.loss_sum,
            "left_out": contribution.left_out,
            "halt": _halt_meta(contribution.halt),
            "seconds": contribution.seconds,
        },
        arrays,
    )


def state_to_message(state: RankState) -> Message:
    """A rank's whole state as a message to itself, or for a commit."""
    arrays = {"shard": state.shard, "mean": state.mean, **_numbered("first", state.first)}
    for group, slots in enumerate(state.slots):
        arrays.update(_numbered(f"slot{group}.", slots))
    meta = {
        "step": state.step,
        "halt": _halt_meta(state.halt),
        "records": [asdict(record) for record in state.records],
        "slots": [len(slots) for slots in state.slots],
        "first": len(state.first),
    }
    return Message("state", state.rank, meta, arrays)


def state_from_message(message: Message) -> RankState:
    """The inverse of `state_to_message`."""
    meta, arrays = message.meta, message.arrays
    return RankState(
        rank=message.source,
        step=meta["step"],
        shard=arrays["shard"],
        slots=[
            [arrays[f"slot{group}.{i}"] for i in range(count)]
            for group, count in enumerate(meta["slots"])
        ],
        mean=arrays["mean"],
        first=[arrays[f"first{i}"] for i in range(meta["first"])],
        records=[StepRecord(**record) for record in meta["records"]],
        halt=halt_from(meta["halt"]),
    )


def _halt_meta(halt: Halt | None) -> dict[str, Any] | None:
    return asdict(halt) if halt else None


def halt_from(meta: dict[str, Any] | None) -> Halt | None:
    """The halt that a message tells of."""
    return Halt(**meta) if meta else None


def _numbered(prefix: str, values: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}{i}": np.asarray(value) for i, value in enumerate(values)}
