"""Lookup tables without their resource: a vocabulary as constants of the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

from tfspark.errors import ProgramError

_BUCKETS = 2**63 - 1


@dataclass(frozen=True, eq=False)
class Table:
    """A lookup table, as a tensor of the source graph refers to it.

    Its content is taken when the graph is rewritten: what is inserted later has no effect.

    Attributes:
        handle: the eager tensor of its resource.
    """

    handle: Any

    def find(self, key_dtype: tf.DType, value_dtype: tf.DType) -> Callable[[Any, Any], Any]:
        """A pure function of (keys, default value) that looks keys up.

        Keys are found by binary search: among themselves where they are numbers, among 63-bit
        hashes where they are strings, and are then compared.
        """
        keys, values = self._content(key_dtype, value_dtype)
        ranks = _ranks(keys)
        order = np.argsort(ranks)
        keys, values, ranks = keys[order], values[order], ranks[order]
        if (ranks[1:] == ranks[:-1]).any():
            same = keys[1:][ranks[1:] == ranks[:-1]]
            raise ProgramError(
                "The keys of a lookup table need different 63-bit hashes. Received: another key "
                f"with the hash of {same[0]!r}. Look it up in the RDD before the TFDataset."
            )

        def find(wanted: Any, default: Any) -> Any:
            flat = tf.reshape(wanted, [-1])
            if not len(keys):
                return tf.fill(tf.shape(wanted), default)
            place = tf.searchsorted(tf.constant(ranks), _ranks_of(flat))
            place = tf.minimum(place, len(keys) - 1)
            found = tf.gather(tf.constant(keys, key_dtype), place) == flat
            value = tf.where(found, tf.gather(tf.constant(values, value_dtype), place), default)
            return tf.reshape(value, tf.shape(wanted))

        return find

    def _content(self, key_dtype: tf.DType, value_dtype: tf.DType) -> tuple[Any, Any]:
        if key_dtype not in (tf.string, tf.int32, tf.int64):
            raise ProgramError(
                "The keys of a lookup table are strings or integers. "
                f"Received: {key_dtype.name}. Look them up in the RDD before the TFDataset."
            )
        with context.eager_mode():
            try:
                keys, values = tf.raw_ops.LookupTableExportV2(
                    table_handle=self.handle, Tkeys=key_dtype, Tvalues=value_dtype
                )
            except tf.errors.OpError as error:
                raise ProgramError(
                    "A lookup table must be initialized, and hold one value for each key. "
                    f"Received: {error.message}."
                ) from error
        if values.shape.rank != 1:
            raise ProgramError(
                "A lookup table holds one value for each key. "
                f"Received: values of shape {values.shape}. Use tf.gather on a constant."
            )
        return keys.numpy(), values.numpy()


def _ranks(keys: np.ndarray) -> np.ndarray:
    with context.eager_mode():
        return _ranks_of(tf.constant(keys)).numpy()


def _ranks_of(keys: Any) -> Any:
    if keys.dtype != tf.string:
        return keys
    return tf.strings.to_hash_bucket_fast(keys, _BUCKETS)
