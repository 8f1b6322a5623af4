"""The contract between front ends, which make programs, and engines, which run them.

A *program* is the model's gradient as one pure graph: weights in, gradients out. An *evaluation*
is the same for metrics, a *prediction* for outputs. Front ends (`from_graph`, `from_function`,
`from_keras`) build them; an engine never knows where a program came from.

Words used here, once and for all:

* flat vector `[P]`: all trainable weights in the order of `Program.weights`, each raveled in C
  order, one dtype (`Program.dtype`).
* model state: what changes but is not trained, one array per entry of `Program.state`.
* rows: how many rows of the global batch this rank holds in this step; never 0 when a program is
  called (a rank without rows contributes zeros without calling it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tfspark.data.spec import RowSpec
from tfspark.graphdef.pure import PureGraph, TensorInfo


@dataclass(frozen=True)
class Weight:
    """One trainable tensor of the flat vector.

    Attributes:
        name: the variable's name or path, without ":0".
        shape: its shape.
        group: index of the parameter group (one optimizer each); the weights of a program are
            sorted by group, so that each group is one contiguous slice of the flat vector.
    """

    name: str
    shape: tuple[int, ...]
    group: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for dimension in self.shape:
            size *= dimension
        return size


@dataclass(frozen=True)
class StateSlot:
    """One tensor of the model state.

    Attributes:
        name: the variable's name or path.
        dtype, shape: of the tensor.
        kind: how ranks merge it after a step. `"mean"`: mean over ranks, weighted by rows
            (moving statistics, any float). `"sum"`: the value before the step and what each rank
            has added to it (metrics; float64). `"first"`: the value of the lowest rank that had
            rows (counters), and was not left out. `"seed"`: as `"first"`, and each rank adds its
            rank to element 0 before it runs the program and subtracts it afterwards, so that ranks
            draw different dropout masks while rank 0 draws those of plain Keras. `"constant"`:
            never changes (frozen weights); it is shipped once and never travels again.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class Program:
    """The gradient of a model's loss as a pure graph.

    Call order of `graph.inputs`:

    1. `flat` `[P]`, `dtype`
    2. the model state, one tensor per entry of `state`
    3. the batch, one tensor per entry of `batch`, leading dimension `rows`
    4. `rows`, int64 scalar: rows of this call
    5. `global_rows`, int64 scalar: rows of the whole global batch of this step, over all ranks
    6. `seed`, int64 `[2]`: (run seed, step number); what stateless random operations draw from.
       Engines mix the rank into element 0.

    Order of `graph.outputs`:

    1. `loss_sum`, scalar of `dtype`: the loss of this rank's rows times the divisor, so that the
       sum over ranks divided by `global_rows` is the loss of the global batch. For a loss that is
       a mean over rows this is `loss * rows`; for one that is a sum, `loss * global_rows`.
    2. the gradient of `loss_sum` with respect to `flat`, in pieces: one `[weight.size]` per entry
       of `weights`. The sum over ranks divided by `global_rows` is the gradient of the global
       batch's loss. Whoever calls the program joins them where they are needed.
    3. the new model state, one tensor per entry of `state`.

    Attributes:
        weights: in flat order, sorted by group.
        state: the model state.
        batch: indices into the fields of the data set's (mapped) row spec that the program reads.
        dtype: "float32" or "float64", of the flat vector.
        graph: the pure graph, for any number of rows.
        exact_graphs: graphs of the same for just so many rows, of less work for each.
    """

    weights: tuple[Weight, ...]
    state: tuple[StateSlot, ...]
    batch: tuple[int, ...]
    dtype: str
    graph: PureGraph
    exact_graphs: Mapping[int, PureGraph] = field(default_factory=dict)

    def graph_for(self, rows: int) -> PureGraph:
        """The graph of least work for a call with so many rows."""
        return self.exact_graphs.get(rows, self.graph)

    @property
    def size(self) -> int:
        """P, the number of elements of the flat vector."""
        return sum(weight.size for weight in self.weights)


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a model over a batch as a pure graph that adds to accumulators.

    Call order of `graph.inputs`: `flat`, the model state, the batch (`batch` indices), then the
    accumulators. `graph.outputs`: the new accumulators. The accumulators of several ranks merge
    exactly by adding `accumulator - initial` over ranks.

    Attributes:
        batch: indices into the fields of the data set's (mapped) row spec.
        accumulators: dtype and shape of each accumulator.
        initial: its value before the first batch.
        graph: the pure graph.
        metrics: what turns accumulators into results, on the driver; see `evaluation.py`.
    """

    batch: tuple[int, ...]
    accumulators: tuple[TensorInfo, ...]
    initial: tuple[Any, ...]  # np.ndarray per accumulator
    graph: PureGraph
    metrics: tuple[tuple[str, int], ...]  # (metric name, number of its accumulators), in order


@dataclass(frozen=True)
class UpdateSlot:
    """One tensor of an optimizer's state for one shard.

    Attributes:
        name: such as "momentum", "velocity", "iteration".
        kind: `"vector"`: one element per weight, sharded with the weights. `"scalar"`: one value
            that every rank keeps.
        dtype: of the tensor.
        initial: the value (of every element) before the first step.
    """

    name: str
    kind: str
    dtype: str
    initial: float


@dataclass(frozen=True)
class UpdateProgram:
    """An optimizer's step on one shard of one parameter group, as a pure graph.

    Call order of `graph.inputs` (S: elements of this rank's shard of the group, any number):

    1. `shard` `[S]`: the weights
    2. `gradient_sum` `[S]`: summed over ranks, not yet divided
    3. `divisor`, float64 scalar: global rows
    4. `scale` `[S]` or `[]`: factor of clipping by norm, 1 where there is none
    5. `learning_rate`, float32 scalar
    6. the slots, one tensor per entry of `slots`
    7. the sums that the rule makes over whole tensors, `[S]` each: for every element the sum over
       the tensor that it belongs to, over all ranks

    `graph.outputs`: the new shard, then the new slots. The gradient that the rule sees is
    `clip_by_value(gradient_sum / divisor * scale)`.

    Most rules make no sums. A rule that scales by norms of whole tensors has a second graph for
    what has to be summed first.

    Attributes:
        name: of the rule, for messages: "Adam".
        slots: the rule's state.
        graph: the step.
        terms: from inputs 1 to 6 to the terms of each sum, `[S]` each; None where there are none.
    """

    name: str
    slots: tuple[UpdateSlot, ...]
    graph: PureGraph
    terms: PureGraph | None = None

    @property
    def num_sums(self) -> int:
        """How many sums over whole tensors the rule makes."""
        return 0 if self.terms is None else len(self.terms.outputs)


SEED = np.zeros(2, np.int64)
"""What every call of a prediction draws random numbers from, so that rows repeat."""


@dataclass(frozen=True)
class Prediction:
    """A model for use, without the code and the process that it was made in.

    Attributes:
        graph: inputs: the batch, `[rows, *shape]` for each field of `inputs`; a seed int64 `[2]`;
            the weights. Outputs: `[rows, *shape]` for each field of `outputs`.
        weights: values of the last inputs.
        inputs: what it takes of a row. A dimension of None: rows may differ in it, and a batch is
            padded to its longest.
        outputs: what it returns for a row. A dimension of None: as the batch has it.
    """

    graph: PureGraph
    weights: tuple[np.ndarray, ...]
    inputs: RowSpec
    outputs: RowSpec


@dataclass(frozen=True)
class MetricSums:
    """What a batch adds to the metrics of a model, as a pure graph.

    Attributes:
        graph: inputs: the batch, `[rows, *shape]` for each field of `inputs`; a seed int64 `[2]`;
            the weights. Outputs: float64, one per variable of the model's metrics.
        weights: values of the last inputs.
        inputs: a row `(x, y)` or `(x, y, sample_weight)`.
    """

    graph: PureGraph
    weights: tuple[np.ndarray, ...]
    inputs: RowSpec
