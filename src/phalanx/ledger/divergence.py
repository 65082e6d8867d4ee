"""Ranks that follow different plans, or are in different collectives: which of them has diverged. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from phalanx.ledger.habit import against_plan, first_deviation, out_of_habit
from phalanx.ledger.look import Look, RankLook
from phalanx.ledger.minority import minority
from phalanx.ledger.record import Record
from phalanx.ledger.uneven import uneven
from phalanx.ledger.verdict import Place, Verdict, blame


class _Divergence(NamedTuple):
    """A place of a group at which members have issued different collectives."""

    group: str
    sequence: int
    records: dict[int, Record]

    @property
    def began(self) -> tuple[int, int]:
        """The earliest step, and time, of any of them."""
        return min((record.step, record.issued_ns) for record in self.records.values())


def diverged(look: Look) -> Verdict | None:
    """The earliest divergence, of plans or of collectives in any group."""
    found = [divergence for group in look.groups for divergence in _first_divergence(look, group)]
    first = min(found, key=lambda divergence: divergence.began, default=None)
    plan = _other_plan(look)
    if plan is not None and plan.step is not None and (first is None or plan.step <= first.began[0]):
        return plan
    return _other_collective(look, first) if first is not None else uneven(look)


def _other_plan(look: Look) -> Verdict | None:
    """Ranks that follow different plans in the same step: the plan is one message to all of them."""
    of_step: dict[int, dict[int, int]] = {}
    for rank, one in look.ranks.items():
        for step, digest in one.entries.decisions.items():
            of_step.setdefault(step, {})[rank] = digest
    different = [step for step, plans in of_step.items() if len(set(plans.values())) > 1]
    if not different:
        return None
    step = min(different)
    odd = minority(of_step[step]) or sorted(of_step[step])
    what = f"follows another plan in step {step}" + (" than its peers" if len(odd) < len(of_step[step]) else "")
    return blame("diverged", [look.ranks[rank] for rank in odd], what, Place(step))


def _other_collective(look: Look, first: _Divergence) -> Verdict:
    odd = _odd(look, first)
    culprit = look.ranks[odd[0]]
    if len(odd) == 1 and (earlier := _earlier(look, culprit, first)) is not None:
        return earlier
    others = [rank for rank in first.records if rank not in odd] or [rank for rank in first.records if rank != odd[0]]
    peer = look.ranks[others[0]]
    theirs, peers = culprit.text(first.records[odd[0]]), peer.text(first.records[others[0]])
    what = f"issued {theirs}" + (f" where its peers issued {peers}" if others[0] not in odd else " and another one")
    if theirs == peers:
        what = f"has issued something else than its peers, before {theirs}"
    place = Place(first.records[odd[0]].step, first.group, first.sequence, theirs, peers)
    return blame("diverged", [look.ranks[rank] for rank in odd], what, place)


def _earlier(look: Look, culprit: RankLook, found: _Divergence) -> Verdict | None:
    """What the culprit has left out of the same step in another group, before it met a peer in another collective."""
    step = found.records[culprit.rank].step
    deviation = first_deviation(culprit, step)
    if deviation is None or deviation.group == found.group or not deviation.is_ahead:
        return None
    group, sequence, instead = deviation.group, deviation.sequence, deviation.instead
    issued = {rank: look.ranks[rank].collectives(group).get(sequence) for rank in look.members(group)}
    peer, record = next(((rank, one) for rank, one in issued.items() if one is not None), (culprit.rank, None))
    if record is None or record.step != step or culprit.rank in (rank for rank, one in issued.items() if one):
        return None
    theirs, peers = culprit.text(instead), look.ranks[peer].text(record)
    what = f"issued {theirs} of group {culprit.groups[instead.group]} where its peers issued {peers}"
    return blame("diverged", [culprit], what, Place(step, group, sequence, theirs, peers))


def _first_divergence(look: Look, group: str) -> Iterator[_Divergence]:
    """Where the collectives differ; failing that, the earliest place that is known to come after one where they did."""
    issued = {rank: look.ranks[rank].collectives(group) for rank in look.members(group)}
    after: _Divergence | None = None
    for sequence in sorted(set().union(*issued.values())):
        records = {rank: of_rank[sequence] for rank, of_rank in issued.items() if sequence in of_rank}
        if not all(record.step for record in records.values()):  # a method's: its caller hears of it, and goes on
            continue
        if len({(record.digest, record.step) for record in records.values()}) > 1:
            yield _Divergence(group, sequence, records)
            return
        if after is None and len({record.rolling for record in records.values()}) > 1:
            after = _Divergence(group, sequence, records)
    if after is not None:
        yield after


def _odd(look: Look, divergence: _Divergence) -> list[int]:
    """The ranks to blame: the minority; in a tie those who do what they have never done at this place of a step, or in
    a size that the plan does not have; all, if that does not tell either. (They have followed the same plans until
    then, or it would be for these that ranks are blamed.)"""
    records = divergence.records
    votes: dict[int, object] = {rank: (record.digest, record.step) for rank, record in records.items()}
    if len(set(votes.values())) == 1:
        votes = {rank: record.rolling for rank, record in records.items()}
    odd = minority(votes)
    if odd:
        return odd
    odd = out_of_habit(look.ranks, divergence.group, records) or against_plan(look.ranks, divergence.group, records)
    return odd or sorted(records)
