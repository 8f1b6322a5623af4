"""Writes docs/api.md from the docstrings of the public names: python tools/api_reference.py."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"

INTRODUCTION = """\
# API reference

Made from the docstrings by `python tools/api_reference.py`; edit those, not this page. Names of the
first sections come straight from `tfspark`, those of the last ones from the module that is named.
"""

SECTIONS = {
    "Spark": "tfspark: init_nncontext",
    "Data": "tfspark: TFDataset",
    "Training": (
        "tfspark: TFOptimizer KerasModel TFEstimator TFEstimatorSpec ModeKeys "
        "GANEstimator FailurePolicy LeaveOut"
    ),
    "Prediction": "tfspark: TFPredictor TFNet register_model_udf",
    "Spark ML": (
        "tfspark: NNEstimator NNModel NNClassifier NNClassifierModel NNFeaturizer NNImageReader; "
        "tfspark.nnframes: TrainingSummary"
    ),
    "Triggers": (
        "tfspark: MaxEpoch MaxIteration EveryEpoch SeveralIteration MaxScore MinLoss TriggerAnd "
        "TriggerOr"
    ),
    "Learning-rate schedules": (
        "tfspark: Warmup Poly Step MultiStep EpochStep LinearScaling Plateau SequentialSchedule"
    ),
    "Metrics": "tfspark: Top1Accuracy Top5Accuracy HitRatio NDCG",
    "Summaries": "tfspark: TrainSummary ValidationSummary",
    "Optimizers": (
        "keras.optimizers: SGD Adam AdamW Adagrad Adadelta Adamax Nadam RMSprop Ftrl Lion Lamb; "
        "tfspark: LARS"
    ),
    "Errors": "tfspark.errors: *",
    "Checkpoint files": "tfspark.train.checkpoint: CheckpointStore Retention",
    "Slots": "tfspark.slots: slots",
    "Your own triggers and schedules": (
        "tfspark.train.triggers: Trigger Progress; tfspark.train.schedules: Schedule"
    ),
}

_HEADING = re.compile(r"(Args|Call arguments|Attributes|Returns|Raises|Source|Example):$")
_ENTRY = re.compile(r"([\w*]+(?:, [\w*]+)*): (.*)", re.DOTALL)


def documented() -> dict[str, list[tuple[str, str]]]:
    """For each section, its (module, name) pairs."""
    return {
        title: [
            (module, name)
            for module, names in (part.split(": ") for part in listing.split("; "))
            for name in (_classes_of(module) if names == "*" else names.split())
        ]
        for title, listing in SECTIONS.items()
    }


def _classes_of(module: str) -> list[str]:
    """The classes that a module defines, in its order."""
    found = vars(importlib.import_module(module)).items()
    return [
        name
        for name, value in found
        if getattr(value, "__module__", "") == module and inspect.isclass(value)
    ]


def page() -> str:
    """The whole page as Markdown."""
    pairs = [pair for section in documented().values() for pair in section]
    known = {_resolve(*pair) for pair in pairs}
    parts = [INTRODUCTION]
    for title, section in documented().items():
        parts.append(f"## {title}\n")
        of_keras = [name for module, name in section if module == "keras.optimizers"]
        if of_keras:
            names = ", ".join(f"[`{name}`]({_keras_link(name)})" for name in of_keras)
            parts.append(f"Keras's own, imported by way of `tfspark`: {names}.\n")
        for module, name in section:
            if module != "keras.optimizers":
                parts.append(_entry(module, name, known))
    return "\n".join(parts).rstrip() + "\n"


def _entry(module: str, name: str, known: set[Any]) -> str:
    value = _resolve(module, name)
    full = f"{module}.{name}"
    lines = [f"### `{name}`\n", _code(full + _signature(value))]
    if inspect.isclass(value):
        base = next((b for b in value.__mro__[1:-1] if b in known), None)
        if base is not None:
            lines.append(f"A `{base.__name__}`.\n")
    lines.append(_markdown(inspect.getdoc(value) or ""))
    if inspect.isclass(value):
        for member, signature, text in _members(value, known):
            lines.append(f"#### `{name}.{member}`\n")
            if signature:
                lines.append(_code(member + signature))
            lines.append(_markdown(text))
    return "\n".join(lines)


def _members(cls: type, known: set[Any]) -> Iterator[tuple[str, str, str]]:
    """(name, signature, docstring) of methods and properties that no documented base has."""
    bases = cls.__mro__[1:]
    own = [base for base in bases if base.__module__.startswith("tfspark") and base not in known]
    elsewhere = [base for base in bases if base not in own]
    for owner in (cls, *own):
        for name, value in vars(owner).items():
            if name.startswith("_") or any(name in vars(base) for base in elsewhere):
                continue
            is_property = isinstance(value, property)
            attribute = getattr(cls, name)
            text = inspect.getdoc(value if is_property else attribute) or ""
            if is_property:
                yield name, "", text
            elif callable(attribute) and not text.startswith("See the class"):
                yield name, _signature(attribute), text


def _signature(value: Any) -> str:
    """The signature without annotations, which the text describes."""
    signature = inspect.signature(value)
    empty = inspect.Parameter.empty
    parameters = [
        parameter.replace(annotation=empty)
        for name, parameter in signature.parameters.items()
        if name != "self"
    ]
    return re.sub(
        r"<factory>|<class '[\w.]+'>",
        "…",
        str(signature.replace(parameters=parameters, return_annotation=empty)),
    )


def _code(call: str) -> str:
    lines = textwrap.wrap(call, 96, subsequent_indent="    ", break_long_words=False)
    return "\n".join(["```python", *lines, "```\n"])


def _markdown(text: str) -> str:
    """A docstring in Google's style as Markdown."""
    result = []
    for block in re.split(r"\n(?=\S)", text):
        head, _, body = block.partition("\n")
        if not _HEADING.match(head):
            result.append(block)
            continue
        body = textwrap.dedent(body).strip("\n")
        if head == "Example:":
            result.append(f"```pycon\n{body.replace('  # doctest: +SKIP', '')}\n```\n")
        elif head in ("Returns:", "Source:"):
            result.append(f"**{head}** {body}\n")
        else:
            result.append(f"**{head}**\n\n{_bullets(body)}\n")
    return "\n".join(result).rstrip() + "\n"


def _bullets(body: str) -> str:
    """Entries `name: text` as a list; those that only refer to the class as its last item."""
    items, referring = [], []
    for entry in re.split(r"\n(?=\S)", body):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            items.append(entry)
            continue
        names = ", ".join(f"`{name}`" for name in match[1].split(", "))
        if match[2] == "see the class.":
            referring.append(names)
        else:
            text = textwrap.indent(textwrap.dedent(" " * 4 + match[2]), "  ").strip()
            items.append(f"- {names}: {text}")
    if referring:
        items.append(f"- {', '.join(referring)}: see the class.")
    return "\n".join(items)


def _resolve(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _keras_link(name: str) -> str:
    return f"https://keras.io/api/optimizers/{name.lower()}/"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
