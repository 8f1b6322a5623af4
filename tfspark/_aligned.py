"""Arrays that TensorFlow reads where they lie."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

ALIGNMENT = 64
"""Bytes. TensorFlow copies arrays that start elsewhere (`EIGEN_MAX_ALIGN_BYTES`)."""


def aligned_empty(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised C-contiguous array whose memory starts at a multiple of `ALIGNMENT`.

    NumPy aligns to 16 bytes only.
    """
    dtype = np.dtype(dtype)
    sides = (shape,) if isinstance(shape, int) else shape
    num_bytes = math.prod(sides) * dtype.itemsize
    memory = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(sides)
