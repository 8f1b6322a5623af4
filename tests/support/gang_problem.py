"""A small training of three ranks as threads, without Spark: for tests of a gang's steps."""

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
from tfspark.sync.engine import RankState, RoundPlan, Run
from tfspark.sync.gang import rank_class
from tfspark.sync.gang_rank import Patience
from tfspark.sync.rank import RankProgram

SPEC = RowSpec.of((Field("x", "float32", (151,)), Field("y", "float32", ())))
STEPS, RANKS = 6, 3
needs_sharing = pytest.mark.skipif(
    not shared.is_supported(), reason="only Linux has memory without a name"
)


class Problem:
    """Hidden layers large enough to be shared, and a head in the last rank's slice."""

    def __init__(self, folder, groups=1, bad_step=0, batch_size=12, **settings):
        rng = np.random.default_rng(0)
        self.handles = []
        for rank in range(RANKS):
            rows = (rng.normal(size=(16, 151)), rng.normal(size=16))
            with StoreWriter(f"{folder}/rank-{rank}.arrow", SPEC, rank=rank) as writer:
                writer.append_columns(tuple(column.astype("float32") for column in rows))
            self.handles.append(writer.handle)
        # 45,451 weights, 30,401 and 101: nothing of it can be divided by three.
        kernel = tf.Variable(rng.normal(size=(151, 301)).astype("f") / 20, name="kernel")
        middle = tf.Variable(rng.normal(size=(301, 101)).astype("f") / 20, name="middle")
        head = tf.Variable(rng.normal(size=101).astype("f") / 20, name="head")
        count = tf.Variable(0, trainable=False, name="count")

        def loss_fn(batch):
            x, y = batch
            count.assign_add(1)
            out = tf.linalg.matvec(tf.tanh(tf.tanh(x @ kernel) @ middle), head)
            # The root of 0 is 0, but its gradient is not finite.
            root = tf.sqrt(tf.where(count == bad_step, 0.0, 1.0) * tf.reduce_sum(head**2))
            return tf.reduce_mean((out - y) ** 2) + 1e-3 * root

        group_of = {"kernel": 0, "middle": 0, "head": groups - 1}
        weights = [kernel, middle, head]
        bound = program_from_function(loss_fn, weights, SPEC, group_of=group_of.get)
        self.flat = bound.flat
        self.run = Run(
            run_id="run",
            program=bound.program,
            updates=(update_program(keras.optimizers.Adam()),) * groups,
            clippings=(Clipping(),) * groups,
            order=BatchOrder((16,) * RANKS, batch_size, seed=3, shuffle=True),
            mapping=None,
            seed=0,
            state=bound.state,
            num_ranks=RANKS,
            **settings,
        )

    def train(self, share, steps=STEPS, stop=None, program_class=RankProgram):
        """The states of all ranks after one round.

        Args:
            share: whether ranks share memory: True, False or "some".
            steps, stop: of the plan.
            program_class: makes the programs of a rank.
        """
        plan = RoundPlan(0, ((0.01,) * len(self.run.updates),) * steps, stop)

        def take_steps(links):
            if share:
                links.share_memory(step=0, timeout_s=60)
            reader = BatchReader(self.handles[links.rank], self.run.order)
            rank = rank_class(self.run)(program_class(self.run), reader, links, Patience())
            try:
                state = rank.take_steps(RankState.initial(self.run, self.flat, links.rank), plan)
            except BaseException:
                links.close()  # as a process does that ends: the others hear of it
                raise
            return state, rank._gradients is not None

        with mesh(RANKS) as links:
            states, shares = zip(*on_all(links, take_steps), strict=True)
        assert set(shares) == {share is True}
        return states


def assert_same(states, others):
    for state, other in zip(states, others, strict=True):
        assert state.step == other.step
        np.testing.assert_array_equal(state.shard, other.shard)
        for slots, other_slots in zip(state.slots, other.slots, strict=True):
            for slot, other_slot in zip(slots, other_slots, strict=True):
                np.testing.assert_array_equal(slot, other_slot)
