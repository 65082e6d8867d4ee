"""Ranks that have all left a step, where one has issued less in a group than another: nobody waits then. Pure.

A source that runs ahead of its peers goes on without them, and so does who leaves out what comes last in a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from phalanx.ledger.habit import odd_at, steps_of
from phalanx.ledger.look import Look
from phalanx.ledger.minority import minority
from phalanx.ledger.record import Record
from phalanx.ledger.verdict import Place, Verdict, blame


def uneven(look: Look) -> Verdict | None:
    """The earliest step in which members of a group have not issued as many."""
    for group in uneven_groups(look):
        issued = {rank: steps_of(look.ranks[rank], group) for rank in look.members(group)}
        common = set.intersection(*(set(steps) for steps in issued.values()))
        for step in sorted(common):
            if len({len(steps[step]) for steps in issued.values()}) > 1:
                return _uneven_in(look, group, step, {rank: steps[step] for rank, steps in issued.items()})
    return None


def uneven_groups(look: Look) -> dict[str, tuple[int, ...]]:
    """Groups whose members have all left the same step, and have not come as far: how far each has.

    They may have had other numbers in a method of their own, or in the step: the records tell.
    """
    found = {}
    for group in look.groups:
        members = [look.ranks[rank] for rank in look.members(group)]
        sequences = tuple(one.entries.sequences[one.groups.index(group)] for one in members)
        if len(set(sequences)) < 2 or len({one.entries.step for one in members}) > 1:  # nearly always
            continue
        if all(one.is_between_steps for one in members):
            found[group] = sequences
    return found


def _uneven_in(look: Look, group: str, step: int, issued: Mapping[int, Sequence[Record]]) -> Verdict:
    place = min(map(len, issued.values()))
    records = {rank: records[place] if place < len(records) else None for rank, records in issued.items()}
    votes: dict[int, object] = {rank: record and record.digest for rank, record in records.items()}
    odd = minority(votes) or odd_at(look.ranks, group, step, records) or sorted(records)
    there = {rank: record for rank, record in records.items() if record is not None}
    rank, record = next(iter(there.items()))
    text = look.ranks[rank].text(record)
    has_more = records[odd[0]] is not None
    if len(odd) == len(records):
        what = f"have left step {step} together, but only rank {', '.join(map(str, there))} with {text}"
    elif has_more:
        what = f"issued {text}, which its peers have left step {step} without"
    else:
        what = f"has left step {step} without {text}, which its peers have issued"
    where = Place(step, group, record.sequence, text if has_more else None, None if has_more else text)
    return blame("diverged", [look.ranks[rank] for rank in odd], what, where)
