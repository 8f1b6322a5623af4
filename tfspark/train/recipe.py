"""What is trained, and how: all that is known before anything runs."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, replace
from typing import Any

from pyspark import SparkContext

from tfspark.data.dataset import TFDataset
from tfspark.errors import InvalidInputError
from tfspark.graph.assembly import BoundProgram
from tfspark.graph.clipping import Clipping
from tfspark.graph.optimizer_memory import OptimizerMemory
from tfspark.graph.program import Evaluation, UpdateProgram
from tfspark.graph.update import update_program
from tfspark.sync.compression import WIRE_DTYPES
from tfspark.sync.stragglers import LeaveOut
from tfspark.train.checkpoint import CheckpointStore, Retention
from tfspark.train.failure_policy import FailurePolicy
from tfspark.train.frontends import FrontEnd, Metrics
from tfspark.train.groups import ParameterGroups, parameter_groups
from tfspark.train.manifest import Manifest, compare_tensors, compare_variables
from tfspark.train.saving import FromCheckpoint, check_resumable, newest_whole


@dataclass(frozen=True)
class Settings:
    """How a training runs, whatever it trains.

    Attributes:
        engine: "auto", "local", "shuffle" or "gang".
        num_ranks: None: the slots of the application.
        accumulation_steps: parts in which a rank computes its rows of a batch.
        average_every: steps that a rank takes alone before all ranks average.
        clip_norm: the most that the L2 norm of the whole gradient may be.
        clip_value: (smallest, largest) of every element of the gradient.
        model_dir: where checkpoints go, and where a rerun goes on from; None: nowhere.
        retention: which checkpoints stay.
        leave_out: which slow ranks a step may go on without; None: none.
        progress: whether to show progress.
        wire_dtype: what weights and gradients are rounded to on their way between ranks:
            "bfloat16" or "float16"; None: they are not.
        gradient_buckets: the most buckets that a gradient is exchanged in, each as soon as it is
            computed; None: as many as pay.
        failure_policy: what is done again after a failure, and how often.
        turns: prefixes of a dict of optimizers, of which one steps at a time, in a cycle.
    """

    engine: str = "auto"
    num_ranks: int | None = None
    accumulation_steps: int = 1
    average_every: int = 1
    clip_norm: float | None = None
    clip_value: tuple[float, float] | None = None
    model_dir: str | None = None
    retention: Retention = field(default_factory=Retention)
    leave_out: LeaveOut | None = None
    progress: bool = True
    wire_dtype: str | None = None
    gradient_buckets: int | None = None
    failure_policy: FailurePolicy = field(default_factory=FailurePolicy)
    turns: tuple[str, ...] | None = None

    @classmethod
    def of(cls, **settings: Any) -> Settings:
        """Settings by keyword.

        Raises:
            InvalidInputError: there is no such setting; names those there are.
        """
        known = [each.name for each in fields(cls)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            close = difflib.get_close_matches(unknown[0], known, n=1)
            meant = f" Did you mean {close[0]}?" if close else ""
            raise InvalidInputError(
                f"Settings of a training are {', '.join(known)}. Received: "
                f"{', '.join(unknown)}.{meant}"
            )
        return cls(**settings)

    def __post_init__(self) -> None:
        for name in ("num_ranks", "accumulation_steps", "average_every", "gradient_buckets"):
            value = getattr(self, name)
            default = value is None and name in ("num_ranks", "gradient_buckets")
            if not default and (not isinstance(value, int) or value < 1):
                raise InvalidInputError(
                    f"{name} is a whole number of at least 1. Received: {value!r}."
                )
        if self.wire_dtype not in (None, *WIRE_DTYPES):
            raise InvalidInputError(
                f"wire_dtype is None or one of {', '.join(map(repr, WIRE_DTYPES))}. Received: "
                f"{self.wire_dtype!r}."
            )
        if self.wire_dtype is not None and self.average_every > 1:
            raise InvalidInputError(
                "wire_dtype rounds what travels in a step of all ranks; an average is of the very "
                "weights and optimizer slots that training goes on from, in full precision. "
                f"Received: wire_dtype={self.wire_dtype!r} with "
                f"average_every={self.average_every}. Use one of them."
            )
        if not isinstance(self.failure_policy, FailurePolicy):
            raise InvalidInputError(
                "failure_policy is a FailurePolicy, such as FailurePolicy(user_retries=1). "
                f"Received: {self.failure_policy!r}."
            )
        if self.failure_policy.lost_slots == "fewer_ranks" and self.model_dir is None:
            raise InvalidInputError(
                "A training goes on with fewer ranks from a checkpoint. Received: "
                "lost_slots='fewer_ranks' without model_dir. Pass model_dir=…, or let the ranks "
                "take turns (lost_slots='take_turns')."
            )
        if self.leave_out is not None and not isinstance(self.leave_out, LeaveOut):
            raise InvalidInputError(
                "leave_out is LeaveOut(most_ranks, factor, in_a_row), or None. Received: "
                f"{self.leave_out!r}."
            )
        if self.leave_out is not None and self.average_every > 1:
            raise InvalidInputError(
                "A slow rank is left out of a step that all ranks take together; in local SGD each "
                f"takes its own. Received: leave_out={self.leave_out} with "
                f"average_every={self.average_every}. Use one of them."
            )
        if (self.gradient_buckets or 1) > 1 and not self.is_in_step:
            raise InvalidInputError(
                "A gradient is exchanged in buckets where every rank takes part in every step. "
                f"Received: gradient_buckets={self.gradient_buckets} with "
                f"average_every={self.average_every}, leave_out={self.leave_out}. Leave "
                "gradient_buckets to tfspark, or the others at their defaults."
            )
        # The one place that knows what a valid clipping is.
        Clipping(value=self.clip_value, global_norm=self.clip_norm)

    @property
    def is_in_step(self) -> bool:
        """Whether every rank takes part in every step."""
        return self.average_every == 1 and self.leave_out is None


@dataclass(frozen=True)
class Recipe:
    """A model, its rows, its optimizers and its settings, checked against each other.

    Attributes:
        dataset: the training rows, and where there are any the validation rows.
        bound: the gradient program, and the variables that it was made of.
        groups: the parameter groups.
        updates: the optimizer step of each group.
        evaluation: what a validation measures; None: there are no rows for one.
        settings: see there.
        store: of `settings.model_dir`, or None.
        memory: where the optimizer's slots come from and go to; None: they start anew, and stay.
    """

    dataset: TFDataset
    bound: BoundProgram
    groups: ParameterGroups
    updates: tuple[UpdateProgram, ...]
    evaluation: tuple[Evaluation, Metrics] | None
    settings: Settings
    store: CheckpointStore | None
    memory: OptimizerMemory | None = None

    @classmethod
    def of(
        cls,
        front_end: FrontEnd,
        dataset: TFDataset,
        optim_method: Any,
        settings: Settings,
        remembers: bool = False,
    ) -> Recipe:
        """Makes the programs.

        Args:
            front_end, dataset, optim_method, settings: what is trained on what, by which rule.
            remembers: whether training goes on from the variables of `optim_method`, which is one
                optimizer then, and leaves its slots there.

        Raises:
            InvalidInputError: the parts do not fit together.
        """
        if dataset.batch_size is None:
            raise InvalidInputError(
                "Training needs a global batch size. Received: a TFDataset without batch_size "
                "(batch_per_thread is for evaluation and prediction). Pass batch_size=…."
            )
        names, variables = front_end.trainable()
        groups = parameter_groups(optim_method, names, variables, settings.turns)
        bound = front_end.program(groups.group_of)
        # To trace it takes as long as the gradient, or half of it.
        evaluation = None if dataset.validation is None else front_end.evaluation()
        if dataset.validation is not None and evaluation is None:
            raise InvalidInputError(
                "A validation set needs something to measure. Received: a TFDataset with "
                "validation data, but no metrics. Pass metrics=…, or val_outputs, val_labels and "
                "val_method."
            )
        updates = _updates(groups, bound, settings)
        store = CheckpointStore(settings.model_dir) if settings.model_dir else None
        memory = None
        if remembers:
            memory = OptimizerMemory(
                optim_method, variables, bound.program.weights, bound.weight_variables, updates[0]
            )
        return cls(dataset, bound, groups, updates, evaluation, settings, store, memory)

    def changed(self, **settings: Any) -> Recipe:
        """With other settings of clipping."""
        new = replace(self.settings, **settings)
        return replace(self, settings=new, updates=_updates(self.groups, self.bound, new))

    @property
    def batch_size(self) -> int:
        """Rows of a global batch."""
        assert self.dataset.batch_size is not None  # `of` refuses it
        return self.dataset.batch_size

    def check_model_dir(self) -> None:
        """Shows a bad `model_dir` before training.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self.store is not None:
            self.store.check_writable()

    def newest_checkpoint(self) -> FromCheckpoint | None:
        """The newest whole checkpoint of `model_dir`, if there is one."""
        if self.store is None:
            return None
        manifest = newest_whole(self.store, SparkContext._active_spark_context)
        return None if manifest is None else self.resumable(self.store, manifest)

    def resumable(self, store: CheckpointStore, manifest: Manifest) -> FromCheckpoint:
        """A checkpoint to go on from.

        Raises:
            CheckpointError: it is of another model or of other optimizers.
        """
        program = self.bound.program
        compare_tensors(manifest, program.weights, program.dtype)
        check_resumable(manifest, program, self.updates)
        return FromCheckpoint(store, manifest)

    def load_weights(self, store: CheckpointStore, manifest: Manifest) -> None:
        """Sets the model's variables to the weights and the model state of a checkpoint.

        Raises:
            CheckpointError: its tensors differ from the model's.
        """
        program = self.bound.program
        compare_variables(manifest, program.weights, program.dtype, program.state)
        state = zip(manifest.state, store.read_state(manifest), strict=True)
        values = store.read_weights(manifest) | {slot.name: value for slot, value in state}
        every = [*self.bound.weight_variables, *self.bound.state_variables]
        seeds = {slot.name for slot in program.state if slot.kind == "seed"}
        names = [w.name for w in program.weights] + [slot.name for slot in program.state]
        variables = {n: v for n, v in zip(names, every, strict=True) if n not in seeds}
        self.bound.write(list(variables.values()), [values[name] for name in variables])


def _updates(
    groups: ParameterGroups, bound: BoundProgram, settings: Settings
) -> tuple[UpdateProgram, ...]:
    return tuple(
        update_program(
            group.optimizer,
            bound.program.dtype,
            clip_value=settings.clip_value,
            weight_decay=group.weight_decay,
            adaptation=group.adaptation,
        )
        for group in groups.groups
    )
