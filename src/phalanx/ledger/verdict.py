"""Who is to blame: drawn from what all ranks' journals say at one moment. Pure; no process is looked at here.

In this order, since the one explains the other: a rank that is gone, or a node that is not heard of; ranks that follow
different plans, or are in different collectives, of which the earliest counts; a rank that is stopped; one whose GIL
is held; a rank that others wait for, found by following who waits for whom; a store that does not answer; a phase that
takes too long. Who differs from the majority of a group is odd; where there is no majority the decisions tell, the
plans that ranks followed; and if these do not either, the verdict names all of them and says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from phalanx.ledger.habit import (
    against_plan,
    first_deviation,
    is_out_of_habit,
    next_group,
    odd_at,
    out_of_habit,
    steps_of,
)
from phalanx.ledger.look import STARVED_S, Look, RankLook, Standing, Wait, follow, wait_of, waiting_ranks
from phalanx.ledger.record import Kind, Record

__all__ = ["HOPELESS", "WAITED", "Cause", "Look", "RankLook", "Verdict", "judge", "uneven_groups"]

Cause = Literal[
    "gone",
    "lost",
    "diverged",
    "stopped",
    "gil",
    "skipped",
    "late",
    "slow",
    "behind",
    "circle",
    "hung",
    "store",
    "overdue",
]
"""gone: its process has ended. lost: nothing is heard of its node. diverged: it follows another plan than its peers, or
is in another collective. stopped: by a signal. gil: a call into C keeps its GIL. skipped: it has left a step without a
collective that its peers are in. late: it is in the step that its peers are in, does not come to the collective that
they wait in, and is not known to compute. slow: the same, and it computes. behind: it has not begun that step. circle:
ranks wait for each other in different groups. hung: all have come to a collective and it does not end. store: it does
not answer, so ranks cannot join. overdue: it takes too long for what it says that it does."""

HOPELESS: frozenset[Cause] = frozenset({"diverged", "skipped", "circle"})
"""What ranks that live do not get out of by themselves."""

WAITED: frozenset[Cause] = frozenset({"skipped", "late", "slow", "behind", "circle", "hung"})
"""What is told only when somebody has waited for long."""

STORE_S = 10.0
"""The store passes on what ranks write within milliseconds."""

HUNG_S = 1.0
"""A collective that all have come to takes its time; whoever is patient waits for longer than this."""

_LINES_SHOWN = 6
_NS = 1e9


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong first, and with whom."""

    cause: Cause
    culprits: tuple[int, ...]
    """Ranks. Several only where it cannot be told which; none where it is no rank: the store, or what carries data."""
    nodes: tuple[str, ...]
    """Of the culprits."""
    what: str
    """What was seen of the culprit, in words that follow its name; a whole sentence if there is no culprit."""
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
    standings: dict[int, Standing] = {}
    """What every rank was doing, and because of whom."""

    @property
    def is_hopeless(self) -> bool:
        """Whether waiting is of no use, though all ranks are there."""
        return self.cause in HOPELESS

    @property
    def is_final(self) -> bool:
        """Whether the run is over, so that no other verdict can follow. Who is late or stopped may still come."""
        return self.is_hopeless or self.cause == "gone"

    @property
    def is_of_a_wait(self) -> bool:
        """Whether it is told only when somebody has waited for long. Of a node that is there, but not watched, too."""
        return self.cause in WAITED or (self.cause == "lost" and self.sequence is not None)

    @property
    def is_ambiguous(self) -> bool:
        return len(self.culprits) > 1 and self.cause != "lost"

    def __str__(self) -> str:
        """One paragraph, the culprit first; then where the ranks are."""
        said = f"{self._names()} {self.what}".lstrip()
        if self.is_ambiguous:
            said += "; which of them is wrong cannot be told"
        if self.waiting:
            ranks = ", ".join(map(str, self.waiting))
            said += f"; rank{'s' if len(self.waiting) > 1 else ''} {ranks} waited for {self.waited_s:.2f} s"
            said += f" in {self.peers}" if self.peers else ""
        if self.sequence is not None:
            step = f"step {self.step}, " if self.step is not None else ""  # a program of others need not have steps
            said += f" ({step}sequence {self.sequence} of group {self.group})"
        for rank, lines in self.stacks.items():
            said += f"\n  rank {rank} is at" + "".join(f"\n    {line}" for line in lines[:_LINES_SHOWN])
        return said

    def _names(self) -> str:
        ranks = [f"rank {rank}" for rank in self.culprits]
        if self.cause == "lost":
            by_node = {node: [r for r, n in zip(ranks, self.nodes, strict=True) if n == node] for node in self.nodes}
            return " and ".join(f"node {node} ({', '.join(of_node)})" for node, of_node in by_node.items())
        there = zip(ranks, self.nodes, strict=True)
        return " or ".join(f"{rank} on {node}" if node else rank for rank, node in there)  # a file may not say where


