"""What is known of ranks after the fact, wherever it was kept, and who is to blame by it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

from phalanx.ledger.judge import judge
from phalanx.ledger.look import Look, waiting_ranks
from phalanx.ledger.verdict import Verdict

WAITED_LONG_S = 1.0
"""Of ranks that a dump has caught on their way to each other, those that wait for less are not held against anybody."""

_NS = 1e9


class Trace(NamedTuple):
    """All that a directory of dumps says."""

    source: Literal["phalanx", "flight recorder"]
    look: Look
    unix_ns: int
    """Unix time less the clock of the look."""
    verdict: Verdict | None
    missing: tuple[int, ...]
    """Ranks of its groups that nothing is known of."""
    notes: tuple[str, ...]
    """What else is to be known, a sentence each."""


def verdict_of(look: Look, missing: Collection[int]) -> Verdict | None:
    """Our own judge's verdict, unless ranks have only been caught on their way; else it is about the missing ranks."""
    verdict = judge(look)
    if missing and (verdict is None or verdict.cause == "hung"):  # all that are known of have come
        verdict = _awaited_without_trace(look, missing) or verdict
    if verdict is not None and verdict.is_of_a_wait and verdict.waited_s < WAITED_LONG_S:
        return None
    return verdict


def _awaited_without_trace(look: Look, missing: Collection[int]) -> Verdict | None:
    """The ranks that nothing is known of, if only they can be missing in a collective that others are in."""
    for _, wait in waiting_ranks(look):
        assert wait.group is not None and wait.record is not None
        absent = [rank for rank in look.groups[wait.group] if rank in missing]
        if absent and not wait.others:
            return Verdict(
                cause="late",
                culprits=tuple(absent),
                nodes=("",) * len(absent),
                what=f"has left nothing behind, and all others of its group have come to {wait.what}",
                step=wait.step,
                group=wait.group,
                sequence=wait.record.sequence,
                peers=wait.what,
                waiting=tuple(look.members(wait.group)),
                waited_s=(look.now_ns - wait.since_ns) / _NS,
            )
    return None
