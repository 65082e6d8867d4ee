"""Who is to blame: drawn from what all ranks' journals say at one moment. Pure; no process is looked at here.

In this order, since the one explains the other: a rank that is gone; ranks in different collectives, of which the
earliest counts; a rank that is stopped; a rank that others wait for, found by following who waits for whom. Who differs
from the majority of a group is odd; where there is no majority the decisions tell, the plans that ranks followed; and
if these do not either, the verdict names all of them and says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from phalanx.ledger.journal import Entries
from phalanx.ledger.record import Kind, Record

Cause = Literal["gone", "diverged", "stopped", "skipped", "late", "behind", "circle"]
"""gone: its process has ended. diverged: it is in another collective than its peers. stopped: by a signal. skipped: it
has left a step without a collective that its peers are in. late: it is in the step that its peers are in, and does not
come to the collective that they wait in: it computes, or is stuck. behind: it has not begun that step. circle: ranks
wait for each other in different groups."""

HOPELESS: frozenset[Cause] = frozenset({"diverged", "skipped", "circle"})
"""What ranks that live do not get out of by themselves."""

_LINES_SHOWN = 6
_NS = 1e9


class RankLook(msgspec.Struct, frozen=True, kw_only=True):
    """One rank at the moment of a look."""

    rank: int
    node: str
    groups: tuple[str, ...]
    """Names of its groups, by their index in its records; the first is of no group."""
    process: Literal["running", "stopped", "gone"]
    how: str = ""
    """How it ended, if it did."""
    entries: Entries

    def has_issued(self, group: str, sequence: int) -> bool:
        """Whether it has come so far in a group."""
        return self.entries.sequences[self.groups.index(group)] >= sequence

    def collectives(self, group: str) -> dict[int, Record]:
        """Those that the journal still has, by sequence."""
        return {record.sequence: record for record in self.entries.records if self._is_of(record, group)}

    def decision(self, step: int) -> Record | None:
        """Its record of a step."""
        records = self.entries.records
        return next((record for record in records if record.kind == Kind.STEP and record.step == step), None)

    @property
    def awaits(self) -> tuple[str, Record] | None:
        """The collective that it is in, with the group's name; None if it is in none."""
        for record in reversed(self.entries.records):
            if record.kind == Kind.COLLECTIVE:
                return None if record.is_done else (self.groups[record.group], record)
        return None

    def text(self, record: Record) -> str:
        """What a record stands for."""
        return self.entries.texts.get(record.digest, f"a collective ({record.digest:016x})")

    def _is_of(self, record: Record, group: str) -> bool:
        return record.kind == Kind.COLLECTIVE and self.groups[record.group] == group


class Look(NamedTuple):
    """All ranks at one moment."""

    now_ns: int
    ranks: Mapping[int, RankLook]
    groups: Mapping[str, Sequence[int]]
    """The members of each group."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong first, and with whom."""

    cause: Cause
    culprits: tuple[int, ...]
    """Ranks. Several only where it cannot be told which."""
    nodes: tuple[str, ...]
    """Of the culprits."""
    what: str
    """What was seen of the culprit, in words."""
    step: int | None = None
    group: str | None = None
    sequence: int | None = None
    theirs: str | None = None
    """The collective of the culprit, if there is one."""
    peers: str | None = None
    """The collective that its peers are in."""
    waiting: tuple[int, ...] = ()
    """Ranks that wait for it."""
    waited_s: float = 0.0
    stacks: dict[int, tuple[str, ...]] = {}
    """Of the culprits and of one who waits, as far as they answered: lines of Python, innermost first."""

    @property
    def is_hopeless(self) -> bool:
        """Whether waiting is of no use, though all ranks are there."""
        return self.cause in HOPELESS

    @property
    def is_final(self) -> bool:
        """Whether the run is over, so that no other verdict can follow. Who is late or stopped may still come."""
        return self.is_hopeless or self.cause == "gone"

    @property
    def is_ambiguous(self) -> bool:
        return len(self.culprits) > 1

    def __str__(self) -> str:
        """One paragraph, the culprit first; then where the ranks are."""
        culprits = zip(self.culprits, self.nodes, strict=True)
        names = " or ".join(f"rank {rank} on {node}" if node else f"rank {rank}" for rank, node in culprits)
        said = f"{names} {self.what}"
        if self.is_ambiguous:
            said += "; which of them is wrong cannot be told"
        if self.waiting:
            ranks = ", ".join(map(str, self.waiting))
            said += f"; rank{'s' if len(self.waiting) > 1 else ''} {ranks} waited for {self.waited_s:.2f} s"
            said += f" in {self.peers}" if self.peers else ""
        if self.group is not None:
            step = "" if self.step is None else f"step {self.step}, "
            said += f" ({step}sequence {self.sequence} of group {self.group})"
        for rank, lines in self.stacks.items():
            said += f"\n  rank {rank} is at" + "".join(f"\n    {line}" for line in lines[:_LINES_SHOWN])
        return said


