"""How rows become batches, as the constructors of a data set are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfspark.errors import InvalidInputError


@dataclass(frozen=True)
class Batching:
    """How rows become batches.

    Attributes:
        batch_size: rows of a global batch in training, over all ranks.
        batch_per_thread: rows of one call in evaluation and prediction.
        hard_code_batch_size: placeholders have the batch size as their first dimension.
        shuffle: draw rows at random, anew in every epoch.
        seed: of the order of rows, and of randomness in map().
    """

    batch_size: int | None
    batch_per_thread: int | None
    hard_code_batch_size: bool
    shuffle: bool
    seed: int

    @classmethod
    def of(
        cls,
        batch_size: int,
        batch_per_thread: int,
        hard_code_batch_size: bool = False,
        sequential_order: bool = False,
        shuffle: bool = True,
        seed: int = 0,
    ) -> Batching:
        """From the arguments of the constructors, where -1 means: not given."""
        given = {"batch_size": batch_size, "batch_per_thread": batch_per_thread}
        given = {name: value for name, value in given.items() if value not in (-1, None)}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise InvalidInputError(
                    f"A batch needs at least one row. Received: {name}={value!r}. "
                    "Pass a positive integer."
                )
        if len(given) == 2:
            raise InvalidInputError(
                "batch_size is for training, batch_per_thread for evaluation and prediction. "
                f"Received: both, {batch_size} and {batch_per_thread}. Pass one of them."
            )
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise InvalidInputError(f"A seed is an integer. Received: seed={seed!r}.")
        return cls(
            given.get("batch_size"),
            given.get("batch_per_thread"),
            bool(hard_code_batch_size),
            bool(shuffle) and not sequential_order,
            int(seed),
        )


def batching_of(arguments: Mapping[str, Any]) -> Batching:
    """The batching that a constructor's arguments ask for."""
    memory_type = arguments["memory_type"]
    if not isinstance(memory_type, str):
        raise InvalidInputError(f"memory_type is a string. Received: {memory_type!r}.")
    names = "batch_size batch_per_thread hard_code_batch_size sequential_order shuffle seed"
    return Batching.of(**{name: arguments[name] for name in names.split()})
