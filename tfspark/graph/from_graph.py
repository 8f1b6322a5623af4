"""Programs from TF1-style graphs: placeholders, a session, any graph that ends in a scalar loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfspark.errors import ProgramError
from tfspark.graph.assembly import (
    BoundProgram,
    Step,
    assemble,
    check_weight_dtypes,
    join,
    state_kind,
    unique_names,
)
from tfspark.graph.program import StateSlot, Weight
from tfspark.graphdef.nodes import ancestors
from tfspark.graphdef.rewrite import VariableInput
from tfspark.graphdef.variables import Purified, purify

VARIABLE_OPS = ("VarHandleOp", "VariableV2", "Variable")
_CONTEXTS = [tf.compat.v1.GraphKeys.COND_CONTEXT, tf.compat.v1.GraphKeys.WHILE_CONTEXT]


def program_from_loss(
    loss: Any,
    *,
    session: Any,
    inputs: Sequence[tuple[Any, int]],
    trainable: Sequence[Any] | None = None,
    group_of: Callable[[str], int] | None = None,
    updates: Sequence[Any] | None = None,
    tensor_with_value: Mapping[Any, Any] | None = None,
    reduction: str = "mean",
) -> BoundProgram:
    """The gradient of a loss in a TF1-style graph as a program.

    The user's graph stays as it is, also where it is finalized. Variables of the session that have
    no value yet are initialized, others keep theirs; both become the program's initial values.

    Args:
        loss: a scalar tensor.
        session: of the loss's graph.
        inputs: (placeholder, index of the data set's field) for each tensor of the data set.
        trainable: variables to train; None: the collection TRAINABLE_VARIABLES. Those that the
            loss does not depend on are left out.
        group_of: parameter group of a variable by its name; None: all in group 0.
        updates: operations to run in every step, besides the collection UPDATE_OPS.
        tensor_with_value: (training value, evaluation value) of placeholders that the data set
            does not feed.
        reduction: how the loss reduces over rows, "mean" or "sum".

    Raises:
        ProgramError: the loss is not a scalar tensor, is of another graph, or depends on no
            trainable variable or no tensor of the data set; a placeholder has no value; an
            operation has no place in a program.
    """
    graph = check_loss(loss, session, [tensor for tensor, _ in inputs])
    if reduction not in ("mean", "sum"):
        raise ProgramError(f'A reduction is "mean" or "sum". Received: {reduction!r}.')
    if trainable is None:
        trainable = graph.get_collection(tf.compat.v1.GraphKeys.TRAINABLE_VARIABLES)
    trainable = list({reference(v).name: v for v in trainable}.values())
    copy = copy_of(graph)
    handles = [copy.get_tensor_by_name(reference(v).name) for v in trainable]
    with copy.as_default():
        copied_loss = copy.get_tensor_by_name(loss.name)
        gradients = tf.gradients(copied_loss, handles) if handles else []
        pairs = [
            (v, tf.convert_to_tensor(gradient))
            for v, gradient in zip(trainable, gradients, strict=True)
            if gradient is not None
        ]
    return program_of_gradients(
        copy, loss, pairs, session, inputs, group_of, updates, tensor_with_value, reduction
    )


def program_of_gradients(
    copy: tf.Graph,
    loss: Any,
    pairs: Sequence[tuple[Any, Any]],
    session: Any,
    inputs: Sequence[tuple[Any, int]],
    group_of: Callable[[str], int] | None,
    updates: Sequence[Any] | None,
    tensor_with_value: Mapping[Any, Any] | None,
    reduction: str,
) -> BoundProgram:
    """The program of a loss and of (variable, gradient in a copy of its graph) pairs."""
    if not pairs:
        raise ProgramError(
            "The loss must depend on a trainable variable. "
            f"Received: {loss.name!r}, which depends on none. Create the variables with "
            "trainable=True, in the graph of the loss."
        )
    check_weight_dtypes([(name_of(v), v.dtype.base_dtype.name) for v, _ in pairs])
    pairs = sorted(pairs, key=lambda pair: group_of(name_of(pair[0])) if group_of else 0)
    graph = loss.graph
    ops = [*graph.get_collection(tf.compat.v1.GraphKeys.UPDATE_OPS), *(updates or ())]
    update_ops = [copy.get_operation_by_name(getattr(op, "op", op).name) for op in ops]
    rows, global_rows, seed = _step_inputs(copy)
    with copy.as_default():
        factor = rows if reduction == "mean" else global_rows
        dtype = pairs[0][0].dtype.base_dtype
        copied_loss = tf.cast(copy.get_tensor_by_name(loss.name), dtype)
        results = [
            tensor * tf.cast(factor, dtype)
            for tensor in (copied_loss, *(gradient for _, gradient in pairs))
        ]
    purified, variables, values, batch = _purify(
        copy,
        graph,
        session,
        results,
        update_ops,
        inputs,
        tensor_with_value,
        0,
        (rows, global_rows, seed),
        [v for v, _ in pairs],
        loss.name,
    )
    names = unique_names([name_of(v) for v in variables])
    weights = tuple(
        Weight(name, tuple(value.shape), group_of(name_of(v)) if group_of else 0)
        for name, value, (v, _) in zip(names, values, pairs, strict=False)
    )
    states = tuple(
        StateSlot(
            name,
            v.dtype.base_dtype.name,
            tuple(np.shape(value)),
            state_kind(name, v.dtype.base_dtype.name, np.shape(value), written),
        )
        for name, v, value, written in list(
            zip(names, variables, values, purified.written, strict=True)
        )[len(weights) :]
    )
    program = assemble(Step(purified.graph, weights, states, batch))

    def write(variables: Sequence[Any], values: Sequence[np.ndarray]) -> None:
        assign_back(session, variables, values)

    return BoundProgram(
        program,
        join(values[: len(weights)], program.dtype),
        tuple(np.asarray(value) for value in values[len(weights) :]),
        tuple(v for v, _ in pairs),
        tuple(variables[len(weights) :]),
        write,
        session.run,
    )


def purify_tensors(
    tensors: Sequence[Any],
    session: Any,
    inputs: Sequence[tuple[Any, int]],
    tensor_with_value: Mapping[Any, Any] | None,
) -> tuple[Purified, list[Any], tuple[int, ...]]:
    """Tensors of a session's graph, in evaluation, as a pure graph.

    Returns:
        The graph, whose inputs are the batch, rows twice, a seed and variables; these variables;
        and the indices of the batch's fields.
    """
    graph = session.graph
    foreign = [tensor.name for tensor in tensors if tensor.graph is not graph]
    if foreign:
        raise ProgramError(
            "What is evaluated must be in the session's graph. "
            f"Received: {', '.join(foreign)} of another graph."
        )
    copy = copy_of(graph)
    results = [copy.get_tensor_by_name(tensor.name) for tensor in tensors]
    names = ", ".join(tensor.name for tensor in tensors)
    purified, variables, _, batch = _purify(
        copy,
        graph,
        session,
        results,
        (),
        inputs,
        tensor_with_value,
        1,
        _step_inputs(copy),
        (),
        names,
    )
    return purified, variables, batch


def _step_inputs(copy: tf.Graph) -> tuple[Any, Any, Any]:
    with copy.as_default():
        return (
            tf.compat.v1.placeholder(tf.int64, [], "tfspark/rows"),
            tf.compat.v1.placeholder(tf.int64, [], "tfspark/global_rows"),
            tf.compat.v1.placeholder(tf.int64, [2], "tfspark/seed"),
        )


def _purify(
    copy: tf.Graph,
    graph: tf.Graph,
    session: Any,
    results: Sequence[Any],
    update_ops: Sequence[Any],
    inputs: Sequence[tuple[Any, int]],
    tensor_with_value: Mapping[Any, Any] | None,
    phase: int,
    step_inputs: tuple[Any, Any, Any],
    first: Sequence[Any],
    what: str,
) -> tuple[Purified, list[Any], list[Any], tuple[int, ...]]:
    """Purifies results in a copy of a graph, with its variables, `first` ones first.

    Returns:
        The pure graph, the variables, their values, the indices of the batch's fields.
    """
    needed = ancestors([tensor.op for tensor in results] + list(update_ops))
    constants = {_key_name(key): values[phase] for key, values in (tensor_with_value or {}).items()}
    used = [(tensor, index) for tensor, index in inputs if tensor.op.name in needed]
    _check_placeholders(needed, what, used, inputs, constants)
    found = variables_by_op(graph, first)
    first_ops = [v.op.name for v in first]
    other_ops = [
        name for name, op in needed.items() if op.type in VARIABLE_OPS and name not in first_ops
    ]
    _check_known(other_ops, found)
    initialize(session)
    variables = [found[name] for name in [*first_ops, *other_ops]]
    slots = [
        VariableInput(
            name_of(v), v.dtype.base_dtype, v.shape, (copy.get_tensor_by_name(reference(v).name),)
        )
        for v in variables
    ]
    purified = purify(
        copy,
        [*(copy.get_tensor_by_name(tensor.name) for tensor, _ in used), *step_inputs],
        results,
        slots,
        updates=update_ops,
        seed=step_inputs[-1],
        constants={name: value for name, value in constants.items() if _op(name) in needed},
    )
    values = session.run(variables) if variables else []
    return purified, variables, values, tuple(index for _, index in used)


def assign_back(session: Any, variables: Sequence[Any], values: Sequence[np.ndarray]) -> None:
    """Sets variables of a session to arrays, without adding to its graph."""
    # An initializer is an assignment, whose second input is the value.
    feeds = {
        variable.initializer.inputs[1]: value
        for variable, value in zip(variables, values, strict=True)
    }
    session.run([variable.initializer for variable in variables], feeds)


def initialize(session: Any) -> None:
    """Initializes the variables of a session's graph that have no value; others keep theirs."""
    waiting = [v for v in variables_by_op(session.graph).values() if not _has_value(session, v)]
    while waiting:
        left = []
        for variable in waiting:
            try:
                session.run(variable.initializer)
            except tf.errors.FailedPreconditionError as error:
                left.append(variable)  # its initial value needs one that has none yet
                if len(left) == len(waiting):
                    raise ProgramError(
                        "A variable's initial value needs variables that cannot be initialized. "
                        f"Received: {', '.join(name_of(v) for v in left)}."
                    ) from error
        waiting = left


def name_of(variable: Any) -> str:
    """A variable's name without its output index."""
    return variable.name.split(":")[0]


def reference(variable: Any) -> Any:
    """The tensor through which a graph refers to a variable: a handle or a reference."""
    return variable.op.outputs[0]


def _has_value(session: Any, variable: Any) -> bool:
    # A resource variable brings an operation to ask; reading one in vain logs a warning.
    asking = [op for op in reference(variable).consumers() if op.type == "VarIsInitializedOp"]
    if asking:
        return bool(session.run(asking[0].outputs[0]))
    try:
        session.run(variable)
    except tf.errors.FailedPreconditionError:
        return False
    return True


def _key_name(key: Any) -> str:
    """A key of `tensor_with_value`: a tensor, its `ref()`, or its name."""
    if isinstance(key, str):
        return key if ":" in key else f"{key}:0"
    return (key.deref() if hasattr(key, "deref") else key).name


def _op(tensor_name: str) -> str:
    return tensor_name.split(":")[0]


def check_loss(loss: Any, session: Any, tensors: Sequence[Any]) -> tf.Graph:
    """The graph of a loss, which must be a scalar of the session's graph."""
    if (
        not tf.is_tensor(loss)
        or not hasattr(loss, "graph")
        or isinstance(loss, tf.__internal__.EagerTensor)
    ):
        raise ProgramError(
            "A loss is a tensor of a graph. "
            f"Received: {loss!r}. Build it under tf.Graph().as_default(), or call "
            "tf.compat.v1.disable_eager_execution() first; an eager loss goes to from_function."
        )
    if loss.shape.rank != 0:
        raise ProgramError(
            f"The loss must be a scalar. Received: {loss.name!r} of shape {loss.shape}. Reduce "
            "it, for example with tf.reduce_mean."
        )
    if not loss.dtype.is_floating:
        raise ProgramError(f"The loss must be a float. Received: {loss.name!r} of {loss.dtype}.")
    if session.graph is not loss.graph:
        raise ProgramError(
            "The loss must be in the session's graph. "
            f"Received: {loss.name!r} of another graph. Create the session with graph=loss.graph."
        )
    foreign = [tensor.name for tensor in tensors if tensor.graph is not loss.graph]
    if foreign:
        raise ProgramError(
            "The loss must be in the graph of the data set's tensors. "
            f"Received: {loss.name!r}, while {', '.join(foreign)} is in another graph. Read "
            "dataset.tensors under the same tf.Graph().as_default() as the loss."
        )
    return loss.graph


def _check_placeholders(
    needed: Mapping[str, Any],
    what: str,
    used: Sequence[tuple[Any, int]],
    inputs: Sequence[tuple[Any, int]],
    constants: Mapping[str, Any],
) -> None:
    fed = {tensor.op.name for tensor, _ in inputs} | {_op(name) for name in constants}
    own = {"tfspark/rows", "tfspark/global_rows", "tfspark/seed"}
    missing = [
        name for name, op in needed.items() if op.type == "Placeholder" and name not in fed | own
    ]
    if missing:
        raise ProgramError(
            f"Every placeholder that {what} needs must be fed. "
            f"Received: {', '.join(missing)}, which is neither a tensor of the data set nor in "
            "tensor_with_value. Give tensor_with_value={placeholder: (training value, "
            "evaluation value)}."
        )
    if not used:
        raise ProgramError(
            "The loss must depend on the data set. "
            f"Received: {what}, which uses none of its tensors "
            f"{', '.join(tensor.name for tensor, _ in inputs)}. Build it from dataset.tensors."
        )


def _check_known(names: Sequence[str], found: Mapping[str, Any]) -> None:
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ProgramError(
            "A variable that the loss uses must be in a collection, or its value cannot be read. "
            f"Received: {', '.join(unknown)}. Create it with "
            "collections=[tf.compat.v1.GraphKeys.GLOBAL_VARIABLES]."
        )


def variables_by_op(graph: tf.Graph, more: Sequence[Any] = ()) -> dict[str, Any]:
    """The variables in a graph's collections, and more, by the name of their operation."""
    keys = tf.compat.v1.GraphKeys
    collections = (
        keys.GLOBAL_VARIABLES,
        keys.LOCAL_VARIABLES,
        keys.TRAINABLE_VARIABLES,
        keys.MODEL_VARIABLES,
        keys.METRIC_VARIABLES,
    )
    every = [v for key in collections for v in graph.get_collection(key)]
    return {v.op.name: v for v in [*every, *more]}


def copy_of(graph: tf.Graph) -> tf.Graph:
    """A copy to differentiate in: a graph may be finalized, and gradients of loops change it."""
    with graph.as_default():
        meta = tf.compat.v1.train.export_meta_graph(graph=graph, collection_list=_CONTEXTS)
    copy = tf.Graph()
    with copy.as_default():
        tf.compat.v1.train.import_meta_graph(meta)
    return copy
