"""Callbacks of Keras on the driver, which hears of epochs and not of batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tfspark.errors import InvalidInputError
from tfspark.graph.keras_view import KerasView

_BATCH_HOOKS = (
    "on_batch_begin",
    "on_batch_end",
    "on_train_batch_begin",
    "on_train_batch_end",
    "on_test_batch_begin",
    "on_test_batch_end",
)

# Those of Keras that have such hooks and can do without, with the arguments that make it so.
_BY_EPOCH: dict[str, dict[str, Any]] = {
    "ModelCheckpoint": {"save_freq": "epoch"},
    "TensorBoard": {"update_freq": "epoch"},
    "ProgbarLogger": {},
    "History": {},
}

_INSTEAD = {
    "BackupAndRestore": "Pass model_dir=: a rerun goes on from its checkpoints.",
    "TerminateOnNaN": "A loss that is not finite ends training with NonFiniteError.",
}


def callback_list(
    callbacks: Sequence[Any] | None, view: KerasView, verbose: Any, epochs: int, steps: int
) -> Any:
    """A `CallbackList` of Keras with a history and, unless silent, a progress bar.

    Args:
        callbacks: of the user, after `check_callback`.
        view: of the model that they look at.
        verbose: as of `fit`.
        epochs, steps: of the training, for their `params`.
    """
    return view.keras.callbacks.CallbackList(
        list(callbacks or ()),
        add_history=True,
        add_progbar=verbose != 0,
        verbose=1 if verbose == "auto" else verbose,
        epochs=epochs,
        steps=steps,
        model=view.model,
    )


def check_callback(callback: Any, view: KerasView) -> None:
    """Refuses a callback that needs batches.

    Args:
        callback: of the user.
        view: of the model that it is to look at.

    Raises:
        InvalidInputError: it wants to be called for every batch, or is of another Keras than the
            model; names it and the remedy.
    """
    kinds, name = view.keras.callbacks, type(callback).__name__
    if not isinstance(callback, kinds.Callback):
        raise InvalidInputError(
            f"Callbacks of this model are {view.keras.__name__}.callbacks.Callback. "
            f"Received: {type(callback).__module__}.{name}."
        )
    for kind, instead in _INSTEAD.items():
        if isinstance(callback, getattr(kinds, kind)):
            raise InvalidInputError(f"{name} is not called on a cluster. Received: one. {instead}")
    for kind, needed in _BY_EPOCH.items():
        if type(callback) is getattr(kinds, kind):
            for attribute, value in needed.items():
                if getattr(callback, attribute) != value:
                    raise InvalidInputError(
                        "Callbacks are called between epochs, by the driver. Received: "
                        f"{name}({attribute}={getattr(callback, attribute)!r}). "
                        f"Use {attribute}={value!r}."
                    )
            return
    hooks = [hook for hook in _BATCH_HOOKS if _has(callback, hook, kinds.Callback)]
    if hooks:
        raise InvalidInputError(
            "Callbacks are called between epochs, by the driver; batches are elsewhere. "
            f"Received: {name}, which has {', '.join(hooks)}. Use on_epoch_begin and "
            "on_epoch_end, or a TrainSummary with TFOptimizer for figures of every step."
        )


def _has(callback: Any, hook: str, base: type) -> bool:
    own = getattr(type(callback), hook) is not getattr(base, hook)
    # LambdaCallback sets those that it was given on the object, and does nothing in others.
    return own or hook in vars(callback)
