"""Clipping by norm across ranks: partial sums on every slice, then one factor per element.

A norm needs the whole gradient of a tensor (or of all), a rank has slices only. So each rank sums
the squares of its slice tensor by tensor, the engine adds these sums over ranks, and each rank
turns them into the factors of its own elements. Everything is NumPy in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tfspark.errors import InvalidInputError


class Segment(Protocol):
    """Elements `start:stop` of a slice belong to tensor number `tensor`."""

    @property
    def tensor(self) -> int: ...  # noqa: D102

    @property
    def start(self) -> int: ...  # noqa: D102

    @property
    def stop(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Clipping:
    """How the gradients of one parameter group are clipped.

    Attributes:
        value: elementwise bounds (smallest, largest). The update program applies them; engines
            have nothing to do.
        norm: the most that the L2 norm of each tensor's gradient may be.
        global_norm: the most that the L2 norm of all gradients of the group together may be.
    """

    value: tuple[float, float] | None = None
    norm: float | None = None
    global_norm: float | None = None

    def __post_init__(self) -> None:
        if self.value is not None and not self.value[0] < self.value[1]:
            raise InvalidInputError(
                f"Clipping by value needs a smaller and a larger bound. Received: {self.value}."
            )
        if any(norm is not None and not norm > 0 for norm in (self.norm, self.global_norm)):
            raise InvalidInputError(
                "Clipping by norm needs a norm above 0. Received: "
                f"norm={self.norm}, global_norm={self.global_norm}."
            )
        if self.norm is not None and self.global_norm is not None:
            raise InvalidInputError(
                "Gradients are clipped by the norm of each tensor or by the norm of all, not both. "
                f"Received: norm={self.norm}, global_norm={self.global_norm}."
            )

    @property
    def needs_norms(self) -> bool:
        """Whether norms have to be summed over ranks."""
        return self.norm is not None or self.global_norm is not None


def tensor_squared_norms(
    gradient: np.ndarray, segments: Sequence[Segment], num_tensors: int
) -> np.ndarray:
    """This slice's part of the squared norm of every tensor's gradient.

    Args:
        gradient: a slice of the gradient of the global batch's loss (divided by its rows).
        segments: the parts of tensors in the slice; padding belongs to none.
        num_tensors: of the whole model.

    Returns:
        float64 `[num_tensors]`, zero for tensors that are not in the slice. The sum over all
        slices is the squared norm.
    """
    squared_norms = np.zeros(num_tensors, np.float64)
    for segment in segments:
        part = gradient[segment.start : segment.stop].astype(np.float64)
        squared_norms[segment.tensor] += part @ part
    return squared_norms


def scales(
    clipping: Clipping,
    squared_norms: np.ndarray,
    segments: Sequence[Segment],
    in_group: Sequence[bool],
    size: int,
) -> np.ndarray:
    """The factor of each element of a slice: `limit / max(norm, limit)`, at most 1.

    Args:
        clipping: of one parameter group.
        squared_norms: `[num_tensors]`, summed over all slices.
        segments: the parts of tensors in the slice.
        in_group: per tensor, whether it belongs to the group; others do not count.
        size: elements of the slice.

    Returns:
        float64 `[size]`; 1 for padding, other groups, and where nothing is clipped.

    Source: `tf.clip_by_norm` and `tf.clip_by_global_norm`, as Keras optimizers use them.
    """
    members = np.asarray(in_group, bool)
    limit = clipping.norm if clipping.norm is not None else clipping.global_norm
    if limit is None:
        return np.ones(size, np.float64)
    if clipping.norm is not None:
        norms = np.sqrt(squared_norms)
    else:
        norms = np.full(len(members), np.sqrt(squared_norms[members].sum()))
    factors = np.where(members, limit / np.maximum(norms, limit), 1.0)
    result = np.ones(size, np.float64)
    for segment in segments:
        result[segment.start : segment.stop] = factors[segment.tensor]
    return result
