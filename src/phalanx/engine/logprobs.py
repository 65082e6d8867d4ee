"""Log-probabilities that come with the samples of a step: of all replicas together, and of samples that count alone.

Shape suffixes: P replicas, S samples, E entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from phalanx.protocol.columns import LogprobColumns, as_floats, as_ints, ints


def merge(columns_P: Sequence[LogprobColumns | None], num_samples_P: Sequence[int]) -> LogprobColumns | None:
    """Those of all replicas, by their places among the samples of all. Those with fewer likely tokens are filled up."""
    if len(columns_P) == 1:
        return columns_P[0]
    starts_P = accumulate(num_samples_P, initial=0)
    found = [(start, columns) for start, columns in zip(starts_P, columns_P, strict=False) if columns is not None]
    if not found:
        return None
    width = max(columns.width for _, columns in found)
    return LogprobColumns(
        entries=ints(np.concatenate([as_ints(columns.entries) + start for start, columns in found])),
        chosen=b"".join(columns.chosen for _, columns in found),
        width=width,
        top_ids=b"".join(_widened(as_ints(columns.top_ids), columns, width) for _, columns in found),
        top_logprobs=b"".join(_widened(as_floats(columns.top_logprobs), columns, width) for _, columns in found),
    )


def keep(columns: LogprobColumns | None, is_kept_S: NDArray[np.bool_]) -> LogprobColumns | None:
    """Those of the samples that are kept, by their new places."""
    if columns is None or is_kept_S.all():
        return columns
    entries = as_ints(columns.entries)
    is_kept_E = is_kept_S[entries]
    if not is_kept_E.any():
        return None
    places_S = np.cumsum(is_kept_S) - 1
    shape = (len(entries), columns.width)
    return LogprobColumns(
        entries=ints(places_S[entries[is_kept_E]]),
        chosen=as_floats(columns.chosen)[is_kept_E].tobytes(),
        width=columns.width,
        top_ids=as_ints(columns.top_ids).reshape(shape)[is_kept_E].tobytes(),
        top_logprobs=as_floats(columns.top_logprobs).reshape(shape)[is_kept_E].tobytes(),
    )


def _widened(column: NDArray[np.int32] | NDArray[np.float32], columns: LogprobColumns, width: int) -> bytes:
    shape = (len(as_ints(columns.entries)), columns.width)
    return np.pad(column.reshape(shape), ((0, 0), (0, width - columns.width))).tobytes()
