"""What programs, evaluations and predictions need of a Keras model, whichever Keras it is of.

`Keras3View` and `Keras2View` are the two; `view_of` (in `from_keras`) chooses. A view looks at a
model and holds nothing of its own but the loss that takes the place of the compiled one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, Protocol

import tensorflow as tf

from tfspark.data.spec import RowSpec
from tfspark.errors import ProgramError


class KerasView(Protocol):
    """A Keras model, of Keras 3 or of tf-keras.

    Attributes:
        model: as given.
        keras: the package that it is of, for its callbacks, optimizers and files.
    """

    model: Any
    keras: ModuleType

    @property
    def compiled(self) -> bool:
        """Whether `compile` was called."""

    def has_own_step(self) -> bool:
        """Whether the model overrides `train_step`."""

    def build(self, spec: RowSpec) -> None:
        """Creates the variables of a model, its loss and its metrics, where they are not yet.

        Args:
            spec: of a row `(x, y)` or `(x, y, sample_weight)`, or of `x` alone.
        """

    def call(self, x: Any, training: bool) -> Any:
        """The model's outputs, as its trainer calls it."""

    def rewritten(self) -> AbstractContextManager[None]:
        """Within the block, layers compute the same with faster operations, where there are."""

    def loss(
        self,
        rows: Any,
        share: Any,
        x: Any,
        y: Any,
        predictions: Any,
        sample_weight: Any,
        training: bool = True,
    ) -> Any:
        """The loss of a batch, a scalar that is a mean over rows, in the graph that is being built.

        What Keras itself tracks of it, such as the losses of several outputs, is added to metrics.

        Args:
            rows: of the batch.
            share: rows of all ranks over those of this one, with which a loss that is a sum over
                rows is multiplied.
            x, y, predictions, sample_weight: of the batch.
            training: whether it is to be trained.

        Raises:
            ProgramError: there is no loss, there are no labels, or it cannot be exact over ranks.
        """

    def update_metrics(
        self, loss: Any, rows: Any, x: Any, y: Any, predictions: Any, sample_weight: Any
    ) -> None:
        """Adds a batch to the compiled metrics, as `train_step` and `test_step` do.

        Args:
            loss: what `loss` has returned for it.
            rows, x, y, predictions, sample_weight: of the batch.
        """

    def metric_variables(self) -> list[Any]:
        """The variables of the compiled metrics; after `build`."""

    def metric_names(self) -> list[str]:
        """What each of these variables is of."""

    def statistics(self) -> list[Any]:
        """All variables that metrics and losses keep: what is no model state."""

    def reset_metrics(self) -> None:
        """Sets the metrics to what they are without a row."""

    def metric_results(self) -> dict[str, Any]:
        """The metrics by their names, in the order of Keras's own logs."""

    def metrics_of(self, metrics: Any, weighted_metrics: Any) -> Any:
        """One metric object of several, in any form that `compile` takes; both None: the compiled.

        It has `name`, `variables`, `update_state(y, predictions, sample_weight)`, `reset_state` and
        `result`, a dict. None: there are none.
        """

    def clear(self) -> None:
        """Forgets tensors of a traced graph."""


def unpack(row_spec: RowSpec, batch: Sequence[Any]) -> tuple[Any, Any, Any]:
    """A flat batch as `x, y, sample_weight`, of which the last two may be None.

    Raises:
        ProgramError: the row is a tuple or list of more than three.
    """
    row = row_spec.unflatten(batch)
    if not isinstance(row, (tuple, list)):
        return row, None, None
    if len(row) > 3:
        raise ProgramError(
            "A Keras model trains on rows (x, y) or (x, y, sample_weight). "
            f"Received: a row of {len(row)} parts, {', '.join(row_spec.names)}. Group the inputs "
            "of the model and its labels: features=[…], labels=[…]."
        )
    x, y, sample_weight = (*row, None, None)[:3]
    return x, y, sample_weight


def check_loss(name: str, has_loss: bool, compares: bool, y: Any) -> None:
    """Refuses a model without a loss, and a loss without labels.

    Args:
        name: of the model.
        has_loss: whether there is any.
        compares: whether there is one that compares predictions with labels.
        y: the labels, or None.
    """
    if not has_loss:
        raise ProgramError(
            "A model needs a loss to train. "
            f"Received: model {name!r} without one. Compile it, or give loss=…."
        )
    if compares and y is None:
        raise ProgramError(
            "A loss compares predictions with labels. Received: rows without labels for model "
            f"{name!r}. Make rows (x, y), or name the columns of labels."
        )


def check_reduction(name: str, reduction: Any, exact: bool) -> None:
    """Refuses a loss that is neither a sum nor a mean over rows."""
    if not exact:
        raise ProgramError(
            "A loss must be a sum or a mean over rows to be exact over several ranks. "
            f"Received: loss {name!r} with reduction={reduction!r}. Use "
            'reduction="sum_over_batch_size" or "sum".'
        )


def check_masks(name: str, predictions: Any) -> None:
    """Refuses predictions with a mask."""
    for tensor in tf.nest.flatten(predictions):
        if getattr(tensor, "_keras_mask", None) is not None:
            raise ProgramError(
                "A loss over masked predictions is divided by the number of unmasked values, "
                "which differs from rank to rank. "
                f"Received: model {name!r}, whose output carries a mask. End the model with "
                "a layer that drops the mask, and give sample weights."
            )


def check_scalar(name: str, loss: Any) -> None:
    """Refuses a loss that is no scalar."""
    if loss.shape.rank != 0:
        raise ProgramError(
            f"The loss must be a scalar. Received: shape {loss.shape} from {name!r}."
        )
