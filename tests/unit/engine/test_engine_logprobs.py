from __future__ import annotations

import numpy as np

from phalanx.engine.logprobs import keep, merge
from phalanx.protocol.columns import LogprobColumns, as_ints, ints


def columns(first_id: int, entries: list[int], width: int) -> LogprobColumns:
    numbers = np.arange(len(entries) * width, dtype=np.float32) + first_id
    return LogprobColumns(
        entries=ints(entries),
        chosen=np.array([-first_id - entry for entry in entries], dtype=np.float32).tobytes(),
        width=width,
        top_ids=ints(numbers.astype(np.int32)),
        top_logprobs=numbers.tobytes(),
    )


def test_those_of_several_replicas_stay_with_their_tokens() -> None:
    merged = merge([columns(10, [1], 1), None, columns(30, [0, 2], 3)], [2, 1, 3])
    assert merged is not None
    assert as_ints(merged.entries).tolist() == [1, 3, 5]
    assert np.frombuffer(merged.chosen, np.float32).tolist() == [-11, -30, -32]
    assert as_ints(merged.top_ids).reshape(3, 3).tolist() == [[10, 0, 0], [30, 31, 32], [33, 34, 35]]
    assert np.frombuffer(merged.top_logprobs, np.float32).reshape(3, 3)[2].tolist() == [33, 34, 35]


def test_where_no_replica_has_any_there_are_none() -> None:
    assert merge([None, None], [2, 1]) is None


def test_those_of_dropped_samples_are_dropped() -> None:
    kept = keep(columns(10, [0, 2, 3], 2), np.array([False, True, True, True]))
    assert kept is not None
    assert as_ints(kept.entries).tolist() == [1, 2]
    assert np.frombuffer(kept.chosen, np.float32).tolist() == [-12, -13]
    assert as_ints(kept.top_ids).reshape(2, 2).tolist() == [[12, 13], [14, 15]]
    assert keep(columns(10, [0], 2), np.array([False, True])) is None
