"""What all ranks' journals say at one moment, and who waits for whom. Pure; no process is looked at here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from phalanx.ledger.journal_reader import Entries
from phalanx.ledger.limits import Limits
from phalanx.ledger.record import Kind, Record

HELD_S = 0.6
"""A GIL that has been held for so long is: one call into C takes milliseconds."""

STARVED_S = 0.3
"""Who has waited for a core for so long is told to have."""

_COMPUTES = 0.5
"""Of a core, over the time since the rank noted something: who uses more computes, who uses less waits."""

_STILL_S = 0.1
_NOT_JOINED = ("starting", "joining", "another phase")
_NS = 1e9


class RankLook(msgspec.Struct, frozen=True, kw_only=True):
    """One rank at the moment of a look."""

    rank: int
    node: str
    groups: tuple[str, ...]
    """Names of its groups, by their index in its records; the first is of no group."""
    process: Literal["running", "stopped", "gone", "ended"]
    """ended: it has, as it said that it would. gone: it has otherwise."""
    how: str = ""
    """How it ended, if it did."""
    entries: Entries
    held_s: float = 0.0
    """For how long its GIL has been held, though there was a core for it (pulse.py)."""
    still_s: float = 0.0
    """Since it was seen to note something; 0 if nobody has looked for long enough to say."""
    cpu_s: float = 0.0
    """What its process has computed in that time."""
    starved_s: float = 0.0
    """How long one of its threads has waited for a core in that time: that which has waited longest."""

    def has_issued(self, group: str, sequence: int) -> bool:
        """Whether it has come so far in a group."""
        return self.entries.sequences[self.groups.index(group)] >= sequence

    def has_come_to(self, group: str, sequence: int) -> bool:
        """Whether it has come so far in a group, its device too if that is what takes part."""
        if self.entries.device is None or not self.has_issued(group, sequence):
            return self.has_issued(group, sequence)
        record = self.collectives(group).get(sequence)  # one that is not there any more is long over
        return record is None or self.entries.state(record) != "launched"

    def has_come_to_join(self, group: str) -> bool:
        """Whether it has come to where the members of a group join it."""
        return self.entries.has_come_to_join(self.groups.index(group))

    def collectives(self, group: str) -> dict[int, Record]:
        """Those that the journal still has, by sequence."""
        if group not in self.groups:
            return {}
        index = self.groups.index(group)
        records = self.entries.records
        return {one.sequence: one for one in records if one.group == index and one.kind == Kind.COLLECTIVE}

    def decision(self, step: int) -> Record | None:
        """Its record of a step."""
        records = self.entries.records
        return next((record for record in records if record.kind == Kind.STEP and record.step == step), None)

    @property
    def awaits(self) -> tuple[str, Record] | None:
        """The collective that it is in, with the group's name; None if it is in none.

        With a device, the one that this is in, or else the call that does not return. It is in none while it computes,
        whatever it has still been given.
        """
        collectives = [record for record in self.entries.records if record.kind == Kind.COLLECTIVE]
        if self.entries.device is None:
            collectives = collectives[-1:]
        first = next((record for record in collectives if self.entries.state(record) != "done"), None)
        if first is None or self.entries.state(first) == "launched":
            return None
        return self.groups[first.group], first

    @property
    def is_between_steps(self) -> bool:
        """Whether it has left every step that it has begun."""
        return self.entries.phase == "idle" and self.awaits is None

    @property
    def holds_gil(self) -> bool:
        return self.held_s >= HELD_S

    @property
    def computes(self) -> bool:
        """Whether its process is known to compute, as far as it has a core."""
        had_core_s = max(self.still_s - self.starved_s, _STILL_S)
        return self.still_s >= _STILL_S and self.cpu_s >= _COMPUTES * had_core_s

    def text(self, record: Record) -> str:
        """What a record stands for."""
        return self.entries.texts.get(record.digest, f"a collective ({record.digest:016x})")


class Unheard(NamedTuple):
    """A node of which nothing is heard."""

    ranks: tuple[int, ...]
    since_s: float
    """For so long."""
    why: str


class Look(NamedTuple):
    """All ranks at one moment."""

    now_ns: int
    ranks: Mapping[int, RankLook]
    """Those that have begun."""
    groups: Mapping[str, Sequence[int]]
    """The members of each group."""
    limits: Limits = Limits()
    unheard: Mapping[str, Unheard] = {}
    """Nodes whose journals are not heard of any more. What is known of their ranks is as old."""
    unwatched: Mapping[str, Unheard] = {}
    """Nodes that are there, and of whose ranks nothing is known."""

    @property
    def is_at_a_standstill(self) -> bool:
        """Whether each rank is in a collective or in no step: so nothing is under way that could change where others
        are."""
        return all(one.awaits is not None or one.is_between_steps for one in self.ranks.values())

    def members(self, group: str) -> list[int]:
        """Those of a group that have begun."""
        return [rank for rank in self.groups[group] if rank in self.ranks]

    def unwatched_members(self, group: str | None) -> dict[int, str]:
        """Those of a group that nothing is known of, each with its node."""
        members = self.groups[group] if group is not None else ()
        return {rank: node for node, one in self.unwatched.items() for rank in one.ranks if rank in members}


class Wait(NamedTuple):
    """What one rank waits for."""

    since_ns: int
    what: str
    """In words."""
    others: tuple[int, ...]
    """Who has not come; nobody if all have."""
    group: str | None = None
    record: Record | None = None
    """Of the collective; None if it is none."""

    @property
    def step(self) -> int:
        """That it belongs to; 0 if to none."""
        return self.record.step if self.record is not None else 0


def wait_of(look: Look, rank: int) -> Wait | None:
    """What a rank waits for; None if for nobody."""
    one = look.ranks[rank]
    entries = one.entries
    if (awaits := one.awaits) is not None:
        group, record = awaits
        others = (other for other in look.members(group) if not look.ranks[other].has_come_to(group, record.sequence))
        return Wait(record.issued_ns, one.text(record), tuple(others), group, record)
    if not entries.outside:
        return None
    if entries.outside == "the store":
        missing = tuple(other for other in look.ranks if _comes_to_store(look.ranks[other]))
        return Wait(entries.outside_since_ns, entries.outside, missing)
    group = one.groups[entries.outside_group]
    missing = tuple(other for other in look.members(group) if not look.ranks[other].has_come_to_join(group))
    return Wait(entries.outside_since_ns, f"{entries.outside} of group {group}", missing, group)


def _comes_to_store(one: RankLook) -> bool:
    """Whether the others may wait for what this rank has yet to write there."""
    return one.entries.phase in _NOT_JOINED and one.entries.outside != "the store"


def follow(look: Look, rank: int) -> list[int]:
    """Who waits for whom, from a rank to one that waits for nobody, or for nobody any more.

    A rank that stands there twice, first and last, is in a circle.
    """
    path = [rank]
    while (wait := wait_of(look, rank)) is not None and wait.others:
        rank = min(wait.others, key=lambda other: look.ranks[other].awaits is not None)
        path.append(rank)
        if rank in path[:-1]:
            return path[path.index(rank) :]
    return path


State = Literal["gone", "unheard of", "stopped", "held", "waiting", "computing", "blocked", "idle", "busy"]
"""held: its GIL is. waiting: for ranks, or in a collective that all have come to. computing, blocked: in a step and in
no collective. busy: in a phase that is no step."""


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank does, and because of whom: a node of the tree of causes."""

    rank: int
    node: str
    state: State
    what: str
    """In words, to follow the rank's name."""
    waits_for: tuple[int, ...] = ()
    since_s: float = 0.0
    """For how long, if it is known."""


