"""A gradient that is exchanged bucket by bucket, while the rest of it is computed."""

from threading import Barrier, Event

import numpy as np
import pytest
from gang_problem import RANKS, STEPS, Problem, assert_same, needs_sharing

from tfspark.errors import PeerLostError, TrainingError
from tfspark.sync.early_rank import EarlyRank
from tfspark.sync.engine import Halt
from tfspark.sync.gang import rank_class
from tfspark.sync.gang_rank import GangRank
from tfspark.sync.links import Links
from tfspark.sync.rank import RankProgram


def whole(problem, states):
    """Weights and slots of all ranks together, whatever the buckets."""
    layout = problem.run.layout
    vectors = [
        [slot for slots in state.slots for slot in slots if np.ndim(slot)] for state in states
    ]
    return [
        layout.join([state.shard for state in states]),
        *(layout.join(list(each)) for each in zip(*vectors, strict=True)),
    ]


@pytest.fixture(params=[{}, {"wire_dtype": "bfloat16"}, {"accumulation_steps": 2}], ids=str)
def settings(request):
    return request.param


@pytest.mark.parametrize("share", [False, pytest.param(True, marks=needs_sharing)])
def test_the_same_bits_as_with_one_bucket(tmp_path, settings, share):
    plain = Problem(tmp_path, **settings)
    early = Problem(tmp_path, gradient_buckets=4, **settings)
    assert rank_class(early.run) is EarlyRank
    assert [len(tensors) for tensors in early.run.layout.bucket_tensors()] == [1, 2]
    states, others = early.train(share), plain.train(share)
    for array, other in zip(whole(early, states), whole(plain, others), strict=True):
        np.testing.assert_array_equal(array, other)
    assert [record.loss for record in states[0].records] == [
        record.loss for record in others[0].records
    ]
    assert states[0].step == STEPS


@needs_sharing
def test_the_same_bits_where_some_ranks_share_memory(tmp_path, monkeypatch):
    """As two on one host and one on another."""
    share_memory = Links.share_memory

    def share_with_some(self, **at):
        share_memory(self, **at)
        apart = self.peers if self.rank == 2 else (2,)
        self._readers = self._readers.difference(apart)
        for peer in apart:
            del self._inboxes[peer]

    monkeypatch.setattr(Links, "share_memory", share_with_some)
    plain, early = (Problem(tmp_path, gradient_buckets=n) for n in (1, 4))
    states, others = early.train("some"), plain.train("some")
    for array, other in zip(whole(early, states), whole(plain, others), strict=True):
        np.testing.assert_array_equal(array, other)


def test_the_same_bits_where_a_rank_has_no_rows(tmp_path):
    """48 rows are four batches of 12; a fifth of 2 rows leaves the last rank without any."""
    plain, early = (Problem(tmp_path, batch_size=23, gradient_buckets=n) for n in (1, 4))
    assert 0 in early.run.order.rank_rows(2)
    states, others = early.train(False), plain.train(False)
    for array, other in zip(whole(early, states), whole(plain, others), strict=True):
        np.testing.assert_array_equal(array, other)


def test_parameter_groups_are_buckets(tmp_path):
    plain, early = (Problem(tmp_path, groups=2, gradient_buckets=n) for n in (1, 4))
    assert rank_class(early.run) is EarlyRank
    assert early.run.layout == plain.run.layout
    assert_same(early.train(False), plain.train(False))


def test_with_one_bucket_there_is_nothing_to_be_early_with(tmp_path):
    assert rank_class(Problem(tmp_path).run) is GangRank


@pytest.mark.parametrize("bad_step", [1, 3])
def test_a_sum_that_is_not_finite_ends_the_round_of_all_before_it(tmp_path, bad_step):
    states = Problem(tmp_path, bad_step=bad_step, gradient_buckets=4).train(False)
    assert {state.halt for state in states} == {Halt("non_finite", bad_step, 0, "gradient")}
    assert {state.step for state in states} == {bad_step - 1}


def test_a_bucket_travels_while_the_gradient_is_computed(tmp_path, monkeypatch):
    """No rank has its whole gradient before every rank has the last bucket of all others."""
    exchanged = Barrier(2 * RANKS)  # the exchanges of all ranks, and their gradients
    exchange = Links.exchange

    def exchange_and_say(self, outgoing, **more):
        received = exchange(self, outgoing, **more)
        if any(message.kind == "bucket" for message in received.values()):
            exchanged.wait(60)
        return received

    class Waiting(RankProgram):
        def contribute(self, *arguments, on_bucket, **more):
            def hand_on(bucket):
                if bucket == 1:
                    on_bucket(1)

            contribution = super().contribute(*arguments, on_bucket=hand_on, **more)
            exchanged.wait(60)
            return contribution

    monkeypatch.setattr(Links, "exchange", exchange_and_say)
    states = Problem(tmp_path, gradient_buckets=4).train(False, steps=2, program_class=Waiting)
    assert {state.step for state in states} == {2}


@pytest.mark.parametrize("has_handed_over", [False, True])
def test_an_error_in_a_gradient_is_raised_by_its_rank(tmp_path, has_handed_over):
    failed = Event()

    class Failing(RankProgram):
        def contribute(self, rank, *arguments, on_bucket, **more):
            if rank != 0:
                return super().contribute(rank, *arguments, on_bucket=on_bucket, **more)
            if has_handed_over:
                super().contribute(rank, *arguments, on_bucket=on_bucket, **more)
            failed.set()
            raise TrainingError("of the user", rank=rank)

    # The errors of the others, which lost a peer, come after that of rank 0.
    with pytest.raises(TrainingError, match="of the user") as caught:
        Problem(tmp_path, gradient_buckets=4).train(False, program_class=Failing)
    assert failed.is_set()
    assert not isinstance(caught.value, PeerLostError) and caught.value.where["rank"] == 0
