"""Which engine a training uses, and its making."""

from __future__ import annotations

import logging
from typing import Any

from pyspark import SparkContext

from tfspark.data.dataset import TFDataset
from tfspark.errors import InvalidInputError
from tfspark.sync.engine import Engine
from tfspark.sync.local import LocalEngine
from tfspark.sync.shuffle import ShuffleEngine

logger = logging.getLogger("tfspark")

ENGINES = ("local", "shuffle")
SETTING = "spark.tfspark.engine"


def choose_engine(requested: str, context: SparkContext | None) -> str:
    """The engine to use; says in one log line which one `"auto"` took and why.

    Args:
        requested: `"auto"`, or the name of an engine. `"auto"` takes the application's setting
            `spark.tfspark.engine` where there is one.
        context: the active SparkContext, or None.

    Raises:
        InvalidInputError: there is no such engine, or it needs a SparkContext that is not there.
    """
    source = "engine="
    if requested == "auto" and context is not None:
        requested, source = context.getConf().get(SETTING, "auto"), f"{SETTING}="
    if requested == "auto":
        chosen, reason = (
            ("shuffle", "there is a SparkContext")
            if context is not None
            else ("local", "there is no SparkContext")
        )
        logger.info("Engine %r, because %s.", chosen, reason)
        return chosen
    if requested not in ENGINES:
        raise InvalidInputError(
            f"An engine is 'auto' or one of {', '.join(map(repr, ENGINES))}. "
            f"Received: {source}{requested!r}."
        )
    if requested != "local" and context is None:
        raise InvalidInputError(
            f"The engine {requested!r} runs in Spark. Received: no active SparkContext. "
            "Call init_nncontext() first, or use engine='local'."
        )
    return requested


def materialise(name: str, dataset: TFDataset, num_ranks: int, context: SparkContext | None) -> Any:
    """The data set as this engine reads it; has `handles` (by rank) and `rdd` where Spark is."""
    if name == "local":
        return dataset.materialise_local(num_ranks)
    assert context is not None
    return dataset.materialise(context, num_ranks)


def make_engine(name: str, materialised: Any, context: SparkContext | None) -> Engine:
    """An engine over a materialised training set."""
    if name == "local":
        return LocalEngine(materialised.handles)
    assert context is not None
    return ShuffleEngine(context, materialised.rdd)
