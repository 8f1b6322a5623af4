"""The learning rate of large batches, from that of small ones."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from tfspark.errors import InvalidInputError, require
from tfspark.train.plateau import Plateau
from tfspark.train.schedules import Schedule
from tfspark.train.sequence import SequentialSchedule


@keras.saving.register_keras_serializable("tfspark")
class LinearScaling(Schedule):
    """The linear scaling rule with gradual warm-up: k times the batch, k times the rate.

    ```
    scaled = learning_rate * (batch_size / base_batch_size) ** power
    ```

    During the first `warmup_epochs` the rate grows by the same amount at every step, from
    `learning_rate` to `scaled`. Afterwards it is `scaled`, or what `then` makes of it. A batch
    smaller than `base_batch_size` has a lower rate and needs no warm-up.

    The point of it is to change the batch, or the ranks that a batch per rank is multiplied with,
    and nothing else. So the rate is that of a batch that is known to train well.

    Args:
        learning_rate: the rate for batches of `base_batch_size` rows.
        base_batch_size: rows of the batch that `learning_rate` was chosen for.
        warmup_epochs: length of the warm-up; need not be whole. 0: none.
        power: 1: the linear rule, for SGD and LARS. 0.5: the square root, customary with LAMB.
        then: a schedule of tfspark without a base rate of its own, which is given `scaled`. It
            counts from the start of the training, warm-up included, as in the paper. A
            `Plateau` comes after this one in a `SequentialSchedule` instead.
        batch_size: rows of a global batch, over all ranks; filled in by tfspark when training
            starts, needed in plain Keras.
        steps_per_epoch: likewise.

    Raises:
        InvalidInputError: an argument is out of its range.

    Source: Goyal et al.: Accurate, Large Minibatch SGD, arXiv:1706.02677, sections 2.1 and 2.2; the
    square root with LAMB: You et al., arXiv:1904.00962, section 4.

    Example:
        >>> schedule = LinearScaling(0.1, 256, warmup_epochs=1, then=EpochStep(30, 0.1))
        >>> schedule = schedule.bind(steps_per_epoch=10, batch_size=1024)
        >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 299, 300)]
        [0.1, 0.25, 0.4, 0.4, 0.04]
    """

    def __init__(
        self,
        learning_rate: float | None = None,
        base_batch_size: int = 256,
        warmup_epochs: float = 5,
        *,
        power: float = 1.0,
        then: Schedule | None = None,
        batch_size: int | None = None,
        steps_per_epoch: int | None = None,
    ):
        super().__init__(learning_rate)
        require(
            base_batch_size >= 1, "base_batch_size is at least 1", base_batch_size=base_batch_size
        )
        require(warmup_epochs >= 0, "warmup_epochs is at least 0", warmup_epochs=warmup_epochs)
        require(0 <= power <= 1, "power is from 0 to 1", power=power)
        require(
            batch_size is None or batch_size >= 1, "batch_size is at least 1", batch_size=batch_size
        )
        require(
            steps_per_epoch is None or steps_per_epoch >= 1,
            "steps_per_epoch is at least 1",
            steps_per_epoch=steps_per_epoch,
        )
        if then is not None:
            _check_follower(then)
        self.base_batch_size = base_batch_size
        self.warmup_epochs = warmup_epochs
        self.power = power
        self.then = then
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch

    def bind(self, steps_per_epoch: int, batch_size: int | None = None) -> LinearScaling:
        """This schedule for such epochs and batches, except for what it was told before."""
        steps = self.steps_per_epoch or steps_per_epoch
        rows = self.batch_size or batch_size
        then = self.then.bind(steps, rows) if self.then is not None else None
        return LinearScaling(
            self.learning_rate,
            self.base_batch_size,
            self.warmup_epochs,
            power=self.power,
            then=then,
            batch_size=rows,
            steps_per_epoch=steps,
        )

    def from_base(self, base: Any, step: Any) -> Any:
        """See the class."""
        if self.batch_size is None or self.steps_per_epoch is None:
            raise InvalidInputError(
                "LinearScaling must know batches and epochs. Received: "
                f"batch_size={self.batch_size}, steps_per_epoch={self.steps_per_epoch}. Give both, "
                "or call bind(steps_per_epoch, batch_size)."
            )
        factor = (self.batch_size / self.base_batch_size) ** self.power
        scaled = base * factor
        after = scaled if self.then is None else self.then.from_base(scaled, step)
        warmup_steps = self.warmup_epochs * self.steps_per_epoch
        if warmup_steps == 0:
            return after
        done = ops.cast(step, "float32") / warmup_steps
        start = base * min(factor, 1.0)
        return ops.where(done < 1, start + (scaled - start) * done, after)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        serialize = keras.optimizers.schedules.serialize
        return {
            **super().get_config(),
            "base_batch_size": self.base_batch_size,
            "warmup_epochs": self.warmup_epochs,
            "power": self.power,
            "then": serialize(self.then) if self.then is not None else None,
            "batch_size": self.batch_size,
            "steps_per_epoch": self.steps_per_epoch,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LinearScaling:
        """The inverse of `get_config`."""
        then = config["then"]
        if then is not None:
            then = keras.optimizers.schedules.deserialize(then)
        return cls(**{**config, "then": then})


def _check_follower(then: Any) -> None:
    if not isinstance(then, Schedule) or then.learning_rate is not None:
        raise InvalidInputError(
            "What follows the warm-up of LinearScaling is a schedule of tfspark without a "
            f"learning_rate of its own. Received: {then!r} with "
            f"learning_rate={getattr(then, 'learning_rate', None)!r}. Leave it out: the scaled "
            "rate is its base."
        )
    if isinstance(then, Plateau | SequentialSchedule | LinearScaling):
        raise InvalidInputError(
            "What follows the warm-up of LinearScaling is a function of base rate and step. "
            f"Received: {type(then).__name__}. Write SequentialSchedule().add(LinearScaling(…), "
            "steps).add(…), which goes on from the scaled rate."
        )
