"""Callbacks of Keras on the driver, which hears of epochs and not of batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from tfspark.errors import InvalidInputError

_BATCH_HOOKS = (
    "on_batch_begin",
    "on_batch_end",
    "on_train_batch_begin",
    "on_train_batch_end",
    "on_test_batch_begin",
    "on_test_batch_end",
)

# Those of Keras that have such hooks and can do without, with the arguments that make it so.
_BY_EPOCH: dict[type, dict[str, Any]] = {
    keras.callbacks.ModelCheckpoint: {"save_freq": "epoch"},
    keras.callbacks.TensorBoard: {"update_freq": "epoch"},
    keras.callbacks.ProgbarLogger: {},
    keras.callbacks.History: {},
}

_INSTEAD = {
    keras.callbacks.BackupAndRestore: "Pass model_dir=: a rerun goes on from its checkpoints.",
    keras.callbacks.TerminateOnNaN: "A loss that is not finite ends training with NonFiniteError.",
}


def callback_list(
    callbacks: Sequence[Any] | None, model: keras.Model, verbose: Any, epochs: int, steps: int
) -> Any:
    """A `keras.callbacks.CallbackList` with a history and, unless silent, a progress bar.

    Args:
        callbacks: of the user, after `check_callback`.
        model: that they look at.
        verbose: as of `fit`.
        epochs, steps: of the training, for their `params`.
    """
    return keras.callbacks.CallbackList(
        list(callbacks or ()),
        add_history=True,
        add_progbar=verbose != 0,
        verbose=verbose,
        epochs=epochs,
        steps=steps,
        model=model,
    )


def check_callback(callback: Any) -> None:
    """Refuses a callback that needs batches.

    Raises:
        InvalidInputError: it wants to be called for every batch; names it and the remedy.
    """
    name = type(callback).__name__
    if not isinstance(callback, keras.callbacks.Callback):
        raise InvalidInputError(f"Callbacks are keras.callbacks.Callback. Received: {name}.")
    for kind, instead in _INSTEAD.items():
        if isinstance(callback, kind):
            raise InvalidInputError(f"{name} is not called on a cluster. Received: one. {instead}")
    for kind, needed in _BY_EPOCH.items():
        if type(callback) is kind:
            for attribute, value in needed.items():
                if getattr(callback, attribute) != value:
                    raise InvalidInputError(
                        "Callbacks are called between epochs, by the driver. Received: "
                        f"{name}({attribute}={getattr(callback, attribute)!r}). "
                        f"Use {attribute}={value!r}."
                    )
            return
    hooks = [hook for hook in _BATCH_HOOKS if _has(callback, hook)]
    if hooks:
        raise InvalidInputError(
            "Callbacks are called between epochs, by the driver; batches are elsewhere. "
            f"Received: {name}, which has {', '.join(hooks)}. Use on_epoch_begin and "
            "on_epoch_end, or a TrainSummary with TFOptimizer for figures of every step."
        )


def _has(callback: Any, hook: str) -> bool:
    own = getattr(type(callback), hook) is not getattr(keras.callbacks.Callback, hook)
    # LambdaCallback sets those that it was given on the object, and does nothing in others.
    return own or hook in vars(callback)
