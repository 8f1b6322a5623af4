"""Parameter groups: which weight is updated by which optimizer, and at which rate."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from tfspark.errors import InvalidInputError
from tfspark.graph.optimizers import (
    adaptation_mask,
    decay_mask,
    learning_rate_of,
    optimizer_from,
)
from tfspark.sync.engine import StepRates
from tfspark.train import rates
from tfspark.train.plateau import PlateauState


@dataclass(frozen=True)
class ParameterGroup:
    """Weights with one optimizer.

    Attributes:
        optimizer: of Keras.
        weight_decay: whether its weight decay applies to these weights.
        adaptation: whether it fits its rate to their norms, if its kind ever does.
        learning_rate: a number, a schedule, or a function without arguments.
        owner: number of the entry of `optim_method` that it came of.
    """

    optimizer: keras.optimizers.Optimizer
    weight_decay: bool
    adaptation: bool
    learning_rate: Any
    owner: int = 0


class ParameterGroups:
    """The parameter groups of a training and what their schedules remember.

    Attributes:
        groups: by number.
        steps_before: steps that the optimizer had taken before this training, for schedules.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        group_of: Mapping[str, int],
        turns: Sequence[int] = (),
    ):
        self.groups = tuple(groups)
        self.steps_before = 0
        self._turns = tuple(turns)  # owners that step, in a cycle; none: all in every step
        self._group_of = dict(group_of)
        self._schedules = [group.learning_rate for group in groups]
        self._states = [PlateauState() for _ in groups]

    def group_of(self, name: str) -> int:
        """The number of a weight's group."""
        return self._group_of[name]

    def bind(self, steps_per_epoch: int, batch_size: int) -> None:
        """Starts the schedules anew and tells them how long an epoch and how large a batch is."""
        self._states = [PlateauState() for _ in self.groups]
        self._schedules = [
            rates.bind(group.learning_rate, steps_per_epoch, batch_size) for group in self.groups
        ]

    def learning_rates(self, step: int) -> StepRates:
        """One rate per group, for the step after `step` finished ones; None: the group rests."""
        return tuple(
            None if own is None else rates.rate_at(schedule, own, state)
            for own, schedule, state in zip(
                self._own_steps(step), self._schedules, self._states, strict=True
            )
        )

    def _own_steps(self, step: int) -> list[int | None]:
        """The finished steps of each group, or None where it is not its turn."""
        step += self.steps_before
        if not self._turns:
            return [step] * len(self.groups)
        cycles, turn = divmod(step, len(self._turns))
        owner = self._turns[turn]
        own = cycles * self._turns.count(owner) + self._turns[:turn].count(owner)
        return [own if group.owner == owner else None for group in self.groups]

    def observe(self, scores: Mapping[str, float], step: int) -> None:
        """Tells the schedules that watch a score the result of a validation.

        Args:
            scores: by name.
            step: finished steps.

        Raises:
            InvalidInputError: a `Plateau` monitors a score that is not among them.
        """
        self._states = [
            rates.observe(schedule, state, dict(scores), step)
            for schedule, state in zip(self._schedules, self._states, strict=True)
        ]

    def state(self) -> dict[str, Any]:
        """What the schedules remember, as JSON can hold it."""
        return {
            "plateaus": [state.to_dict() for state in self._states],
            "steps_before": self.steps_before,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state()`.

        Raises:
            InvalidInputError: it is of another number of groups.
        """
        plateaus = state["plateaus"]
        if len(plateaus) != len(self.groups):
            raise InvalidInputError(
                f"Schedules go on with the parameter groups they had. Received: {len(plateaus)} "
                f"states for {len(self.groups)} groups."
            )
        self._states = [PlateauState(**plateau) for plateau in plateaus]
        self.steps_before = state.get("steps_before", 0)


def parameter_groups(
    optim_method: Any,
    weight_names: Sequence[str],
    variables: Sequence[Any] | None = None,
    turns: Sequence[str] | None = None,
) -> ParameterGroups:
    """Divides the weights of a model among optimizers.

    Args:
        optim_method: an optimizer (of Keras, or its name), or a dict of variable-name prefix to
            optimizer, where the longest prefix wins and `""` is the prefix of every name.
        weight_names: of the trainable weights, as in `Weight.name`.
        variables: the variables of these names, in the same order; needed only where an optimizer
            excludes variables, not names, from weight decay, or looks at shapes, as `LARS` does.
        turns: prefixes of the dict: whose weights step, in a cycle, while the others rest; None:
            all weights in every step.

    Returns:
        The groups, numbered in the order of the dict; of one optimizer, the weights that its
        `exclude_from_weight_decay` names, and those that a `LARS` does not adapt, are groups of
        their own.

    Raises:
        InvalidInputError: a prefix that no weight has, a weight without a prefix, a turn of no
            prefix or none of a prefix, or an `optim_method` of the wrong type.

    Example:
        >>> groups = parameter_groups(
        ...     {"dense/": Adam(1e-3), "dense_1/": SGD(0.0)}, ["dense/kernel", "dense_1/kernel"]
        ... )
        >>> groups.group_of("dense_1/kernel"), groups.learning_rates(step=0)
        (1, (0.001, 0.0))
    """
    optimizers, owners = _owners(optim_method, weight_names)
    groups: list[ParameterGroup] = []
    group_of: dict[str, int] = {}
    for number, optimizer in enumerate(optimizers):
        members = [i for i, owner in enumerate(owners) if owner == number]
        own_names = [weight_names[i] for i in members]
        own = None if variables is None else [variables[i] for i in members]
        treatments = list(
            zip(
                decay_mask(optimizer, own_names, own),
                adaptation_mask(optimizer, own_names, own),
                strict=True,
            )
        )
        rate = learning_rate_of(optimizer)
        for decays, adapts in itertools.product((True, False), repeat=2):
            treated = zip(own_names, treatments, strict=True)
            names = [name for name, treatment in treated if treatment == (decays, adapts)]
            if names:
                group_of.update(dict.fromkeys(names, len(groups)))
                groups.append(ParameterGroup(optimizer, decays, adapts, rate, number))
    return ParameterGroups(groups, group_of, _turns(optim_method, turns))


def _turns(optim_method: Any, turns: Sequence[str] | None) -> list[int]:
    """The number of the optimizer that steps, for each step of a cycle."""
    if turns is None:
        return []
    prefixes = list(optim_method) if isinstance(optim_method, Mapping) else []
    if not prefixes or set(turns) != set(prefixes):
        raise InvalidInputError(
            "turns name prefixes of the dict of optimizers, and each of them. "
            f"Received: turns={list(turns)} for the prefixes {prefixes}."
        )
    return [prefixes.index(prefix) for prefix in turns]


def _owners(optim_method: Any, names: Sequence[str]) -> tuple[list[Any], list[int]]:
    """The optimizers, and for each weight the number of its optimizer."""
    if not isinstance(optim_method, Mapping):
        return [optimizer_from(optim_method)], [0] * len(names)
    prefixes = list(optim_method)
    if not prefixes or not all(isinstance(prefix, str) for prefix in prefixes):
        raise InvalidInputError(
            "A dict of optimizers has variable-name prefixes as keys, and at least one. "
            f"Received: keys {prefixes}."
        )
    unused = [prefix for prefix in prefixes if not any(n.startswith(prefix) for n in names)]
    if unused:
        raise InvalidInputError(
            "Every prefix of a dict of optimizers must be that of a trainable variable. "
            f"Received: {unused}; the variables are {list(names)}."
        )
    orphans = [name for name in names if not any(name.startswith(p) for p in prefixes)]
    if orphans:
        raise InvalidInputError(
            "A dict of optimizers must have a prefix of every trainable variable. "
            f"Received: none for {orphans}; the prefixes are {prefixes}. "
            'Add the prefix "" for all others.'
        )
    longest = [max((p for p in prefixes if n.startswith(p)), key=len) for n in names]
    return (
        [optimizer_from(optim_method[prefix]) for prefix in prefixes],
        [prefixes.index(prefix) for prefix in longest],
    )