def judge(look: Look) -> Verdict | None:
    """The verdict, or None if nothing is wrong, or not yet: whoever is late may still come."""
    return (
        _gone(look)
        or _diverged(look)  # that is known for good, also while another node is not heard of
        or _lost(look)
        or _stopped(look)
        or _held(look)
        or _awaited(look)
        or _alone(look)
        or _store(look)
        or _overdue(look)
    )


def _gone(look: Look) -> Verdict | None:
    gone = [one for one in look.ranks.values() if one.process == "gone"]
    if not gone:
        return None
    first = min(gone, key=lambda one: one.entries.records[-1].issued_ns if one.entries.records else 0)
    waiting, waited_s = _waiting(look)
    return _verdict(
        "gone", [first], first.how or "is gone", waiting=waiting, waited_s=waited_s, step=first.entries.step
    )


def _lost(look: Look) -> Verdict | None:
    if not look.unheard:
        return None
    lost = {rank: node for node, unheard in look.unheard.items() for rank in unheard.ranks}
    waits = {rank: one.awaits for rank, one in look.ranks.items() if rank not in lost and one.awaits is not None}
    waiting = sorted(rank for rank, (group, _) in waits.items() if lost.keys() & set(look.groups[group]))
    since_ns = [waits[rank][1].issued_ns for rank in waiting]
    are = "are" if len(look.unheard) > 1 else "is"
    return Verdict(
        cause="lost",
        culprits=tuple(lost),
        nodes=tuple(lost.values()),
        what=f"{are} gone or cannot be reached: {'; '.join(unheard.why for unheard in look.unheard.values())}",
        peers=look.ranks[waiting[0]].text(waits[waiting[0]][1]) if waiting else None,
        waiting=tuple(waiting),
        waited_s=(look.now_ns - min(since_ns)) / _NS if waiting else max(one.since_s for one in look.unheard.values()),
    )


