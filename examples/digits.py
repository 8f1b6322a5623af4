"""Real handwritten digits for the examples, without a download.

scikit-learn carries 1,797 digits of 8×8 pixels (UCI, "Optical Recognition of Handwritten Digits").
Here they are enlarged to the 28×28 pixels of MNIST, so that the networks known from there fit.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from sklearn.datasets import load_digits

TEST_ROWS = 360

Split = tuple[np.ndarray, np.ndarray]


def load_digits_28x28() -> tuple[Split, Split]:
    """The digits in a fixed shuffled order, as `((images, labels), (test images, test labels))`.

    Returns:
        1,437 rows to train on and 360 to test: images float32 `[rows, 28, 28, 1]` from 0 (paper)
        to 1 (ink), labels int32 `[rows]` from 0 to 9.
    """
    digits = load_digits()
    images = enlarge(digits.images / 16.0)[..., np.newaxis]
    labels = digits.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[TEST_ROWS:], order[:TEST_ROWS]
    return (images[train], labels[train]), (images[test], labels[test])


def enlarge(images: np.ndarray) -> np.ndarray:
    """Images `[rows, 8, 8]` as float32 `[rows, 28, 28]`, smooth, still between 0 and 1."""
    # Cubic splines overshoot at edges, hence the clip; the paper continues outside of the frame.
    large = ndimage.zoom(images, (1, 3.5, 3.5), order=3, mode="grid-constant", grid_mode=True)
    return np.clip(large, 0.0, 1.0).astype(np.float32)
