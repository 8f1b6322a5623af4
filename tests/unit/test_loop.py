"""Where rounds end, on an engine that takes no steps but says how long they took."""

import random
from dataclasses import dataclass, field

import pytest

from tfspark import EveryEpoch, MaxIteration, MinLoss, SeveralIteration
from tfspark.data.order import BatchOrder
from tfspark.sync.engine import Halt, RoundResult, StepRecord
from tfspark.sync.local import LocalEngine
from tfspark.train.loop import TrainingLoop, progress_at
from tfspark.train.pacing import Pacing
from tfspark.train.progress import ProgressReporter

ORDER = BatchOrder((7,), batch_size=1, seed=0, shuffle=False)  # seven steps an epoch


@dataclass
class Timed(LocalEngine):
    """Rounds whose steps last anything; a loss falls from 1 by a hundredth a step."""

    dice: random.Random
    ends: list[int] = field(default_factory=list)

    def round(self, commit, plan, tell=None):
        records = []
        for step in range(plan.first_step + 1, plan.first_step + plan.num_steps + 1):
            records.append(StepRecord(step, 1 - step / 100, 1))
        halt = None
        if plan.stop(records[-1].step, records[-1].loss):
            halt = Halt("stop", records[-1].step)
        self.ends.append(records[-1].step)
        seconds = len(records) * 10 ** self.dice.uniform(-2, 1)
        return RoundResult("commit", tuple(records), halt, seconds)


@dataclass
class Constant:
    def learning_rates(self, step):
        return (0.1,)

    def observe(self, scores, step):
        pass


@dataclass
class OnlyOrder:
    """What the loop reads of a run."""

    order: BatchOrder = ORDER


def ends_of_rounds(seed, end, validation, average_every):
    validated = []
    loop = TrainingLoop(
        engine=Timed(random.Random(seed)),
        run=OnlyOrder(),
        rates=Constant(),
        commit="commit",
        progress=progress_at(ORDER, 0),
        reporter=ProgressReporter(),
        pacing=Pacing(average_every=average_every),
    )
    loop.validate = lambda commit: validated.append(loop.progress.step) or {"loss": 1.0}
    loop.train(end, MaxIteration(10**9), validation)
    return loop.engine.ends, validated


@pytest.mark.parametrize(
    "validation",
    [
        EveryEpoch(),
        SeveralIteration(20),
        MaxIteration(10**6),
        EveryEpoch() & SeveralIteration(6),  # whose horizon depends on where it is asked
        EveryEpoch() | SeveralIteration(20),
    ],
    ids=str,
)
def test_averages_do_not_depend_on_time(validation):
    """Local SGD averages at each multiple, of four here, and where a round ends."""
    rounds, averages = set(), set()
    for seed in range(20):
        ends, validated = ends_of_rounds(seed, MaxIteration(50), validation, 4)
        assert validated == [s for s in range(1, 51) if validation(progress_at(ORDER, s))]
        assert {*validated, 50} <= set(ends)
        rounds.add(tuple(ends))
        averages.add(tuple(end for end in ends if end % 4))
    assert len(rounds) > 1
    assert len(averages) == 1


def test_an_end_by_loss_is_seen_at_a_multiple():
    for seed in range(10):
        ends, _ = ends_of_rounds(seed, MinLoss(0.895), MaxIteration(10**6), 4)
        assert ends[-1] % 4 == 0 and ends[-1] >= 12
