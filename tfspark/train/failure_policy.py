"""What happens after a failure: the same job again, or an error.

Jobs read a commit and never change it, so one that failed can be done again, to the same bits. The
policy decides whether it is worth trying:

* *infrastructure*: a process, a host, a disk or the network failed. Done again, after a pause that
  grows, up to a number of failures in a row and of failures within a time.
* *user*: a function of the user raised. It would raise again, most likely; done again only as
  often as the user allows, which by default is never.
* anything else (NaN, an argument that breaks a rule, a checkpoint that does not fit) is no matter
  of trying: it is raised.
"""

from __future__ import annotations

import enum
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tfspark.data.failures import driver_errors
from tfspark.errors import (
    CheckpointWriteError,
    PeerLostError,
    ResourceError,
    SparkJobError,
    StoreLostError,
    TFSparkError,
    UserFunctionError,
    WorkerLostError,
    require,
)

logger = logging.getLogger("tfspark")

T = TypeVar("T")

LOST_SLOTS = ("take_turns", "fewer_ranks")

_FIRST_PAUSE_S = 1.0
_MOST_SHOWN = 300  # characters of an error in a line of the log


class Decision(enum.Enum):
    """What to do after a failure."""

    RETRY = "retry"
    RAISE = "raise"


class Cause(enum.Enum):
    """Whose failure it is."""

    INFRASTRUCTURE = "infrastructure"
    USER = "user"


_CAUSES: dict[type[TFSparkError], Cause] = {
    StoreLostError: Cause.INFRASTRUCTURE,
    WorkerLostError: Cause.INFRASTRUCTURE,
    PeerLostError: Cause.INFRASTRUCTURE,
    ResourceError: Cause.INFRASTRUCTURE,
    SparkJobError: Cause.INFRASTRUCTURE,
    CheckpointWriteError: Cause.INFRASTRUCTURE,
    UserFunctionError: Cause.USER,
}


def cause_of(error: TFSparkError) -> Cause | None:
    """Whose failure an error is; None: the same job would fail again."""
    for kind in type(error).__mro__:
        if kind in _CAUSES:
            return _CAUSES[kind]
    return None


@dataclass(frozen=True)
class FailurePolicy:
    """How often a job that failed is done again before its error is raised.

    Spark retries tasks too (`spark.task.maxFailures`), but not on an embedded master, not in the
    barrier stages of the engine `"gang"`, and not once it has given up a job.

    Attributes:
        infrastructure_retries: most retries within `window_s` after a process, a host, a disk or
            the network failed.
        user_retries: most retries within `window_s` after a function of the user raised.
        window_s: seconds that both count.
        in_a_row: most retries of one job, whatever the cause.
        longest_pause_s: before the second retry of a job there is a pause of one second, doubled
            with each further one up to this, in which a cluster replaces what it has lost.
        wait_for_slots_s: how long a round of the engine `"gang"` waits for executors in place of
            those that were lost, and any job for the first one. `float("inf")`: until they are
            there.
        lost_slots: how a gang goes on if they do not come. `"take_turns"`: the same ranks share
            the executors that are left, to the same bits, until others are back. `"fewer_ranks"`:
            with as many ranks as there are slots, from a checkpoint that is written for that, so
            it needs `model_dir`; and with all of them from the first checkpoint on when there are
            executors for them. So it may also start with fewer than `num_ranks`, and grows when
            more come. The global batch stays the same; which rows are in it differs.

    Raises:
        InvalidInputError: a number is negative, or the window is empty.

    Example:
        >>> FailurePolicy(infrastructure_retries=20, window_s=600).in_a_row
        5
    """

    infrastructure_retries: int = 100
    user_retries: int = 0
    window_s: float = 3600.0
    in_a_row: int = 5
    longest_pause_s: float = 8.0
    wait_for_slots_s: float = 30.0
    lost_slots: str = "take_turns"

    def __post_init__(self) -> None:
        counts = (self.infrastructure_retries, self.user_retries, self.in_a_row)
        require(
            all(isinstance(count, int) and count >= 0 for count in counts),
            "Retries of a FailurePolicy are whole numbers of at least 0",
            infrastructure_retries=self.infrastructure_retries,
            user_retries=self.user_retries,
            in_a_row=self.in_a_row,
        )
        require(
            0 < self.window_s < math.inf
            and 0 <= self.longest_pause_s < math.inf
            and self.wait_for_slots_s >= 0,
            "A FailurePolicy counts within a window of more than 0 seconds, and pauses and waits "
            "for at least 0",
            window_s=self.window_s,
            longest_pause_s=self.longest_pause_s,
            wait_for_slots_s=self.wait_for_slots_s,
        )

        require(
            self.lost_slots in LOST_SLOTS,
            f"lost_slots of a FailurePolicy is one of {', '.join(map(repr, LOST_SLOTS))}",
            lost_slots=self.lost_slots,
        )

    def limit(self, cause: Cause) -> int:
        """Most retries of a cause within the window."""
        return self.user_retries if cause is Cause.USER else self.infrastructure_retries

    def pause_s(self, in_a_row: int) -> float:
        """Seconds before so many a retry of one job."""
        if in_a_row <= 1:
            return 0.0
        # A float overflows beyond any sensible number of retries.
        return min(_FIRST_PAUSE_S * 2 ** min(in_a_row - 2, 60), self.longest_pause_s)


