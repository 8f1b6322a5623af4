"""Gradients that are exchanged in buckets, in Spark: which trainings do so, and to what result."""

import keras
import pytest
from training import assert_close, assert_same_bits, classified, differ

from tfspark import LeaveOut, MaxIteration, TFDataset, TFOptimizer
from tfspark.errors import InvalidInputError
from tfspark.sync.early_rank import EarlyRank
from tfspark.sync.gang import rank_class
from tfspark.train.engines import buckets_that_pay
from tfspark.train.recipe import Settings

OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    # Its sums over whole tensors are made of other parts: the same, but for the last bits.
    "lamb": lambda: keras.optimizers.Lamb(0.02, weight_decay=0.1, clipnorm=0.05),
}


def training(optimizer="adam", **settings):
    """A small network, whose arrays are too small to go through memory that ranks share."""
    keras.utils.set_random_seed(5)
    dense = keras.layers.Dense
    hidden = [dense(11, "relu", name=f"hidden{index}") for index in range(3)]
    model = keras.Sequential([keras.Input((6,)), *hidden, dense(3, name="out")], name="model")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(OPTIMIZERS[optimizer](), loss)
    dataset = TFDataset.from_ndarrays(classified(21), batch_size=8, seed=3)
    settings = {"engine": "gang", "num_ranks": 2, "progress": False, **settings}
    return model, TFOptimizer.from_keras(model, dataset, **settings)


def trained(steps=6, **settings):
    model, optimizer = training(**settings)
    optimizer.optimize(MaxIteration(steps))
    run = optimizer._training.loop.run
    optimizer.close()
    return model.get_weights(), run


@pytest.mark.parametrize("wire_dtype", [None, "bfloat16"])
def test_buckets_change_no_bit(sc, wire_dtype):
    early, run = trained(gradient_buckets=3, wire_dtype=wire_dtype)
    assert rank_class(run) is EarlyRank and len(run.layout.buckets) == 3
    plain, run = trained(wire_dtype=wire_dtype)
    assert rank_class(run) is not EarlyRank
    assert_same_bits(early, plain)


def test_rules_with_sums_over_whole_tensors(sc):
    early, _ = trained(optimizer="lamb", gradient_buckets=3)
    plain, _ = trained(optimizer="lamb")
    assert_close(early, plain, rtol=1e-5)


@pytest.mark.parametrize("before, after", [(3, None), (None, 3)])
def test_a_checkpoint_goes_on_with_other_buckets(sc, tmp_path, before, after):
    trained(steps=3, model_dir=str(tmp_path), gradient_buckets=before)
    resumed, _ = trained(steps=6, model_dir=str(tmp_path), gradient_buckets=after)
    undisturbed, _ = trained(steps=6)
    assert_same_bits(resumed, undisturbed)


def test_a_checkpoint_goes_on_with_other_ranks(sc, tmp_path):
    weights, _ = trained(steps=3, model_dir=str(tmp_path), gradient_buckets=3)
    model, optimizer = training(model_dir=str(tmp_path), engine="local", num_ranks=3)
    optimizer.optimize(MaxIteration(3))
    assert optimizer.step == 3
    assert_same_bits(model.get_weights(), weights)
    optimizer.optimize(MaxIteration(4))  # the slots are there too
    assert differ(model.get_weights(), weights)
    optimizer.close()


@pytest.mark.parametrize("engine", ["local", "shuffle"])
def test_other_engines_refuse_it(sc, engine):
    _, optimizer = training(engine=engine, gradient_buckets=2)
    message = rf"gradient_buckets needs the engine 'gang'.*Received: 2 with the engine '{engine}'"
    with pytest.raises(InvalidInputError, match=message):
        optimizer.optimize()


@pytest.mark.parametrize("settings", [{"average_every": 4}, {"leave_out": LeaveOut()}], ids=str)
def test_not_with_ranks_that_are_not_in_step(settings):
    with pytest.raises(InvalidInputError, match=r"in buckets.*Received: gradient_buckets=2 with"):
        Settings.of(gradient_buckets=2, **settings)
    assert Settings.of(gradient_buckets=1, **settings).gradient_buckets == 1


@pytest.mark.parametrize("count", [0, -1, 2.5, "2"])
def test_the_setting_is_a_number_of_buckets(count):
    with pytest.raises(InvalidInputError, match="gradient_buckets is a whole number of at least 1"):
        Settings.of(gradient_buckets=count)


def test_as_many_as_pay():
    """Of what travels between hosts; small slices do not pay."""
    mb = 1 << 20
    assert buckets_that_pay("gang", 100 * mb, ["a", "b"]) == 4
    assert buckets_that_pay("gang", 100 * mb, ["a", "a"]) == 1
    assert buckets_that_pay("shuffle", 100 * mb, ["a", "b"]) == 1
    assert buckets_that_pay("gang", mb, ["a", "b"]) == 2
    assert buckets_that_pay("gang", mb // 4, ["a", "b"]) == 1
    assert buckets_that_pay("gang", 100 * mb, [str(host) for host in range(512)]) == 1
