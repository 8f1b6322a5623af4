"""What a program returns, as tests want it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def joined(program: Any, outputs: Sequence[Any]) -> list[np.ndarray]:
    """The loss, the gradient `[P]` and the new model state, from the outputs of a program."""
    arrays = [output.numpy() for output in outputs]
    count = len(program.weights)
    return [arrays[0], np.concatenate(arrays[1 : 1 + count]), *arrays[1 + count :]]
