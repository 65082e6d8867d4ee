"""Who is to blame: drawn from what all ranks' journals say at one moment. Pure; no process is looked at here.

In this order, since the one explains the other: a rank that is gone, or a node that is not heard of; ranks that follow
different plans, or are in different collectives, of which the earliest counts; a rank that is stopped; one whose GIL
is held; a rank that others wait for, found by following who waits for whom; a store that does not answer; a phase that
takes too long. Who differs from the majority of a group is odd; where there is no majority, what they did in the steps
before; and if that does not tell either, the verdict names all of them and says so.
"""

from __future__ import annotations

from collections.abc import Collection

from phalanx.ledger.awaited import awaited, has_left
from phalanx.ledger.divergence import diverged
from phalanx.ledger.look import Look, Wait, follow, wait_of
from phalanx.ledger.verdict import Place, Verdict, Waiting, blame

STORE_S = 10.0
"""The store passes on what ranks write within milliseconds."""

BEGIN_S = 0.7
"""Who is idle begins a step within milliseconds."""

_NS = 1e9


def judge(look: Look) -> Verdict | None:
    """The verdict, or None if nothing is wrong, or not yet: whoever is late may still come."""
    return (
        gone(look)
        or diverged(look)  # that is known for good, also while another node is not heard of
        or _lost(look)
        or _stopped(look)
        or _held(look)
        or awaited(look)
        or _alone(look)
        or _store(look)
        or _overdue(look)
    )


def gone(look: Look, among: Collection[int] | None = None) -> Verdict | None:
    """Who has ended first without having said so, of all or of these."""
    ended = [one for one in look.ranks.values() if one.process == "gone" and (among is None or one.rank in among)]
    if not ended:
        return None
    first = min(ended, key=lambda one: one.entries.records[-1].issued_ns if one.entries.records else 0)
    return blame("gone", [first], first.how or "is gone", Place(step=first.entries.step), _waiting(look))


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


def _stopped(look: Look) -> Verdict | None:
    stopped = [one for one in look.ranks.values() if one.process == "stopped"]
    if not stopped:
        return None
    first, also = stopped[0], [str(one.rank) for one in stopped[1:]]
    others = f", and so {'are ranks' if len(also) > 1 else 'is rank'} {', '.join(also)}" if also else ""
    what = f"is stopped by a signal, while {first.entries.phase}{others}"
    return blame("stopped", [first], what, Place(step=first.entries.step), _waiting(look).but(first.rank))


def _held(look: Look) -> Verdict | None:
    """A GIL that is held in a step, or while the rank should be ready for one."""
    held = [one for one in look.ranks.values() if one.holds_gil and one.entries.phase in ("idle", "stepping")]
    if not held:
        return None
    first = max(held, key=lambda one: one.held_s)
    what = f"has held its GIL for {first.held_s:.1f} s in one call, while {first.entries.phase}"
    return blame("gil", [first], what, Place(step=first.entries.step), _waiting(look).but(first.rank))


def _waiting(look: Look) -> Waiting:
    """Who is there and in a collective, and for how long the first of them has been."""
    there = [one for one in look.ranks.values() if one.process not in ("gone", "ended")]
    since = {one.rank: one.awaits[1].issued_ns for one in there if one.awaits is not None}
    return Waiting(sorted(since), (look.now_ns - min(since.values())) / _NS if since else 0.0)


def _alone(look: Look) -> Verdict | None:
    """Nobody waits for these but the engine."""
    if len(look.ranks) == 1 or look.unwatched or any(one.process == "ended" for one in look.ranks.values()):
        return None
    return _last_inside(look) or _left_behind(look)


def _last_inside(look: Look) -> Verdict | None:
    """The only rank that is still in a step, and in no collective."""
    inside = [one for one in look.ranks.values() if not has_left(one, one.entries.step)]
    if len(inside) != 1 or inside[0].entries.phase != "stepping" or inside[0].awaits is not None:
        return None
    (one,) = inside
    since_ns = max((max(record.issued_ns, record.done_ns) for record in one.entries.records), default=look.now_ns)
    waited_s = (look.now_ns - since_ns) / _NS
    doing = "computes" if one.computes else "does nothing that is seen"
    where = f"in step {one.entries.step}, which all others have left"
    return blame(
        "slow" if one.computes else "late",
        [one],
        f"{doing} {where}, and has been in no collective for {waited_s:.1f} s",
        Place(step=one.entries.step),
        Waiting(for_s=waited_s),
    )


def _left_behind(look: Look) -> Verdict | None:
    """Ranks that have not begun the step that all others have left: a source runs ahead of those it sends to."""
    newest = max((one.entries.step for one in look.ranks.values()), default=0)
    behind = {rank: one for rank, one in look.ranks.items() if one.entries.step < newest and one.is_between_steps}
    others = [one for rank, one in look.ranks.items() if rank not in behind]
    waited_s = (look.now_ns - max((one.entries.phase_since_ns for one in others), default=look.now_ns)) / _NS
    if not behind or waited_s < BEGIN_S or not all(has_left(one, newest) for one in others):
        return None
    last = min(one.entries.step for one in behind.values())
    culprits = [one for one in behind.values() if one.entries.step == last]
    step = min((step for one in others for step in one.entries.decisions if step > last), default=newest)
    what = f"has not begun step {step}, which all others have left: it is idle"
    return blame("behind", culprits, what, Place(step=step), Waiting(for_s=waited_s))


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
    return blame("store", [], what, waiting=Waiting(for_s=waited_s))


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
        step = last.entries.step if last.entries.phase == "stepping" else None
        doing = f"in step {step}" if step is not None else last.entries.phase
        what = f"has been {doing} for {took_s:.0f} s, which should take less than {budget_s:.0f} s"
        return blame("overdue", [last], what, Place(step), Waiting(sorted({*path[:-1]}), took_s))
    return None


def _are_missing(look: Look, group: str) -> bool:
    """Whether members have not begun."""
    return not set(look.groups[group]) <= look.ranks.keys()


def _never_joined(look: Look, wait: Wait) -> Verdict:
    """All have come, or somebody would be waited for. To blame is no rank."""
    ranks = ", ".join(map(str, look.members(str(wait.group))))
    what = f"ranks {ranks} have all come to join group {wait.group}, which does not end: to blame is no rank, but the"
    what += " store by which they find each other, or what carries the data"
    return blame("store", [], what, waiting=Waiting(for_s=(look.now_ns - wait.since_ns) / _NS))
