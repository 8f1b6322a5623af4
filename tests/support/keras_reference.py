"""Plain Keras on the very batches that the ranks see: the independent reference."""

import numpy as np


def rank_batches(order, parts, steps):
    """For every step, the rows of every rank: a list of tuples of arrays, one tuple per rank.

    Args:
        order: the BatchOrder of the run.
        parts: for every rank, a tuple of arrays with one row per first index.
        steps: how many.
    """
    for step in range(steps):
        epoch, step_in_epoch = order.locate(step)
        batch = []
        for rank, arrays in enumerate(parts):
            ids = order.row_ids(rank, epoch, step_in_epoch)
            batch.append(tuple(array[ids] for array in arrays))
        yield batch


def global_batches(order, parts, steps):
    """For every step, the rows of all ranks as one batch, in rank order."""
    for batch in rank_batches(order, parts, steps):
        yield tuple(np.concatenate(arrays) for arrays in zip(*batch, strict=True))


def train_plain_keras(model, order, parts, steps):
    """Weights of a compiled model after `train_on_batch` on the same global batches."""
    for x, y in global_batches(order, parts, steps):
        model.train_on_batch(x, y)
    return model.get_weights()
