"""Who is to blame when ranks of a program that is not ours wait for each other. Pure; no process is looked at here.

Such a program has no plan that all ranks follow, often no steps, and ranks that end one after the other when all is
well. So a rank is judged by how far it has come in each lane (registry.LaneNotice), in this order: one that has ended
while others need it, unless ranks had differed in that lane before; ranks in different collectives; one that is
stopped; one that others wait for. Where ranks find each other (`init_process_group`) is a lane as well, and the only
one whose members may not have begun a journal.

A rank waits if it is in a call. If it is in none, its newest collective counts, which may have been given to a GPU,
or to C++: but only if nobody gets through that before all have come, and with patience, for it may as well compute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from phalanx.ledger.journal_reader import Entries
from phalanx.ledger.minority import minority
from phalanx.ledger.program import ALL_MEET, ENDED_STEP, ENDING, JOINING, number_of
from phalanx.ledger.record import Kind, Record
from phalanx.ledger.verdict import Cause, Place, Verdict, Waiting, blame

CERTAIN_S = 1.0
"""After so long a wait is no chance any more, where the cause can be seen."""

JOINING_S = 60.0
"""Ranks that are started together come to find each other within so much time, whatever each has to do before."""

_NS = 1e9


class ProgramRank(msgspec.Struct, frozen=True, kw_only=True):
    """One rank at the moment of a look."""

    rank: int
    node: str
    lanes: dict[int, str]
    """Names, by their index in its records."""
    process: Literal["running", "stopped", "gone"]
    gone_s: float = 0.0
    """For how long it has been gone, as far as it was seen."""
    entries: Entries

    @property
    def has_ended_in_order(self) -> bool:
        return self.entries.step == ENDED_STEP

    @property
    def has_ended(self) -> bool:
        return self.process == "gone" or self.has_ended_in_order

    def sequence(self, lane: str) -> int:
        """How far it has come there."""
        return next((self.entries.sequences[index] for index, name in self.lanes.items() if name == lane), 0)

    def collectives(self, lane: str) -> dict[int, Record]:
        """Those that the journal still has, by sequence."""
        return {record.sequence: record for name, record in self.all_collectives() if name == lane}

    def all_collectives(self) -> Iterator[tuple[str, Record]]:
        """The oldest first, each with its lane."""
        for record in self.entries.records:
            if record.kind == Kind.COLLECTIVE and record.group in self.lanes:
                yield self.lanes[record.group], record

    @property
    def newest(self) -> tuple[str, Record] | None:
        """The collective that it has come to last."""
        found = deque(self.all_collectives(), maxlen=1)
        return found[0] if found else None

    @property
    def blocked(self) -> tuple[str, Record] | None:
        """The collective that it is in, if it is in a call."""
        return next(((lane, record) for lane, record in self.all_collectives() if not record.is_done), None)

    def text(self, record: Record) -> str:
        """What a record stands for."""
        return self.entries.texts.get(record.digest, f"a collective ({record.digest:016x})")


class Newcomer(msgspec.Struct, frozen=True, kw_only=True):
    """A rank that has not come to where ranks find each other."""

    rank: int
    node: str = ""
    """Empty if it is not known."""
    process: Literal["running", "stopped", "gone", "unknown"] = "unknown"
    pid: int = 0


class ProgramLook(NamedTuple):
    """All ranks at one moment."""

    now_ns: int
    ranks: Mapping[int, ProgramRank]
    lanes: Mapping[str, Sequence[int]]
    """The members of each."""
    newcomers: Mapping[int, Newcomer] = {}
    """As far as their processes are known."""
    here: frozenset[int] = frozenset()
    """The ranks of this host; none if that is not known."""

    @property
    def missing(self) -> list[Newcomer]:
        """Who has not come to where ranks find each other: first who says why, and who is of this host."""
        missing = [self.newcomers.get(rank, Newcomer(rank=rank)) for rank in self.lanes.get(JOINING, ())]
        order = ("gone", "stopped", "running", "unknown")
        return sorted(
            (one for one in missing if one.rank not in self.ranks),
            key=lambda one: (order.index(one.process), one.rank not in self.here, one.rank),
        )

    def behind(self, lane: str, sequence: int) -> list[int]:
        """Members that have not come so far."""
        return [rank for rank in self.lanes[lane] if rank in self.ranks and self.ranks[rank].sequence(lane) < sequence]

    def since_s(self, record: Record) -> float:
        """For how long it has been there."""
        return (self.now_ns - record.issued_ns) / _NS


class Wait(NamedTuple):
    """What a rank waits for."""

    lane: str
    record: Record
    is_blocked: bool
    """Whether it is in the call, and so waits for certain."""


def judge_program(look: ProgramLook, patience_s: float) -> Verdict | None:
    """The verdict, or None if nothing is wrong, or not yet: who has computed for less than `patience_s` may come."""
    waits = _waits(look)
    return (
        _ended_while_needed(look, waits, patience_s)
        or _gone(look)
        or _diverged(look, patience_s)
        or _stopped(look, waits)
        or _missing(look, waits, patience_s)
        or _awaited(look, waits, patience_s)
        or _never_joined(look, waits, patience_s)
    )


def _waits(look: ProgramLook) -> dict[int, Wait]:
    waits = {}
    for rank, one in look.ranks.items():
        if (blocked := one.blocked) is not None:
            waits[rank] = Wait(*blocked, is_blocked=True)
            continue
        newest = one.newest
        if newest is not None and newest[1].digest & ALL_MEET and look.behind(newest[0], newest[1].sequence):
            waits[rank] = Wait(*newest, is_blocked=False)
    return waits


def _ended_while_needed(look: ProgramLook, waits: Mapping[int, Wait], patience_s: float) -> Verdict | None:
    """A rank that will never come to what a peer has issued; what it had differed in before, if that ended it."""
    ended = _needed_but_ended(look, waits)
    differed = _diverged(look, patience_s) if ended is not None else None
    if ended is None or differed is None or differed.group != ended.group:
        return ended
    assert differed.sequence is not None and ended.sequence is not None
    return differed if differed.sequence < ended.sequence else ended


def _needed_but_ended(look: ProgramLook, waits: Mapping[int, Wait]) -> Verdict | None:
    """A rank that will never come to what a peer has issued. Who failed because of another one is not the first."""
    missed = {rank: wait for rank, one in look.ranks.items() if one.has_ended and (wait := _missed(look, one, waits))}
    if not missed:
        return None
    first = min(missed, key=lambda rank: (rank in waits, _last_sign(look.ranks[rank])))
    culprit, wait = look.ranks[first], missed[first]
    peers = _peers_in(wait, waits, but=first)
    text = look.ranks[peers[0]].text(wait.record)
    return blame(
        "skipped" if culprit.has_ended_in_order else "gone",
        [culprit],
        f"has ended without {text}" if culprit.has_ended_in_order else _how(culprit),
        _at(wait, peers=text),
        Waiting(peers, look.since_s(wait.record)),
    )


def _missed(look: ProgramLook, ended: ProgramRank, waits: Mapping[int, Wait]) -> Wait | None:
    """What others are in that it has not come to."""
    for rank, wait in waits.items():
        if rank != ended.rank and ended.rank in look.behind(wait.lane, wait.record.sequence):
            return wait
    return None


def _blocked(wait: Wait | None) -> Wait | None:
    """The call that a rank is in, which others cannot leave without it either."""
    return wait if wait is not None and wait.is_blocked else None


def _peers_in(wait: Wait, waits: Mapping[int, Wait], *, but: int) -> list[int]:
    place = wait.lane, wait.record.sequence
    return sorted(rank for rank, other in waits.items() if rank != but and (other.lane, other.record.sequence) == place)


def _gone(look: ProgramLook) -> Verdict | None:
    """One that nobody needs yet, while others go on. That all end within a second is how many a program ends."""
    gone = [one for one in look.ranks.values() if one.process == "gone" and not one.has_ended_in_order]
    if not gone or all(one.has_ended for one in look.ranks.values()) or max(one.gone_s for one in gone) < CERTAIN_S:
        return None
    first = min(gone, key=_last_sign)
    return blame("gone", [first], _how(first), Place(number_of(first.entries.step)))


def _how(one: ProgramRank) -> str:
    return one.entries.texts.get(ENDING, "is gone: it was killed, or ended itself at once")


def _last_sign(one: ProgramRank) -> int:
    if one.has_ended_in_order:
        return one.entries.phase_since_ns
    return one.entries.records[-1].issued_ns if one.entries.records else 0


def _diverged(look: ProgramLook, patience_s: float) -> Verdict | None:
    """Where votes are equal, who is still to come has the casting one, for as long as there is patience."""
    found = [(lane, records) for lane in look.lanes if (records := _first_difference(look, lane))]
    if not found:
        return None
    lane, records = min(found, key=lambda one: min(record.issued_ns for record in one[1].values()))
    odd = minority({rank: record.digest for rank, record in records.items()})
    if not odd and _is_undecided(look, lane, records, patience_s):
        return None
    odd = odd or sorted(records)
    others = sorted(rank for rank in records if rank not in odd)
    waiting = [rank for rank in others if not records[rank].is_done]
    culprit, peer = odd[0], (others or odd[1:])[0]
    theirs, peers = (look.ranks[rank].text(records[rank]) for rank in (culprit, peer))
    return blame(
        "diverged",
        [look.ranks[rank] for rank in odd],
        f"issued {theirs} where " + (f"its peers issued {peers}" if others else f"the other issued {peers}"),
        _at(Wait(lane, records[culprit], is_blocked=True), theirs=theirs, peers=peers),
        Waiting(waiting, max((look.since_s(records[rank]) for rank in waiting), default=0.0)),
    )


def _first_difference(look: ProgramLook, lane: str) -> dict[int, Record] | None:
    issued = {rank: look.ranks[rank].collectives(lane) for rank in look.lanes[lane] if rank in look.ranks}
    for sequence in sorted(set().union(*issued.values())):
        records = {rank: of_rank[sequence] for rank, of_rank in issued.items() if sequence in of_rank}
        if len({record.digest for record in records.values()}) > 1:
            return records
    return None


def _is_undecided(look: ProgramLook, lane: str, records: Mapping[int, Record], patience_s: float) -> bool:
    """Whether a member that has not come so far may come yet."""
    to_come = [rank for rank in look.behind(lane, records[min(records)].sequence) if not look.ranks[rank].has_ended]
    return bool(to_come) and min(look.since_s(record) for record in records.values()) < patience_s


def _stopped(look: ProgramLook, waits: Mapping[int, Wait]) -> Verdict | None:
    """Of those that others wait for: a whole program that is stopped is not hung."""
    for rank, one in look.ranks.items():
        wait = (_missed(look, one, waits) or _blocked(waits.get(rank))) if one.process == "stopped" else None
        if wait is None or look.since_s(wait.record) < CERTAIN_S:
            continue
        peers = [other for other in _peers_in(wait, waits, but=rank) if look.ranks[other].process == "running"]
        if peers:
            place = _at(wait, peers=look.ranks[peers[0]].text(wait.record))
            return blame("stopped", [one], "is stopped by a signal", place, Waiting(peers, look.since_s(wait.record)))
    return None


def _joining(waits: Mapping[int, Wait]) -> dict[int, Wait]:
    """Of those that are where ranks find each other."""
    return {rank: wait for rank, wait in waits.items() if wait.lane == JOINING and wait.is_blocked}


def _missing(look: ProgramLook, waits: Mapping[int, Wait], patience_s: float) -> Verdict | None:
    """A rank that ranks wait for which have come to find each other. It has no journal."""
    inside, missing = _joining(waits), look.missing
    if not inside or not missing:
        return None
    first = min(inside.values(), key=lambda wait: wait.record.issued_ns)
    text, waited_s = look.ranks[min(inside)].text(first.record), look.since_s(first.record)
    one, others = missing[0], [str(other.rank) for other in missing[1:]]
    also = f"; nor {'do ranks' if len(others) > 1 else 'does rank'} {', '.join(others)}" if others else ""
    if waited_s < (CERTAIN_S if one.process in ("gone", "stopped") else max(patience_s, JOINING_S)):
        return None
    cause, what = _of_missing(look, one, text)
    return blame(cause, [one], what + also, _at(first, peers=text), Waiting(sorted(inside), waited_s))


def _of_missing(look: ProgramLook, one: Newcomer, text: str) -> tuple[Cause, str]:
    if one.process == "gone":
        return "gone", f"has ended and not come to {text}"
    if one.process == "stopped":
        return "stopped", f"is stopped by a signal, and has not come to {text}"
    if one.process == "running":
        return "late", f"does not come to {text}: its process {one.pid} is there"
    where = "it is of another host" if look.here and one.rank not in look.here else "no process of it is known"
    return "late", f"does not come to {text}: {where}"


def _never_joined(look: ProgramLook, waits: Mapping[int, Wait], patience_s: float) -> Verdict | None:
    """All have come to find each other, and that does not end: who is still there is to blame if others have left."""
    inside = _joining(waits)
    if not inside or look.missing or look.behind(JOINING, max(wait.record.sequence for wait in inside.values())):
        return None
    last = max(inside.values(), key=lambda wait: wait.record.issued_ns)
    text, waited_s = look.ranks[min(inside)].text(last.record), look.since_s(last.record)
    if waited_s < max(patience_s, JOINING_S):
        return None
    if len(inside) < len(look.lanes[JOINING]):
        what = f"does not come out of {text}, which its peers have left"
        return blame("hung", [look.ranks[rank] for rank in sorted(inside)], what, _at(last), Waiting(for_s=waited_s))
    ranks = ", ".join(map(str, sorted(inside)))
    what = f"ranks {ranks} have all come to {text}, which does not end: to blame is no rank, but the store by which"
    what += " they find each other, or what carries the data"
    return blame("store", [], what, _at(last), Waiting(for_s=waited_s))


def _awaited(look: ProgramLook, waits: Mapping[int, Wait], patience_s: float) -> Verdict | None:
    """Follow who waits for whom, first from the rank that has waited longest, to one that waits for nobody."""
    for rank in sorted(waits, key=lambda rank: waits[rank].record.issued_ns):
        verdict = _awaited_by(look, rank, waits, patience_s)
        if verdict is not None:
            return verdict
    return None


def _awaited_by(look: ProgramLook, rank: int, waits: Mapping[int, Wait], patience_s: float) -> Verdict | None:
    """Nobody, if all have come to where the last of those who wait is: the data is on its way."""
    path: list[int] = []
    while rank in waits and rank not in path:
        path.append(rank)
        behind = look.behind(waits[rank].lane, waits[rank].record.sequence)
        if not behind:
            return None
        rank = min(behind, key=lambda other: other in waits)
    waited_s = min(look.since_s(waits[other].record) for other in path)
    is_certain = all(waits[other].is_blocked for other in path)
    if rank in path:
        circle = path[path.index(rank) :]
        return _circle(look, circle, waits) if waited_s >= (CERTAIN_S if is_certain else patience_s) else None
    if waits[path[-1]].lane == JOINING:
        patience_s = max(patience_s, JOINING_S)
    verdict = _of_awaited(look, look.ranks[rank], waits[path[-1]], waits)
    return verdict if verdict.waited_s >= (CERTAIN_S if verdict.cause == "skipped" else patience_s) else None


def _of_awaited(look: ProgramLook, culprit: ProgramRank, wait: Wait, waits: Mapping[int, Wait]) -> Verdict:
    peers = _peers_in(wait, waits, but=culprit.rank)
    text = look.ranks[peers[0]].text(wait.record)
    theirs, needed = culprit.entries.step, wait.record.step
    cause: Cause = "late"
    what = f"does not come to {text}: it is in no collective"
    if theirs != needed and None not in (number_of(theirs), number_of(needed)):
        number = number_of(needed)
        is_ahead = theirs > needed
        cause = "skipped" if is_ahead else "behind"
        what = f"has left step {number} without {text}" if is_ahead else f"has not begun step {number}"
    return blame(cause, [culprit], what, _at(wait, peers=text), Waiting(peers, look.since_s(wait.record)))


def _circle(look: ProgramLook, path: Sequence[int], waits: Mapping[int, Wait]) -> Verdict:
    first = min(path, key=lambda rank: waits[rank].record.issued_ns)
    where = "; ".join(
        f"rank {rank} in {look.ranks[rank].text(waits[rank].record)} of {waits[rank].lane}" for rank in path
    )
    return blame(
        "circle",
        [look.ranks[rank] for rank in sorted(path)],
        f"wait for each other: {where}",
        _at(waits[first]),
        Waiting(for_s=look.since_s(waits[first].record)),
    )


def _at(wait: Wait, *, theirs: str | None = None, peers: str | None = None) -> Place:
    return Place(number_of(wait.record.step), wait.lane, wait.record.sequence, theirs, peers)