class Failures:
    """The failures of a training so far; decides by its policy and says so in the log.

    Args:
        policy: what to do.
        clock: seconds that only grow.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        policy: FailurePolicy,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._policy = policy
        self._clock = clock
        self._sleep = sleep
        self._retried_at: dict[Cause, deque[float]] = {cause: deque() for cause in Cause}

    def insist(self, job: Callable[[], T], mend: Callable[[TFSparkError], None]) -> T:
        """The result of a job, which is done again as often as the policy allows.

        Args:
            job: may be called again after it has failed.
            mend: called with the error before the job is done again. What it raises counts as a
                failure of the job.

        Raises:
            TFSparkError: the last one of the job.
        """
        in_a_row, broken = 0, None
        while True:
            try:
                with driver_errors():
                    if broken is not None:
                        mend(broken)
                        broken = None
                    return job()
            except TFSparkError as error:
                in_a_row += 1
                cause = cause_of(error)
                if cause is None or self.decide(error, in_a_row, cause) is Decision.RAISE:
                    raise
                broken = error
            self._sleep(self._policy.pause_s(in_a_row))

    def decide(self, error: TFSparkError, in_a_row: int, cause: Cause) -> Decision:
        """What to do after a failure, which counts from now on if the decision is to retry.

        Args:
            error: that a job raised.
            in_a_row: failures of this job, this one included.
            cause: whose failure it is.
        """
        policy, now, earlier = self._policy, self._clock(), self._retried_at[cause]
        while earlier and now - earlier[0] >= policy.window_s:
            earlier.popleft()
        limit = policy.limit(cause)
        retry = in_a_row <= policy.in_a_row and len(earlier) < limit
        decision = Decision.RETRY if retry else Decision.RAISE
        shown = " ".join(f"{type(error).__name__}: {error}".split())
        if len(shown) > _MOST_SHOWN:
            shown = shown[: _MOST_SHOWN - 1] + "…"
        pause_s = policy.pause_s(in_a_row) if retry else 0.0
        logger.warning(
            "Failure policy: %s%s (%s; %d of %d retries of this job, %d of %d within %g s). %s",
            decision.name,
            f" after {pause_s:g} s" if pause_s else "",
            cause.value,
            in_a_row - (not retry),
            policy.in_a_row,
            len(earlier) + retry,
            limit,
            policy.window_s,
            shown,
        )
        if retry:
            earlier.append(now)
        return decision