def judge(look: Look) -> Verdict | None:
    """The verdict, or None if nothing is wrong, or not yet: whoever is late may still come."""
    return _gone(look) or _diverged(look) or _stopped(look) or _awaited(look)


def _gone(look: Look) -> Verdict | None:
    gone = [one for one in look.ranks.values() if one.process == "gone"]
    if not gone:
        return None
    first = min(gone, key=lambda one: one.entries.records[-1].issued_ns if one.entries.records else 0)
    waiting, waited_s = _waiting(look)
    return _verdict(
        "gone", [first], first.how or "is gone", waiting=waiting, waited_s=waited_s, step=first.entries.step
    )


class _Divergence(NamedTuple):
    """A place of a group at which members have issued different collectives."""

    group: str
    sequence: int
    records: dict[int, Record]

    @property
    def began(self) -> tuple[int, int]:
        """The earliest step, and time, of any of them."""
        return min((record.step, record.issued_ns) for record in self.records.values())


def _diverged(look: Look) -> Verdict | None:
    found = [divergence for group in look.groups for divergence in _first_divergence(look, group)]
    if not found:
        return None
    first = min(found, key=lambda divergence: divergence.began)
    odd = _odd(look, first)
    culprit = look.ranks[odd[0]]
    others = [rank for rank in first.records if rank not in odd] or list(first.records)
    peer = look.ranks[others[0]]
    theirs, peers = culprit.text(first.records[odd[0]]), peer.text(first.records[others[0]])
    return _verdict(
        "diverged",
        [look.ranks[rank] for rank in odd],
        f"issued {theirs}" + (f" where its peers issued {peers}" if others[0] not in odd else " and another one"),
        step=first.records[odd[0]].step,
        group=first.group,
        sequence=first.sequence,
        theirs=theirs,
        peers=peers,
    )


def _first_divergence(look: Look, group: str) -> Iterator[_Divergence]:
    issued = {rank: look.ranks[rank].collectives(group) for rank in look.groups[group] if rank in look.ranks}
    for sequence in sorted(set().union(*issued.values())):
        records = {rank: of_rank[sequence] for rank, of_rank in issued.items() if sequence in of_rank}
        if not all(record.step for record in records.values()):  # a method's: its caller hears of it, and goes on
            continue
        if len({record.digest for record in records.values()}) > 1:
            yield _Divergence(group, sequence, records)
            return


def _odd(look: Look, divergence: _Divergence) -> list[int]:
    """The ranks to blame: the minority; in a tie those whose decisions differ; all, if that does not tell either."""
    records = divergence.records
    odd = _minority({rank: record.digest for rank, record in records.items()})
    if odd:
        return odd
    decisions = {}
    for one in look.ranks.values():
        for record in records.values():
            decision = one.decision(record.step)
            if decision is not None:
                decisions[one.rank] = decision.digest
    return [rank for rank in _minority(decisions) if rank in records] or sorted(records)


def _minority(votes: Mapping[int, int]) -> list[int]:
    """Who voted for anything but what most did; nobody if there is no majority, or all agree."""
    if not votes:
        return []
    (winner, count), *_ = Counter(votes.values()).most_common(1)
    return sorted(rank for rank, vote in votes.items() if vote != winner) if 2 * count > len(votes) else []


def _stopped(look: Look) -> Verdict | None:
    stopped = [one for one in look.ranks.values() if one.process == "stopped"]
    waiting, waited_s = _waiting(look)
    if not stopped or not (waiting or any(one.entries.phase != "idle" for one in stopped)):
        return None
    doing = f", while {stopped[0].entries.phase}" if stopped[0].entries.phase != "idle" else ""
    return _verdict(
        "stopped",
        stopped[:1],
        f"is stopped by a signal{doing}",
        waiting=[rank for rank in waiting if rank != stopped[0].rank],
        waited_s=waited_s,
        step=stopped[0].entries.step,
    )


