"""What steps without slow ranks cost a training."""

from __future__ import annotations

from collections.abc import Sequence

from tfspark.data.order import BatchOrder
from tfspark.sync.engine import StepRecord


class LeftOutRows:
    """Counts the rows of ranks that were left out; its string is one line for the log.

    Args:
        order: says how many rows each rank has of each batch.

    Example:
        >>> counted = LeftOutRows(BatchOrder((12, 4), batch_size=4, seed=0, shuffle=True))
        >>> counted.add([StepRecord(1, 0.5, 4), StepRecord(2, 0.5, 3, left_out=(1,))])
        >>> print(counted)
        Ranks were left out of 1 of 2 steps, 1 in all, and with them 12.5 % of the rows.
    """

    def __init__(self, order: BatchOrder):
        self._order = order
        self._steps = self._steps_without = self._ranks = self._rows = self._dropped = 0

    def add(self, records: Sequence[StepRecord]) -> None:
        """Counts finished steps."""
        for record in records:
            rows = self._order.rank_rows(self._order.locate(record.step - 1)[1])
            self._steps += 1
            self._steps_without += bool(record.left_out)
            self._ranks += len(record.left_out)
            self._rows += sum(rows)
            self._dropped += sum(rows[rank] for rank in record.left_out)

    def __str__(self) -> str:
        percent = 100 * self._dropped / max(self._rows, 1)
        return (
            f"Ranks were left out of {self._steps_without} of {self._steps} steps, "
            f"{self._ranks} in all, and with them {percent:.1f} % of the rows."
        )
