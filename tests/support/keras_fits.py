"""`KerasModel.fit` on ranks, and plain Keras on the same batches, of either Keras."""

import numpy as np
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tfspark.data.order import BatchOrder
from tfspark.train.keras_model import KerasModel

ROWS, BATCH = 70, 16
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def rows(seed=0, number=ROWS):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(number, 6)).astype(np.float32)
    return x, (x[:, :3].argmax(axis=1) + rng.integers(0, 2, number)) % 3


def same(model, history, plain, expected):
    assert list(history.history) == list(expected.history)
    for name, values in expected.history.items():
        np.testing.assert_allclose(history.history[name], values, err_msg=name, **CLOSE)
    for one, other in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


def on_ranks(model, *arguments, engine="gang", num_ranks=3, model_dir=None, **keywords):
    keras_model = KerasModel(model, engine=engine, num_ranks=num_ranks, model_dir=model_dir)
    return keras_model.fit(
        *arguments, batch_size=BATCH, verbose=0, shuffle=False, distributed=True, **keywords
    )


def plainly(model, *arguments, **keywords):
    return model.fit(*arguments, batch_size=BATCH, verbose=0, shuffle=False, **keywords)


def by_rank(number=ROWS, ranks=3):
    """The order in which ranks take rows that each of them has a part of."""
    bounds = [rank * number // ranks for rank in range(ranks + 1)]
    order = BatchOrder(tuple(np.diff(bounds).tolist()), BATCH, shuffle=False, seed=0)
    found = []
    for step in range(order.steps_per_epoch):
        for rank in range(ranks):
            found += (bounds[rank] + order.row_ids(rank, 0, step)).tolist()
    return np.array(found)


def on_board(folder, tag):
    """What the callback TensorBoard has written: a number for each epoch."""
    events = EventAccumulator(str(folder)).Reload().Tensors(tag)
    assert [event.step for event in events] == list(range(len(events)))
    return [float(tf.make_ndarray(event.tensor_proto)) for event in events]