def _waiting(look: Look) -> tuple[list[int], float]:
    """Who is in a collective, and for how long the first of them has been."""
    since = {one.rank: one.awaits[1].issued_ns for one in look.ranks.values() if one.awaits is not None}
    return sorted(since), (look.now_ns - min(since.values())) / _NS if since else 0.0


def _awaited(look: Look) -> Verdict | None:
    """Follow who waits for whom, first from the rank that has waited longest, to one that waits for nobody."""
    waits = {one.rank: one.awaits for one in look.ranks.values() if one.awaits is not None}
    for rank in sorted(waits, key=lambda rank: waits[rank][1].issued_ns):
        verdict = _awaited_by(look, rank, waits)
        if verdict is not None:
            return verdict
    return None


def _awaited_by(look: Look, rank: int, waits: Mapping[int, tuple[str, Record]]) -> Verdict | None:
    """Nobody, if all have come to where the last of those who wait is: the data is on its way."""
    path: list[int] = []
    while rank in waits and rank not in path:
        path.append(rank)
        behind = _behind(look, *waits[rank])
        if not behind:
            return None
        rank = min(behind, key=lambda other: other in waits)
    group, record = waits[path[-1]]
    if rank in path:
        return _circle(look, path[path.index(rank) :], waits)
    return _of_awaited(look, rank, group, record, look.ranks[path[-1]].text(record))


def _behind(look: Look, group: str, record: Record) -> list[int]:
    """Members of the group that have not issued what the record is."""
    members = [rank for rank in look.groups[group] if rank in look.ranks]
    return [rank for rank in members if not look.ranks[rank].has_issued(group, record.sequence)]


def _of_awaited(look: Look, rank: int, group: str, record: Record, text: str) -> Verdict | None:
    culprit = look.ranks[rank]
    entries, decision = culprit.entries, culprit.decision(record.step)
    cause: Cause
    if record.step == 0:  # a method's own collective, or one of the start: these have deadlines of their own
        return None
    if entries.step < record.step:
        cause, what = "behind", f"has not begun step {record.step}: it is {entries.phase}"
    elif entries.step > record.step or (decision is not None and decision.is_done):
        cause, what = "skipped", f"has left step {record.step} without {text}, and is {entries.phase}"
    else:
        cause, what = "late", f"does not come to {text}: it is {entries.phase}, in no collective"
    members = [other for other in look.groups[group] if other in look.ranks]
    waiting = [other for other in members if (awaits := look.ranks[other].awaits) is not None and awaits[0] == group]
    return _verdict(
        cause,
        [culprit],
        what,
        step=record.step,
        group=group,
        sequence=record.sequence,
        peers=text,
        waiting=waiting,
        waited_s=(look.now_ns - record.issued_ns) / _NS,
    )


def _circle(look: Look, path: Sequence[int], waits: Mapping[int, tuple[str, Record]]) -> Verdict:
    """Each waits for the next in another group: whose order of groups differs from its like's cannot be seen here."""
    first = min(path, key=lambda rank: waits[rank][1].issued_ns)
    group, record = waits[first]
    where = "; ".join(f"rank {rank} in {look.ranks[rank].text(waits[rank][1])} of {waits[rank][0]}" for rank in path)
    return _verdict(
        "circle",
        [look.ranks[rank] for rank in sorted(path)],
        f"wait for each other: {where}",
        step=record.step,
        group=group,
        sequence=record.sequence,
        waited_s=(look.now_ns - record.issued_ns) / _NS,
    )


def _verdict(
    cause: Cause,
    culprits: Sequence[RankLook],
    what: str,
    *,
    step: int | None = None,
    group: str | None = None,
    sequence: int | None = None,
    theirs: str | None = None,
    peers: str | None = None,
    waiting: Sequence[int] = (),
    waited_s: float = 0.0,
) -> Verdict:
    return Verdict(
        cause=cause,
        culprits=tuple(one.rank for one in culprits),
        nodes=tuple(one.node for one in culprits),
        what=what,
        step=step,
        group=group,
        sequence=sequence,
        theirs=theirs,
        peers=peers,
        waiting=tuple(waiting),
        waited_s=waited_s,
    )
