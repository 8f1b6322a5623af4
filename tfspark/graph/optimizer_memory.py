"""What a Keras optimizer remembers, as the slots of an update program, and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from tensorflow.python.eager.context import eager_mode

from tfspark.graph.assembly import join, split
from tfspark.graph.keras_2 import is_keras_2
from tfspark.graph.optimizers import optimizer_from
from tfspark.graph.program import UpdateProgram, Weight
from tfspark.graph.update import fresh_rule, slot_name

logger = logging.getLogger("tfspark")

Slots = Mapping[str, np.ndarray]
"""By name of the slot: of a vector one element for each weight, in flat order; or a scalar."""


class OptimizerMemory:
    """The variables of an optimizer, so that a training goes on where another one ended.

    Args:
        optimizer: of Keras 3 or tf-keras; built if it is not, once there is something to write.
        trainable: the variables that it is of.
        weights, variables: those of them that are trained, in flat order.
        update: the program of its rule.
    """

    def __init__(
        self,
        optimizer: Any,
        trainable: Sequence[Any],
        weights: Sequence[Weight],
        variables: Sequence[Any],
        update: UpdateProgram,
    ):
        self._optimizer, self._trainable = optimizer, list(trainable)
        self._weights, self._variables = tuple(weights), list(variables)
        self._slots = update.slots
        with eager_mode():
            self._attributes = _attributes(optimizer_from(optimizer))
        known = all(slot.name in self._attributes for slot in update.slots)
        self._is_kept = known and not is_keras_2(optimizer, "optimizers.legacy.Optimizer")

    def read(self) -> Slots | None:
        """What it remembers; None: nothing yet, or in variables that cannot be told apart."""
        if not self._is_kept or not self._is_built():
            return None
        with eager_mode():
            if not int(self._optimizer.iterations.numpy()):
                return None
            places = self._places()
            if places is None:
                logger.warning(
                    "The optimizer was built for other weights than those that are trained, and "
                    "starts anew. Compile the model after layers are frozen or unfrozen."
                )
                return None
            found = {}
            for slot in self._slots:
                held = self._held(slot.name)
                if slot.kind == "vector":
                    found[slot.name] = join([held[place].numpy() for place in places], slot.dtype)
                else:
                    found[slot.name] = np.asarray(held.numpy(), slot.dtype)
            return found

    def write(self, slots: Slots, iterations: int) -> None:
        """Sets the optimizer's variables.

        Args:
            slots: all of them.
            iterations: steps that were taken with it.
        """
        with eager_mode():
            self._optimizer.iterations.assign(iterations)
            if self._is_kept and not self._is_built():
                self._optimizer.build(self._trainable)
            places = self._places() if self._is_kept else None
            if places is None:
                return
            for slot in self._slots:
                held = self._held(slot.name)
                if slot.kind == "scalar":
                    held.assign(slots[slot.name])
                    continue
                for place, value in zip(
                    places, split(slots[slot.name], self._weights), strict=True
                ):
                    held[place].assign(value)

    def _held(self, slot: str) -> Any:
        """A list with a variable for each weight, or a variable."""
        name = self._attributes[slot]
        if not hasattr(self._optimizer, name):
            name = name.lstrip("_")  # Lion of tf-keras
        return getattr(self._optimizer, name)

    def _is_built(self) -> bool:
        return bool(getattr(self._optimizer, "built", getattr(self._optimizer, "_built", False)))

    def _places(self) -> list[int] | None:
        """Where each weight is in the optimizer's lists; None: not all of them are."""
        optimizer = self._optimizer
        if isinstance(optimizer, keras.optimizers.Optimizer):
            order = {id(v): place for place, v in enumerate(optimizer._trainable_variables)}
            found = [order.get(id(variable)) for variable in self._variables]
        else:
            index = optimizer._index_dict
            found = [index.get(optimizer._var_key(variable)) for variable in self._variables]
        places = [place for place in found if place is not None]
        return places if len(places) == len(found) else None


def _attributes(optimizer: keras.optimizers.Optimizer) -> dict[str, str]:
    """Where an optimizer keeps each slot: a list with a variable for each weight, or a variable.

    The optimizers of tf-keras keep theirs under the same names.
    """
    rule = fresh_rule(optimizer)
    shard = keras.Variable(np.ones(3, np.float32), name="shard")
    rule.build([shard])
    found = {}
    for attribute, value in vars(rule).items():
        if isinstance(value, keras.Variable):
            found[slot_name(rule, value)] = attribute
        elif isinstance(value, list) and len(value) == 1 and _is_slot(value[0], shard):
            found[slot_name(rule, value[0])] = attribute
    return found


def _is_slot(value: Any, shard: Any) -> bool:
    return isinstance(value, keras.Variable) and value is not shard
