"""What is known of ranks after the fact, wherever it was kept, and who is to blame by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from phalanx.ledger.record import Record
from phalanx.ledger.verdict import Look, RankLook, Verdict, judge

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
    is_stuck: bool = False
    """Whether a collective did not end that nobody is missing in."""

    @property
    def is_wrong(self) -> bool:
        return self.verdict is not None or self.is_stuck


def verdict_of(look: Look, missing: Sequence[int]) -> Verdict | None:
    """Our own judge's verdict, unless ranks have only been caught on their way; else it is about the missing ranks."""
    verdict = judge(look)
    if verdict is None:
        return _awaited_without_trace(look, missing)
    if not verdict.is_final and verdict.cause != "stopped" and verdict.waited_s < WAITED_LONG_S:
        return None
    return verdict


def stuck(look: Look) -> tuple[str, float] | None:
    """A collective that all members are in and that does not end, and for how long; None if there is none."""
    for one, group, record in _waits(look):
        if all(rank in look.ranks and _is_in(look, rank, group, record.sequence) for rank in look.groups[group]):
            where = f"{one.text(record)} (sequence {record.sequence} of group {group})"
            return where, (look.now_ns - record.issued_ns) / _NS
    return None


def _waits(look: Look) -> list[tuple[RankLook, str, Record]]:
    """Who is in which collective, the longest first."""
    waits = [(one, *awaits) for one in look.ranks.values() if (awaits := one.awaits) is not None]
    return sorted(waits, key=lambda wait: wait[2].issued_ns)


def _is_in(look: Look, rank: int, group: str, sequence: int) -> bool:
    awaits = look.ranks[rank].awaits
    return awaits is not None and awaits[0] == group and awaits[1].sequence == sequence


def _awaited_without_trace(look: Look, missing: Sequence[int]) -> Verdict | None:
    """The ranks that nothing is known of, if only they can be missing in a collective that others are in."""
    for waiter, group, record in _waits(look):
        absent = [rank for rank in look.groups[group] if rank in missing]
        if absent and _all_present_have_come(look, group, record):
            there = [rank for rank in look.groups[group] if rank in look.ranks]
            return Verdict(
                cause="late",
                culprits=tuple(absent),
                nodes=("",) * len(absent),
                what=f"has left nothing behind, and all others of its group have come to {waiter.text(record)}",
                step=record.step,
                group=group,
                sequence=record.sequence,
                peers=waiter.text(record),
                waiting=tuple(rank for rank in there if _is_in(look, rank, group, record.sequence)),
                waited_s=(look.now_ns - record.issued_ns) / _NS,
            )
    return None


def _all_present_have_come(look: Look, group: str, record: Record) -> bool:
    return all(look.ranks[rank].has_issued(group, record.sequence) for rank in look.groups[group] if rank in look.ranks)
