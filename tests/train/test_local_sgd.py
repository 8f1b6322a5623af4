"""Local SGD through Spark: what unit tests show of ranks, from rounds to the way home."""

import keras
import numpy as np
import pytest
from keras import layers
from keras_reference import rank_batches
from training import assert_close, assert_same_bits, classified, differ, order_and_parts

from tfspark import EveryEpoch, MaxIteration, MinLoss, TFDataset, TFOptimizer, TrainSummary
from tfspark.errors import InvalidInputError

ROWS, BATCH, RANKS, EVERY = 38, 8, 3, 3  # five steps an epoch
LOSS = "sparse_categorical_crossentropy"


def plain():
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(7, "relu"), layers.Dense(3, "softmax")]
    )


def with_state():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(7, name="hidden"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.4, seed=3, name="dropout"),
            layers.Dense(3, "softmax", name="out"),
        ],
        name="model",
    )


def compiled(make):
    model = make()
    rng = np.random.default_rng(5)
    model.set_weights([rng.normal(size=w.shape) if w.ndim == 2 else w for w in model.get_weights()])
    model.compile(keras.optimizers.Adam(0.02), LOSS, metrics=["accuracy"], jit_compile=False)
    return model


def data():
    return TFDataset.from_ndarrays(
        classified(ROWS), batch_size=BATCH, seed=7, val_tensors=classified(11, 5)
    )


def training(model, **settings):
    chosen = {"engine": "gang", "num_ranks": RANKS, "average_every": EVERY, **settings}
    return TFOptimizer.from_keras(model, data(), progress=False, **chosen)


def loss_of_batch(model, x, y):
    """Before the step that it takes; Keras would give the mean of all so far."""
    model.reset_metrics()
    return model.train_on_batch(x, y, return_dict=True)["loss"]


def test_against_keras_on_every_rank(sc, tmp_path):
    """Averages come after steps 3, 6 and 9, and where a validation is due: after 5 and 10."""
    model, summary = compiled(plain), TrainSummary(str(tmp_path), "local")
    optimizer = training(model).set_train_summary(summary)
    optimizer.optimize(MaxIteration(10), EveryEpoch())

    order, parts = order_and_parts(data(), classified(ROWS), RANKS)
    ranks, losses = [compiled(plain) for _ in parts], []
    for rank in ranks:
        rank.optimizer.build(rank.trainable_variables)
    rows = np.zeros(RANKS)
    for step, batch in enumerate(rank_batches(order, parts, 10), start=1):
        of_ranks = [loss_of_batch(rank, x, y) for rank, (x, y) in zip(ranks, batch, strict=True)]
        counts = np.array([len(y) for _, y in batch])
        assert counts.all()
        losses.append(np.dot(of_ranks, counts) / counts.sum())
        rows += counts
        if step in (3, 5, 6, 9, 10):
            for variables in zip(
                *[[*r.trainable_variables, *r.optimizer.variables] for r in ranks], strict=True
            ):
                mean = np.average([v.numpy() for v in variables], axis=0, weights=rows)
                for variable in variables:
                    variable.assign(mean.astype(variable.dtype))
            rows[:] = 0

    assert_close(model.get_weights(), ranks[0].get_weights(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(summary.read_scalar("Loss")[:, 1], losses, rtol=1e-4)
    x, y = classified(11, 5)
    expected = ranks[0].evaluate(x, y, verbose=0, return_dict=True)
    assert optimizer._training.loop.scores == pytest.approx(expected, rel=1e-4)


def test_resumed_equals_uninterrupted_and_repeated(sc, tmp_path):
    def weights(folder, *ends):
        """After as many trainings as there are ends, each as a new process would do it."""
        for end in ends:
            model = compiled(with_state)
            optimizer = training(model, model_dir=str(tmp_path / folder))
            optimizer.optimize(MaxIteration(end))
            optimizer.close()
        return [variable.numpy() for variable in model.variables]

    undisturbed = weights("once", 13)
    assert_same_bits(weights("again", 13), undisturbed)
    assert_same_bits(weights("in parts", 5, 6, 13), undisturbed)  # an epoch, a multiple of three
    assert differ(undisturbed, [v.numpy() for v in compiled(with_state).variables])


def test_an_end_that_looks_at_losses_is_asked_at_averages(sc):
    optimizer = training(compiled(plain), average_every=4)
    optimizer.optimize(MinLoss(100.0), MaxIteration(1000))
    assert optimizer.step == 4


@pytest.mark.parametrize(
    ("settings", "received"),
    [
        ({"engine": "local"}, "average_every=3 with engine='local'"),
        ({"engine": "shuffle"}, "average_every=3 with engine='shuffle'"),
        (
            {"engine": "auto", "num_ranks": 50},
            r"'auto', which is 'shuffle': .* slots, \d of them free now, for 50 ranks",
        ),
        ({"average_every": 0}, "average_every is a whole number of at least 1. Received: 0"),
        ({"average_every": None}, "average_every is a whole number .* Received: None"),
        ({"average_every": 2.5}, "average_every is a whole number .* Received: 2.5"),
        ({"wire_dtype": "float16"}, "wire_dtype='float16' with average_every=3"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_said(sc, settings, received):
    model = compiled(plain)
    before = model.get_weights()
    with pytest.raises(InvalidInputError, match=received):
        training(model, **settings).optimize(MaxIteration(3))
    assert_same_bits(model.get_weights(), before)


def test_auto_takes_gang(sc):
    optimizer = training(compiled(plain), engine="auto")
    optimizer.optimize(MaxIteration(3))
    assert optimizer.step == 3