def standings(look: Look) -> dict[int, Standing]:
    """Of every rank that has begun."""
    return {rank: _standing(look, one) for rank, one in look.ranks.items()}


def _standing(look: Look, one: RankLook) -> Standing:
    entries, wait = one.entries, wait_of(look, one.rank)
    phase_s = (look.now_ns - entries.phase_since_ns) / _NS if entries.phase_since_ns else 0.0
    state: State
    waits_for: tuple[int, ...] = ()
    if one.process in ("gone", "ended"):
        state, what, since_s = "gone", one.how or ("is gone" if one.process == "gone" else "has left"), 0.0
    elif one.node in look.unheard:
        state, what, since_s = "unheard of", f"is on {one.node}, which is not heard of", look.unheard[one.node].since_s
    elif one.process == "stopped":
        state, what, since_s = "stopped", "is stopped by a signal", one.still_s
    elif one.holds_gil:
        state, what, since_s = "held", f"holds its GIL, while {entries.phase}", one.held_s
    elif wait is not None:
        whom = f"rank{'s' if len(wait.others) > 1 else ''} {', '.join(map(str, wait.others))}" if wait.others else ""
        state, what = "waiting", f"waits for {whom} in {wait.what}" if whom else f"is in {wait.what}, as all others"
        since_s, waits_for = (look.now_ns - wait.since_ns) / _NS, wait.others
    elif entries.phase == "idle":
        state, what, since_s = "idle", "is idle", phase_s
    elif entries.phase != "stepping":
        state, what, since_s = "busy", f"is {entries.phase}", phase_s
    else:
        state, since_s = "computing" if one.computes or not one.still_s else "blocked", phase_s
        what = f"is in step {entries.step}, in no collective" + (
            "" if state == "computing" else ", and does not compute"
        )
    return Standing(rank=one.rank, node=one.node, state=state, what=what, waits_for=waits_for, since_s=since_s)


def waiting_ranks(look: Look) -> Iterator[tuple[int, Wait]]:
    """Those in a collective of a step, who has waited longest first."""
    waits = [(rank, wait) for rank in look.ranks if (wait := wait_of(look, rank)) is not None and wait.step]
    return iter(sorted(waits, key=lambda of_rank: of_rank[1].since_ns))
