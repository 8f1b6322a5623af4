"""How long a rank of a gang waits, and its steps with and without memory that all ranks share."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from mesh import mesh, on_all

from tfspark.data.batches import BatchReader
from tfspark.data.order import BatchOrder
from tfspark.data.spec import Field, RowSpec
from tfspark.data.store import StoreWriter
from tfspark.graph.clipping import Clipping
from tfspark.graph.from_function import program_from_function
from tfspark.graph.update import update_program
from tfspark.sync import shared
from tfspark.sync.engine import Halt, RankState, RoundPlan, Run
from tfspark.sync.gang_rank import GangRank, Patience
from tfspark.sync.rank import RankProgram

SPEC = RowSpec.of((Field("x", "float32", (150,)), Field("y", "float32", ())))
STEPS, RANKS = 6, 3
needs_sharing = pytest.mark.skipif(
    not shared.is_supported(), reason="only Linux has memory without a name"
)


def test_before_any_step_programs_are_compiled():
    assert Patience(first_s=600.0).limit_s(first=True) == 600.0
    assert Patience(first_s=600.0).limit_s(first=False) == 600.0


def test_a_slow_step_is_not_a_dead_peer():
    patience = Patience(least_s=30.0, multiple=20.0)
    patience.saw(0.01)
    assert patience.limit_s(first=False) == 30.0
    patience.saw(100.0)
    patience.saw(0.01)
    assert patience.limit_s(first=False) == 2000.0


def test_only_a_rank_that_is_new_compiles_in_a_later_round():
    patience = Patience(longest_s=2.0, first_s=600.0, least_s=30.0, multiple=20.0)
    assert patience.limit_s(first=True) == 600.0
    assert patience.limit_s(first=False) == 40.0
    assert Patience(longest_s=100.0).limit_s(first=True) == 2000.0


class Problem:
    """A hidden layer large enough to be shared, and a head in the last rank's slice."""

    def __init__(self, folder, groups=1, bad_step=0, wire_dtype=None):
        rng = np.random.default_rng(0)
        self.handles = []
        for rank in range(RANKS):
            rows = (rng.normal(size=(16, 150)), rng.normal(size=16))
            with StoreWriter(f"{folder}/rank-{rank}.arrow", SPEC, rank=rank) as writer:
                writer.append_columns(tuple(column.astype("float32") for column in rows))
            self.handles.append(writer.handle)
        # 45,451 weights: the last shard of three is padded.
        kernel = tf.Variable(rng.normal(size=(150, 301)).astype("f") / 20, name="kernel")
        head = tf.Variable(rng.normal(size=301).astype("f") / 20, name="head")
        count = tf.Variable(0, trainable=False, name="count")

        def loss_fn(batch):
            x, y = batch
            count.assign_add(1)
            out = tf.linalg.matvec(tf.tanh(x @ kernel), head)
            # The root of 0 is 0, but its gradient is not finite.
            root = tf.sqrt(tf.where(count == bad_step, 0.0, 1.0) * tf.reduce_sum(head**2))
            return tf.reduce_mean((out - y) ** 2) + 1e-3 * root

        group_of = {"kernel": 0, "head": groups - 1}
        bound = program_from_function(loss_fn, [kernel, head], SPEC, group_of=group_of.get)
        self.flat = bound.flat
        self.run = Run(
            run_id="run",
            program=bound.program,
            updates=(update_program(keras.optimizers.Adam()),) * groups,
            clippings=(Clipping(),) * groups,
            order=BatchOrder((16,) * RANKS, batch_size=12, seed=3, shuffle=True),
            mapping=None,
            seed=0,
            state=bound.state,
            num_ranks=RANKS,
            wire_dtype=wire_dtype,
        )

    def train(self, share, steps=STEPS, stop=None):
        """The states of all ranks after one round."""
        plan = RoundPlan(0, ((0.01,) * len(self.run.updates),) * steps, stop)

        def take_steps(links):
            if share:
                links.share_memory(step=0, timeout_s=60)
            reader = BatchReader(self.handles[links.rank], self.run.order)
            rank = GangRank(RankProgram(self.run), reader, links, Patience())
            state = rank.take_steps(RankState.initial(self.run, self.flat, links.rank), plan)
            return state, rank._gradients is not None

        with mesh(RANKS) as links:
            states, shares = zip(*on_all(links, take_steps), strict=True)
        assert set(shares) == {share}
        return states


def assert_same(states, others):
    for state, other in zip(states, others, strict=True):
        assert state.step == other.step
        np.testing.assert_array_equal(state.shard, other.shard)
        for slots, other_slots in zip(state.slots, other.slots, strict=True):
            for slot, other_slot in zip(slots, other_slots, strict=True):
                np.testing.assert_array_equal(slot, other_slot)


@needs_sharing
@pytest.mark.parametrize("wire_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_same_bits_with_and_without_common_memory(tmp_path, groups, wire_dtype):
    problem = Problem(tmp_path, groups, wire_dtype=wire_dtype)
    apart, together = problem.train(share=False), problem.train(share=True)
    assert_same(apart, together)
    assert [record.loss for record in together[0].records] == [
        record.loss for record in apart[0].records
    ]
    first = RankState.initial(problem.run, problem.flat, 0)
    assert (together[0].shard != first.shard).mean() > 0.9


@needs_sharing
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("bad_step", [1, 3, STEPS])
def test_what_one_owner_alone_sees_ends_the_round_of_all_before_it(tmp_path, bad_step, share):
    """Also in the last step of a round, after which no weights tell the others."""
    states = Problem(tmp_path, bad_step=bad_step).train(share)
    assert {state.halt for state in states} == {Halt("non_finite", bad_step, 0, "gradient")}
    assert {len(state.records) for state in states} == {bad_step - 1}
    if bad_step > 1:
        assert_same(states, Problem(tmp_path).train(share, steps=bad_step - 1))
    else:
        assert {state.step for state in states} == {0}


def test_what_one_owner_alone_sees_in_the_step_that_all_others_stop_at(tmp_path):
    states = Problem(tmp_path, bad_step=3).train(False, stop=lambda step, loss: step == 3)
    assert {state.halt for state in states} == {Halt("non_finite", 3, 0, "gradient")}
    assert {state.step for state in states} == {2}
    states = Problem(tmp_path).train(False, stop=lambda step, loss: step == 3)
    assert {(state.step, state.halt) for state in states} == {(3, Halt("stop", 3))}
