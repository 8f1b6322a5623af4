"""The engine `local`: every rank in this process, one after the other. The reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tfspark.data.batches import BatchReader, evaluation_batches
from tfspark.data.store import Handle
from tfspark.errors import TrainingError
from tfspark.graph.program import Evaluation
from tfspark.graphdef.pure import PureGraph
from tfspark.sync.engine import (
    Engine,
    RankState,
    RoundPlan,
    RoundResult,
    Run,
    StepRates,
    StepRecord,
    merge_accumulators,
    merge_outcomes,
)
from tfspark.sync.messages import gradient_message, shard_message
from tfspark.sync.rank import RankProgram, Replica, rank_program


class LocalEngine(Engine):
    """Ranks take turns in this process; a commit is the list of their states.

    Args:
        handles: of the training set, by rank.
    """

    name = "local"

    def __init__(self, handles: Sequence[Handle]):
        self._handles = handles
        self._run: Run | None = None
        self._readers: list[BatchReader] = []

    def start(self, run: Run, make_state: Callable[[Run, int], RankState]) -> list[RankState]:
        self._run = run
        self._readers = [BatchReader(handle, run.order, run.mapping) for handle in self._handles]
        return [make_state(run, rank) for rank in range(run.num_ranks)]

    def round(
        self,
        commit: list[RankState],
        plan: RoundPlan,
        tell: Callable[[StepRecord], None] | None = None,
    ) -> RoundResult:
        started = time.perf_counter()
        states = [state.settled() for state in commit]
        for index, rates in enumerate(plan.learning_rates):
            states = self._step(states, rates, plan, last=index + 1 == plan.num_steps)
            if any(state.halt for state in states):
                break
        outcome = merge_outcomes([(s.step, s.halt, tuple(s.records)) for s in states])
        return RoundResult(
            commit=states if outcome.consistent else None,
            records=outcome.records,
            halt=outcome.halt,
            seconds=time.perf_counter() - started,
        )

    def _step(
        self, states: list[RankState], rates: StepRates, plan: RoundPlan, last: bool
    ) -> list[RankState]:
        program = self._program
        replica = self._replica(states)
        step = states[0].step
        contributions = [
            program.contribute(rank, step, replica, reader, None if last else step + 1)
            for rank, reader in enumerate(self._readers)
        ]
        reduced = [
            program.reduce([gradient_message(program.run, part, owner) for part in contributions])
            for owner in range(program.run.num_ranks)
        ]
        sums: dict[str, np.ndarray] = {}
        for kind in () if reduced[0].halt else program.run.sums:
            parts = [
                program.tensor_sums(kind, state, part, rates, sums)
                for state, part in zip(states, reduced, strict=True)
            ]
            sums[kind] = sum_in_rank_order(parts)
        return [
            program.apply(state, part, rates, sums, plan.stop)
            for state, part in zip(states, reduced, strict=True)
        ]

    def map_states(
        self, commit: list[RankState], function: Callable[[Run, RankState], Any]
    ) -> list[Any]:
        return [function(self._program.run, state) for state in commit]

    def collect(
        self, commit: list[RankState], select: Callable[[Run, RankState], RankState]
    ) -> Iterator[RankState]:
        return (select(self._program.run, state) for state in commit)

    def evaluate(
        self,
        commit: list[RankState],
        evaluation: Evaluation,
        handles: Sequence[Handle],
        mapping: PureGraph | None,
        batch_rows: int,
    ) -> list[np.ndarray]:
        replica = self._replica(commit, exact=True)
        parts = [
            self._program.evaluate(
                evaluation, replica, evaluation_batches(handle, batch_rows, mapping)
            )
            for handle in handles
        ]
        return merge_accumulators(evaluation, parts)

    def rebuild(self) -> None:
        # Local stores live as long as this process; one that is gone was deleted by someone.
        raise TrainingError(
            "The engine 'local' reads the stores that it wrote into this machine's temporary "
            "folder. Received: a store that is gone. Keep temporary files while training runs."
        )

    def close(self) -> None:
        self._readers = []

    @property
    def _program(self) -> RankProgram:
        assert self._run is not None, "start() comes first"
        return rank_program(self._run)

    def _replica(self, states: Sequence[RankState], *, exact: bool = False) -> Replica:
        messages = [shard_message(state) for state in states]
        return self._program.replica(messages, exact=exact)


def sum_in_rank_order(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of one array per rank; always added in the same order."""
    total = np.zeros_like(parts[0])
    for part in parts:
        total = total + part
    return total