def _unwatched(look: Look, wait: Wait) -> Verdict | None:
    """All have come to a collective that are known of: the others are on nodes without a watcher."""
    assert wait.group is not None and wait.record is not None
    unknown = look.unwatched_members(wait.group)
    if not unknown:
        return None
    nodes = sorted(set(unknown.values()))
    why = "; ".join(look.unwatched[node].why for node in nodes)
    return Verdict(
        cause="lost",
        culprits=tuple(unknown),
        nodes=tuple(unknown.values()),
        what=f"{'are' if len(nodes) > 1 else 'is'} not watched, and may be what others wait for: {why}",
        step=wait.step,
        group=wait.group,
        sequence=wait.record.sequence,
        peers=wait.what,
        waiting=tuple(rank for rank in look.members(wait.group) if _is_in(look.ranks[rank], wait.group)),
        waited_s=(look.now_ns - wait.since_ns) / _NS,
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
    first = min(found, key=lambda divergence: divergence.began, default=None)
    plan = _other_plan(look)
    if plan is not None and plan.step is not None and (first is None or plan.step <= first.began[0]):
        return plan
    return _other_collective(look, first) if first is not None else _uneven(look)


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
    odd = _minority(of_step[step]) or sorted(of_step[step])
    what = f"follows another plan in step {step}" + (" than its peers" if len(odd) < len(of_step[step]) else "")
    return _verdict("diverged", [look.ranks[rank] for rank in odd], what, step=step)


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
    return _verdict(
        "diverged",
        [look.ranks[rank] for rank in odd],
        what,
        step=first.records[odd[0]].step,
        group=first.group,
        sequence=first.sequence,
        theirs=theirs,
        peers=peers,
    )


def _uneven(look: Look) -> Verdict | None:
    """Ranks that have all left a step, where one has issued less in a group than another: nobody waits then.

    A source that runs ahead of its peers goes on without them, and so does who leaves out what comes last in a step.
    """
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
    odd = _minority(votes) or odd_at(look.ranks, group, step, records) or sorted(records)
    there = {rank: record for rank, record in records.items() if record is not None}
    rank, record = next(iter(there.items()))
    text = look.ranks[rank].text(record)
    theirs = [records[rank] for rank in odd]
    if len(odd) == len(records):
        what = f"have left step {step} together, but only rank {', '.join(map(str, there))} with {text}"
    elif theirs[0] is None:
        what = f"has left step {step} without {text}, which its peers have issued"
    else:
        what = f"issued {text}, which its peers have left step {step} without"
    return _verdict(
        "diverged",
        [look.ranks[rank] for rank in odd],
        what,
        step=step,
        group=group,
        sequence=record.sequence,
        theirs=text if theirs[0] is not None else None,
        peers=text if theirs[0] is None else None,
    )


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
    return _verdict(
        "diverged",
        [culprit],
        f"issued {theirs} of group {culprit.groups[instead.group]} where its peers issued {peers}",
        step=step,
        group=group,
        sequence=sequence,
        theirs=theirs,
        peers=peers,
    )


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
    """The ranks to blame: the minority; in a tie those whose decisions differ, or who do what they have never done at
    this place of a step, or in a size that the plan does not have; all, if that does not tell either."""
    records = divergence.records
    votes: dict[int, object] = {rank: (record.digest, record.step) for rank, record in records.items()}
    if len(set(votes.values())) == 1:
        votes = {rank: record.rolling for rank, record in records.items()}
    odd = _minority(votes)
    if odd:
        return odd
    decisions = {}
    for one in look.ranks.values():
        for record in records.values():
            decision = one.decision(record.step)
            if decision is not None:
                decisions[one.rank] = decision.digest
    odd = [rank for rank in _minority(decisions) if rank in records]
    if not odd:
        odd = out_of_habit(look.ranks, divergence.group, records) or against_plan(look.ranks, divergence.group, records)
    return odd or sorted(records)


def _minority(votes: Mapping[int, object]) -> list[int]:
    """Who voted for anything but what most did; nobody if there is no majority, or all agree."""
    if not votes:
        return []
    (winner, count), *_ = Counter(votes.values()).most_common(1)
    return sorted(rank for rank, vote in votes.items() if vote != winner) if 2 * count > len(votes) else []


def _stopped(look: Look) -> Verdict | None:
    stopped = [one for one in look.ranks.values() if one.process == "stopped"]
    if not stopped:
        return None
    first, also = stopped[0], [str(one.rank) for one in stopped[1:]]
    waiting, waited_s = _waiting(look)
    others = f", and so {'are ranks' if len(also) > 1 else 'is rank'} {', '.join(also)}" if also else ""
    return _verdict(
        "stopped",
        [first],
        f"is stopped by a signal, while {first.entries.phase}{others}",
        waiting=[rank for rank in waiting if rank != first.rank],
        waited_s=waited_s,
        step=first.entries.step,
    )


def _held(look: Look) -> Verdict | None:
    """A GIL that is held in a step, or while the rank should be ready for one."""
    held = [one for one in look.ranks.values() if one.holds_gil and one.entries.phase in ("idle", "stepping")]
    if not held:
        return None
    first = max(held, key=lambda one: one.held_s)
    waiting, waited_s = _waiting(look)
    return _verdict(
        "gil",
        [first],
        f"has held its GIL for {first.held_s:.1f} s in one call, while {first.entries.phase}",
        waiting=[rank for rank in waiting if rank != first.rank],
        waited_s=waited_s,
        step=first.entries.step,
    )


def _waiting(look: Look) -> tuple[list[int], float]:
    """Who is in a collective, and for how long the first of them has been."""
    since = {one.rank: one.awaits[1].issued_ns for one in look.ranks.values() if one.awaits is not None}
    return sorted(since), (look.now_ns - min(since.values())) / _NS if since else 0.0


def _awaited(look: Look) -> Verdict | None:
    """Follow who waits for whom, first from the rank that has waited longest, to one that waits for nobody."""
    hung = None
    for rank, wait in waiting_ranks(look):
        path = follow(look, rank)
        if len(path) > 1 and path[0] == path[-1]:
            return _circle(look, path[:-1])
        last = wait_of(look, path[-1])
        if last is not None and not last.others:  # all have come: the data is on its way, and has been for long
            is_long = (look.now_ns - last.since_ns) / _NS >= HUNG_S
            hung = hung or (_unwatched(look, last) or _hung(look, last) if last.step and is_long else None)
            continue
        verdict = _of_awaited(look, path, wait)
        if verdict is not None:
            return verdict
    return hung


def _of_awaited(look: Look, path: Sequence[int], first_wait: Wait) -> Verdict | None:
    """On the last of a path, for whom the one before it waits."""
    culprit, wait = look.ranks[path[-1]], wait_of(look, path[-2])
    assert wait is not None
    entries = culprit.entries
    if wait.record is None or wait.step == 0:  # of the start, or a method's own: these have deadlines of their own
        return None
    wait = _nearest_wait(look, culprit, wait)
    assert wait.record is not None
    if culprit.process == "ended":  # it has said why
        return None
    text = wait.what
    cause: Cause
    if culprit.has_issued(str(wait.group), wait.record.sequence):
        cause, what = "late", f"has issued {text}, and its GPU does not come to it: {_on_device(culprit)}"
    elif entries.step < wait.step:
        cause, what = "behind", f"has not begun step {wait.step}: it is {entries.phase}"
    elif _has_left(culprit, wait.step):
        if (odd := _issued_too_much(look, wait)) is not None:
            return odd
        cause, what = "skipped", f"has left step {wait.step} without {text}, and is {entries.phase}"
    elif culprit.computes:
        cause = "slow"
        what = f"computes and does not come to {text}: {culprit.cpu_s:.1f} s of CPU in {culprit.still_s:.1f} s"
    else:
        cause, what = "late", f"does not come to {text}: it is {entries.phase}, in no collective"
    if culprit.starved_s >= STARVED_S and cause != "skipped":
        what += f", and has waited {culprit.starved_s:.1f} s for a core"
    waiting = [rank for rank in look.members(str(wait.group)) if _is_in(look.ranks[rank], wait.group)]
    return _verdict(
        cause,
        [culprit],
        what,
        step=wait.step,
        group=wait.group,
        sequence=wait.record.sequence,
        peers=text,
        waiting=sorted({*waiting, *path[:-1]}),
        waited_s=(look.now_ns - min(wait.since_ns, first_wait.since_ns)) / _NS,
    )


def _on_device(one: RankLook) -> str:
    """What runs on the device of a rank that is in no collective there."""
    over = [record for record in one.entries.records if record.kind == Kind.COLLECTIVE and record.is_done]
    return f"what comes after {one.text(over[-1])} runs, or hangs" if over else "what comes before runs, or hangs"


def _has_left(one: RankLook, step: int) -> bool:
    decision = one.decision(step)
    return one.entries.step > step or (decision is not None and decision.is_done)


def _nearest_wait(look: Look, awaited: RankLook, wait: Wait) -> Wait:
    """Where a rank is awaited in several groups, the collective that it comes to first, as steps usually go."""
    name = next_group(awaited, wait.step)
    if name is None or name == wait.group:
        return wait
    others = (wait_of(look, rank) for rank in look.members(name))
    nearer = [other for other in others if other is not None and other.group == name and awaited.rank in other.others]
    return min(nearer, key=lambda other: other.since_ns) if nearer and nearer[0].step == wait.step else wait


def _issued_too_much(look: Look, wait: Wait) -> Verdict | None:
    """Not who has left a step is to blame, but who is in a collective that the step does not have: if most have left,
    or the rank has never issued that there."""
    assert wait.group is not None and wait.record is not None
    inside = [look.ranks[rank] for rank in look.members(wait.group) if _is_in(look.ranks[rank], wait.group)]
    left = [rank for rank in wait.others if _has_left(look.ranks[rank], wait.step)]
    records = {one.rank: awaits[1] for one in inside if (awaits := one.awaits) is not None}
    is_new = all(is_out_of_habit(look.ranks[rank], wait.group, record) for rank, record in records.items())
    if not (len(left) == len(wait.others) and (len(left) > len(inside) or (len(left) == len(inside) and is_new))):
        return None
    return _verdict(
        "diverged",
        inside,
        f"issued {wait.what}, which its peers have left step {wait.step} without",
        step=wait.step,
        group=wait.group,
        sequence=wait.record.sequence,
        theirs=wait.what,
    )


def _is_in(one: RankLook, group: str | None, sequence: int | None = None) -> bool:
    awaits = one.awaits
    return awaits is not None and awaits[0] == group and sequence in (None, awaits[1].sequence)


def _hung(look: Look, wait: Wait) -> Verdict:
    """All have come to a collective. Who is still in it is to blame if others have left it, else nobody."""
    assert wait.group is not None and wait.record is not None
    sequence, members = wait.record.sequence, look.members(wait.group)
    inside = [look.ranks[rank] for rank in members if _is_in(look.ranks[rank], wait.group, sequence)]
    ranks = ", ".join(str(one.rank) for one in inside)
    what = f"ranks {ranks} have all come to {wait.what}, which does not end: to blame is no rank, but what carries it"
    some_left = len(inside) < len(members)
    return _verdict(
        "hung",
        inside if some_left else [],
        f"does not come out of {wait.what}, which its peers have left" if some_left else what,
        step=wait.step,
        group=wait.group,
        sequence=sequence,
        peers=wait.what,
        waited_s=(look.now_ns - wait.since_ns) / _NS,
    )


def _circle(look: Look, path: Sequence[int]) -> Verdict | None:
    """Each waits for the next in another group. Who is there in another order than in the step before is to blame."""
    waits = {rank: wait for rank in path if (wait := wait_of(look, rank)) is not None}
    first = min(waits.values(), key=lambda wait: wait.since_ns)
    where = "; ".join(f"rank {rank} in {wait.what} of {wait.group}" for rank, wait in waits.items())
    waited_s = (look.now_ns - first.since_ns) / _NS
    found = {rank: first_deviation(look.ranks[rank], wait.step) for rank, wait in waits.items()}
    odd = {rank: deviation for rank, deviation in found.items() if deviation is not None}
    if len(odd) == 1:
        ((rank, deviation),) = odd.items()
        return _verdict(
            "circle",
            [look.ranks[rank]],
            f"has left the order of its steps, so that ranks wait for each other: {where}",
            step=waits[rank].step,
            group=deviation.group,
            sequence=deviation.sequence,
            theirs=look.ranks[rank].text(deviation.instead),
            waited_s=waited_s,
        )
    return _verdict(
        "circle",
        [look.ranks[rank] for rank in sorted(path)],
        f"wait for each other: {where}",
        step=first.step,
        group=first.group,
        sequence=first.record.sequence if first.record is not None else None,
        waited_s=waited_s,
    )


def _alone(look: Look) -> Verdict | None:
    """The only rank that is still in a step, and in no collective: nobody waits for it but the engine."""
    if len(look.ranks) == 1 or look.unwatched or any(one.process == "ended" for one in look.ranks.values()):
        return None
    inside = [one for one in look.ranks.values() if not _has_left(one, one.entries.step)]
    if len(inside) != 1 or inside[0].entries.phase != "stepping" or inside[0].awaits is not None:
        return None
    (one,) = inside
    since_ns = max((max(record.issued_ns, record.done_ns) for record in one.entries.records), default=look.now_ns)
    waited_s = (look.now_ns - since_ns) / _NS
    doing = "computes" if one.computes else "does nothing that is seen"
    what = f"{doing} in step {one.entries.step}, which all others have left, and has been in no collective for"
    return _verdict(
        "slow" if one.computes else "late", [one], f"{what} {waited_s:.1f} s", step=one.entries.step, waited_s=waited_s
    )


def _store(look: Look) -> Verdict | None:
    """Ranks wait for the store, and for no rank."""
    waits = {rank: wait_of(look, rank) for rank, one in look.ranks.items() if one.entries.outside == "the store"}
    since = [wait.since_ns for wait in waits.values() if wait is not None and not wait.others and wait.group is None]
    if not since or (look.now_ns - min(since)) / _NS < STORE_S:
        return None
    everybody = set().union(*look.groups.values())
    if not everybody <= look.ranks.keys():  # somebody has not begun
        return None
    ranks = ", ".join(map(str, sorted(waits)))
    waited_s = (look.now_ns - min(since)) / _NS
    what = f"the store by which ranks find each other does not answer: ranks {ranks} have waited for {waited_s:.1f} s"
    return _verdict("store", [], what, waited_s=waited_s)


def _overdue(look: Look) -> Verdict | None:
    """A rank that takes too long for what it says that it does, and is not kept by another one from ending it.

    Where a rank has left, the run is over, and what the others still do is of no interest.
    """
    if any(one.process == "ended" for one in look.ranks.values()):
        return None
    for rank, one in look.ranks.items():
        path = follow(look, rank)
        last = look.ranks[path[-1]]
        budget_s = look.limits.budget_s(last.entries.phase)
        took_s = (look.now_ns - last.entries.phase_since_ns) / _NS
        if one.entries.phase == "idle" or budget_s is None or took_s < budget_s:
            continue
        wait = wait_of(look, last.rank)
        if wait is not None and look.unwatched_members(wait.group):  # it may be one of those that keeps it
            continue
        if wait is not None and wait.group is not None and wait.record is None and not _are_missing(look, wait.group):
            return _never_joined(look, wait)
        doing = f"in step {last.entries.step}" if last.entries.phase == "stepping" else last.entries.phase
        return _verdict(
            "overdue",
            [last],
            f"has been {doing} for {took_s:.0f} s, which should take less than {budget_s:.0f} s",
            step=last.entries.step if last.entries.phase == "stepping" else None,
            waiting=sorted({*path[:-1]}),
            waited_s=took_s,
        )
    return None


def _are_missing(look: Look, group: str) -> bool:
    """Whether members have not begun."""
    return not set(look.groups[group]) <= look.ranks.keys()


def _never_joined(look: Look, wait: Wait) -> Verdict:
    """All have come, or somebody would be waited for. To blame is no rank."""
    ranks = ", ".join(map(str, look.members(str(wait.group))))
    what = f"ranks {ranks} have all come to join group {wait.group}, which does not end: to blame is no rank, but the"
    what += " store by which they find each other, or what carries the data"
    return _verdict("store", [], what, waited_s=(look.now_ns - wait.since_ns) / _NS)


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
