"""Which engine a training uses, and its making."""

from __future__ import annotations

import logging
from collections.abc import Collection
from functools import partial
from typing import Any

from pyspark import SparkContext

from tfspark.data.dataset import TFDataset
from tfspark.errors import InvalidInputError
from tfspark.slots import busy_slots, in_process, settings_of, slots
from tfspark.sync import wire
from tfspark.sync.carriers import through_files, through_spark
from tfspark.sync.engine import Engine
from tfspark.sync.gang import GangEngine
from tfspark.sync.jobs import Jobs
from tfspark.sync.local import LocalEngine
from tfspark.sync.shuffle import ShuffleEngine
from tfspark.sync.spark_engine import Carriers
from tfspark.sync.stragglers import LeaveOut
from tfspark.train.failure_policy import FailurePolicy

logger = logging.getLogger("tfspark")

ENGINES = ("local", "shuffle", "gang")

# What gradients are exchanged in, where that is left to tfspark; see docs/scaling.md.
_MOST_BUCKETS = 4
_LEAST_SLICE_BYTES = 1 << 18
SETTING = "spark.tfspark.engine"


def choose_engine(
    requested: str, context: SparkContext | None, num_ranks: int, average_every: int = 1
) -> str:
    """The engine to use; says in one log line which one `"auto"` took and why.

    Args:
        requested: `"auto"`, or the name of an engine. `"auto"` takes the application's setting
            `spark.tfspark.engine` where there is one.
        context: the active SparkContext, or None.
        num_ranks: N.
        average_every: steps between two averages of local SGD; more than 1 needs `gang`.

    Raises:
        InvalidInputError: there is no such engine, or it needs what is not there.
    """
    source = "engine="
    if requested == "auto" and context is not None:
        requested, source = settings_of(context).get(SETTING, "auto"), f"{SETTING}="
    if requested == "auto":
        chosen, reason = _best(context, num_ranks)
        if chosen != "gang" and average_every > 1:
            raise _no_local_steps(average_every, f"engine='auto', which is {chosen!r}: {reason}")
        logger.info("Engine %r, because %s.", chosen, reason)
        return chosen
    if requested not in ENGINES:
        raise InvalidInputError(
            f"An engine is 'auto' or one of {', '.join(map(repr, ENGINES))}. "
            f"Received: {source}{requested!r}."
        )
    if requested != "gang" and average_every > 1:
        raise _no_local_steps(average_every, f"{source}{requested!r}")
    if requested != "local" and context is None:
        raise InvalidInputError(
            f"The engine {requested!r} runs in Spark. Received: no active SparkContext. "
            "Call init_nncontext() first, or use engine='local'."
        )
    obstacle = gang_obstacle(context, num_ranks) if requested == "gang" and context else None
    if obstacle:
        raise InvalidInputError(
            f"The engine 'gang' runs all ranks at the same time. Received: {obstacle}. "
            "Use engine='shuffle', which has no such needs."
        )
    return requested


def _no_local_steps(average_every: int, engine: str) -> InvalidInputError:
    return InvalidInputError(
        "Only ranks of the engine 'gang' have weights of their own, which can be averaged every "
        f"few steps. Received: average_every={average_every} with {engine}. Use engine='gang' on "
        "Spark with a slot for every rank, or average_every=1."
    )


def _best(context: SparkContext | None, num_ranks: int) -> tuple[str, str]:
    """The engine that "auto" takes, and why."""
    if context is None:
        return "local", "there is no SparkContext"
    obstacle = gang_obstacle(context, num_ranks)
    if obstacle:
        return "shuffle", f"'gang' cannot run: {obstacle}"
    reason = f"there are slots for all {num_ranks} ranks at the same time"
    free = slots(context) - busy_slots(context)
    if free < num_ranks:
        reason += f" (free now: {max(0, free)}, a round waits for the others)"
    return "gang", reason


def gang_obstacle(context: SparkContext, num_ranks: int) -> str | None:
    """What keeps the engine `gang` from running here, or None."""
    if settings_of(context).get("spark.dynamicAllocation.enabled") == "true":
        return "dynamic allocation, with which Spark runs no barrier stages"
    available = slots(context)
    if available < num_ranks:
        free = max(0, available - busy_slots(context))
        return f"{available} task slots, {free} of them free now, for {num_ranks} ranks"
    return None


def check_leave_out(leave_out: LeaveOut | None, name: str, num_ranks: int) -> None:
    """Whether an engine can leave out so many of its ranks.

    Raises:
        InvalidInputError: it cannot.
    """
    if leave_out is None:
        return
    if name != "gang":
        raise InvalidInputError(
            "leave_out needs the engine 'gang', whose ranks see each other during a step. "
            f"Received: {leave_out} with the engine {name!r}. Use engine='gang', or no leave_out."
        )
    if leave_out.most_ranks >= num_ranks:
        raise InvalidInputError(
            f"A step needs a rank that is not left out. Received: {leave_out} and {num_ranks} "
            f"rank{'s' * (num_ranks > 1)}. Lower most_ranks, or train on more ranks."
        )


def check_gradient_buckets(requested: int | None, name: str) -> None:
    """Whether an engine exchanges a gradient in several buckets.

    Raises:
        InvalidInputError: it does not.
    """
    if (requested or 1) > 1 and name != "gang":
        raise InvalidInputError(
            "gradient_buckets needs the engine 'gang', whose ranks exchange gradients while they "
            f"compute. Received: {requested} with the engine {name!r}. Use engine='gang', or no "
            "gradient_buckets."
        )


def buckets_that_pay(name: str, num_bytes: int, hosts: Collection[str]) -> int:
    """The most buckets that a gradient should be exchanged in, each as soon as it is computed.

    Ranks of one host share memory, where nothing travels. Between hosts an exchange of small slices
    is bound by the number of messages, and every bucket adds to that.

    Args:
        name: of the engine.
        num_bytes: of a gradient on its way.
        hosts: of every rank.
    """
    if name != "gang" or len(set(hosts)) < 2:
        return 1
    return max(1, min(_MOST_BUCKETS, num_bytes // len(hosts) // _LEAST_SLICE_BYTES))


def materialise(
    name: str,
    dataset: TFDataset,
    num_ranks: int,
    context: SparkContext | None,
    policy: FailurePolicy,
) -> Any:
    """The data set as this engine reads it; has `handles` (by rank) and `rdd` where Spark is."""
    if name == "local":
        return dataset.materialise_local(num_ranks)
    assert context is not None
    with Jobs(context, policy.wait_for_slots_s).job():
        return dataset.materialise(context, num_ranks, shares_files=in_process(context))


def make_engine(
    name: str, materialised: Any, context: SparkContext | None, policy: FailurePolicy
) -> Engine:
    """An engine over a materialised training set."""
    if name == "local":
        return LocalEngine(materialised.handles)
    assert context is not None
    carriers: Carriers = through_spark
    if in_process(context):
        carriers = partial(through_files, wire.scratch_folder(context))
    settings = context, materialised.rdd, carriers, policy.wait_for_slots_s
    if name == "gang":
        return GangEngine(*settings, takes_turns=policy.lost_slots == "take_turns")
    return ShuffleEngine(*settings)
