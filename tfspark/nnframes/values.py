"""Values of params as JSON, so that a stage can be saved: Keras objects, triggers, summaries.

What is code of the user, such as a lambda, cannot be written, and is refused by name. Nothing is
unpickled when a stage is loaded, and Keras loads its objects in safe mode.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import keras

from tfspark.errors import InvalidInputError
from tfspark.nnframes.features import Reshape
from tfspark.train import triggers
from tfspark.train.summary import TrainSummary, ValidationSummary
from tfspark.train.triggers import Trigger

_KIND = "tfspark"
"""The key that marks a dict as an encoded object; its value says of which kind."""

_SUMMARIES = {each.__name__: each for each in (TrainSummary, ValidationSummary)}


def encoded(value: Any, param: str) -> Any:
    """A value that JSON can hold.

    Args:
        value: of a param.
        param: its name, for the error.

    Raises:
        InvalidInputError: it is code, or an object of an unknown class.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [encoded(each, param) for each in value]
    if isinstance(value, dict) and all(isinstance(key, str) and key != _KIND for key in value):
        return {key: encoded(each, param) for key, each in value.items()}
    if isinstance(value, Reshape):
        return {_KIND: "reshape", "shape": value.shape}
    if isinstance(value, Trigger):
        return _encoded_trigger(value, param)
    if isinstance(value, (TrainSummary, ValidationSummary)):
        return _encoded_summary(value, param)
    return _encoded_keras(value, param)


def decoded(value: Any) -> Any:
    """The value that was encoded.

    Raises:
        InvalidInputError: it is of an unknown kind, or of a class that is not there.
    """
    if isinstance(value, list):
        return [decoded(each) for each in value]
    if not isinstance(value, dict):
        return value
    if _KIND not in value:
        return {key: decoded(each) for key, each in value.items()}
    kind = value[_KIND]
    if kind not in _DECODERS:
        raise InvalidInputError(
            f"A saved value is of a known kind: {', '.join(_DECODERS)}. Received: {kind!r}. "
            "It was saved by a newer version of tfspark, or not by tfspark."
        )
    return _DECODERS[kind](value)


def _encoded_trigger(trigger: Trigger, param: str) -> dict[str, Any]:
    name = type(trigger).__name__
    if getattr(triggers, name, None) is not type(trigger):
        raise _not_data(trigger, param)
    if isinstance(trigger, (triggers.TriggerAnd, triggers.TriggerOr)):
        arguments: Any = [encoded(each, param) for each in trigger.triggers]
    else:
        arguments = list(vars(trigger).values())
    return {_KIND: "trigger", "name": name, "arguments": arguments}


def _decoded_trigger(value: dict[str, Any]) -> Trigger:
    kind = getattr(triggers, value["name"], None)
    if not (isinstance(kind, type) and issubclass(kind, Trigger)):
        raise InvalidInputError(f"A saved trigger is one of tfspark. Received: {value['name']!r}.")
    return kind(*decoded(value["arguments"]))


def _encoded_summary(summary: Any, param: str) -> dict[str, Any]:
    return {
        _KIND: "summary",
        "name": type(summary).__name__,
        "arguments": summary.arguments,
        "triggers": encoded(getattr(summary, "triggers", {}), param),
    }


def _decoded_summary(value: dict[str, Any]) -> Any:
    summary: Any = _SUMMARIES[value["name"]](*value["arguments"])
    for name, trigger in value["triggers"].items():
        summary.set_summary_trigger(name, decoded(trigger))
    return summary


def _encoded_keras(value: Any, param: str) -> dict[str, Any]:
    """What Keras can write and, in safe mode, read."""
    if getattr(value, "__name__", None) == "<lambda>":
        raise _not_data(value, param)
    try:
        config = keras.saving.serialize_keras_object(value)
        json.dumps(config)
        keras.saving.deserialize_keras_object(config)
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise _not_data(value, param) from error
    return {_KIND: "keras", "config": config}


def _decoded_keras(value: dict[str, Any]) -> Any:
    try:
        return keras.saving.deserialize_keras_object(value["config"])
    except (TypeError, ValueError) as error:
        name = value["config"].get("class_name")
        raise InvalidInputError(
            "What a stage was saved with is there when it is loaded. "
            f"Received: {name!r}, which is not: {str(error).splitlines()[0]:.200}"
        ) from error


_DECODERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "keras": _decoded_keras,
    "trigger": _decoded_trigger,
    "summary": _decoded_summary,
    "reshape": lambda value: Reshape(value["shape"]),
}


def _not_data(value: Any, param: str) -> InvalidInputError:
    return InvalidInputError(
        "A stage is saved without code. "
        f"Received: {param}={value!r:.100}, which Keras cannot read back. Decorate the function or "
        "class with @keras.saving.register_keras_serializable(), or use one of Keras or tfspark."
    )
