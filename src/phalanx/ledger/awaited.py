"""A rank that others wait for: found by following who waits for whom, over all groups. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from phalanx.ledger.habit import Deviation, first_deviation, has_habit, is_out_of_habit, next_group
from phalanx.ledger.look import STARVED_S, Look, RankLook, Wait, follow, wait_of, waiting_ranks
from phalanx.ledger.record import Kind
from phalanx.ledger.verdict import Cause, Place, Verdict, Waiting, blame

HUNG_S = 0.7
"""A collective takes its time once the last has come to it; whoever is patient waits for longer than this."""

_NS = 1e9


def awaited(look: Look) -> Verdict | None:
    """Follow who waits for whom, first from the rank that has waited longest, to one that waits for nobody."""
    hung = None
    for rank, wait in waiting_ranks(look):
        path = follow(look, rank)
        if len(path) > 1 and path[0] == path[-1]:
            return _circle(look, path[:-1])
        last = wait_of(look, path[-1])
        if last is not None and not last.others:  # all have come: the data is on its way
            if last.step:
                hung = hung or (_unwatched if look.unwatched_members(last.group) else _hung)(look, last)
            continue
        verdict = _of_awaited(look, path, wait)
        if verdict is not None:
            return verdict
    return hung


def _unwatched(look: Look, wait: Wait) -> Verdict | None:
    """All have come to a collective that are known of: the others are on nodes without a watcher."""
    assert wait.group is not None and wait.record is not None
    unknown, waited_s = look.unwatched_members(wait.group), (look.now_ns - wait.since_ns) / _NS
    if not unknown or waited_s < HUNG_S:
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
        waited_s=waited_s,
    )


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
        if entries.phase == "stepping" and not has_left(culprit, entries.step):
            cause, what = _in_no_collective(culprit, f"{text} in step {wait.step}", f"still in step {entries.step}")
        else:
            cause, what = "behind", f"has not begun step {wait.step}: it is {entries.phase}"
            if culprit.computes:
                cause, what = "slow", f"{what}, and computes: {culprit.cpu_s:.1f} s of CPU in {culprit.still_s:.1f} s"
    elif has_left(culprit, wait.step):
        if (odd := _left_or_too_much(look, wait)) is not None:
            return odd
        cause, what = "skipped", f"has left step {wait.step} without {text}, and is {entries.phase}"
    else:
        cause, what = _in_no_collective(culprit, text, entries.phase)
    if culprit.starved_s >= STARVED_S and cause != "skipped":
        what += f", and has waited {culprit.starved_s:.1f} s for a core"
    waiting = [rank for rank in look.members(str(wait.group)) if _is_in(look.ranks[rank], wait.group)]
    waited_s = (look.now_ns - min(wait.since_ns, first_wait.since_ns)) / _NS
    place = Place(wait.step, wait.group, wait.record.sequence, peers=text)
    return blame(cause, [culprit], what, place, Waiting(sorted({*waiting, *path[:-1]}), waited_s))


def _in_no_collective(one: RankLook, awaited_in: str, where: str) -> tuple[Cause, str]:
    """A rank that is in a step: whether it computes there."""
    if one.computes:
        return "slow", f"computes and does not come to {awaited_in}: {one.cpu_s:.1f} s of CPU in {one.still_s:.1f} s"
    return "late", f"does not come to {awaited_in}: it is {where}, in no collective"


def _on_device(one: RankLook) -> str:
    """What runs on the device of a rank that is in no collective there."""
    over = [record for record in one.entries.records if record.kind == Kind.COLLECTIVE and record.is_done]
    return f"what comes after {one.text(over[-1])} runs, or hangs" if over else "what comes before runs, or hangs"


def has_left(one: RankLook, step: int) -> bool:
    """Whether a rank is through with a step; its record may be no longer among the newest ones."""
    if one.entries.step != step:
        return one.entries.step > step
    decision = one.decision(step)
    return one.is_between_steps or (decision is not None and decision.is_done)


def _nearest_wait(look: Look, awaited: RankLook, wait: Wait) -> Wait:
    """Where a rank is awaited in several groups, the collective that it comes to first: that of the earliest step, and
    in this one as steps usually go."""
    others = [other for _, other in waiting_ranks(look) if awaited.rank in other.others]
    step = min(other.step for other in others)
    earliest = [other for other in others if other.step == step]
    in_next = [other for other in earliest if other.group == next_group(awaited, step)]
    return next(iter(in_next), wait if wait in earliest else earliest[0])


def _left_or_too_much(look: Look, wait: Wait) -> Verdict | None:
    """Not who has left a step is to blame, but who is in a collective that the step does not have: if most have left,
    or the rank has never issued that there. All are, if as many have left and no step before tells. Else None."""
    assert wait.group is not None and wait.record is not None
    inside = [look.ranks[rank] for rank in look.members(wait.group) if _is_in(look.ranks[rank], wait.group)]
    left = [look.ranks[rank] for rank in wait.others if has_left(look.ranks[rank], wait.step)]
    if len(left) < max(len(wait.others), len(inside)):
        return None
    records = [(one, awaits[1]) for one in inside if (awaits := one.awaits) is not None]
    place = Place(wait.step, wait.group, wait.record.sequence, theirs=wait.what)
    if len(left) > len(inside) or all(is_out_of_habit(one, wait.group, record) for one, record in records):
        what = f"issued {wait.what}, which its peers have left step {wait.step} without"
        return blame("diverged", inside, what, place)
    if any(has_habit(one, wait.group, wait.step) for one in (*inside, *left)):
        return None
    both = sorted((*inside, *left), key=lambda one: one.rank)
    what = f"differ in step {wait.step}: some are in {wait.what}, and others have left the step without it"
    return blame("diverged", both, what, place)


def _is_in(one: RankLook, group: str | None, sequence: int | None = None) -> bool:
    awaits = one.awaits
    return awaits is not None and awaits[0] == group and sequence in (None, awaits[1].sequence)


def _hung(look: Look, wait: Wait) -> Verdict | None:
    """All have come to a collective, the last of them long ago. Who is still in it is to blame if others have left it,
    else nobody."""
    assert wait.group is not None and wait.record is not None
    sequence, members = wait.record.sequence, look.members(wait.group)
    came = (look.ranks[rank].collectives(wait.group).get(sequence) for rank in members)
    waited_s = (look.now_ns - max(record.issued_ns for record in came if record is not None)) / _NS
    if waited_s < HUNG_S:
        return None
    inside = [look.ranks[rank] for rank in members if _is_in(look.ranks[rank], wait.group, sequence)]
    place, waiting = Place(wait.step, wait.group, sequence, peers=wait.what), Waiting(for_s=waited_s)
    if len(inside) < len(members):
        what = f"does not come out of {wait.what}, which its peers have left"
        return blame("hung", inside, what, place, waiting)
    ranks = ", ".join(str(one.rank) for one in inside)
    what = f"ranks {ranks} have all come to {wait.what}, which does not end: to blame is no rank, but what carries it"
    return blame("hung", [], what, place, waiting)


def _circle(look: Look, path: Sequence[int]) -> Verdict | None:
    """Each waits for the next in another group. Who is there in another order than in the step before is to blame."""
    waits = {rank: wait for rank in path if (wait := wait_of(look, rank)) is not None}
    first = min(waits.values(), key=lambda wait: wait.since_ns)
    where = "; ".join(f"rank {rank} in {wait.what} of {wait.group}" for rank, wait in waits.items())
    waiting = Waiting(for_s=(look.now_ns - first.since_ns) / _NS)
    found = {rank: first_deviation(look.ranks[rank], wait.step) for rank, wait in waits.items()}
    odd = {rank: deviation for rank, deviation in found.items() if deviation is not None}
    if len(odd) == 1:
        ((rank, deviation),) = odd.items()
        what = f"has left the order of its steps, so that ranks wait for each other: {where}"
        return blame("circle", [look.ranks[rank]], what, _place_of(look.ranks[rank], deviation), waiting)
    place = Place(first.step, first.group, first.record.sequence if first.record is not None else None)
    return blame("circle", [look.ranks[rank] for rank in sorted(path)], f"wait for each other: {where}", place, waiting)


def _place_of(culprit: RankLook, deviation: Deviation) -> Place:
    """What it has left out, or issued too much: what it is in comes later in the step, or not at all."""
    instead = deviation.instead
    group, sequence = deviation.group, deviation.sequence
    if not deviation.is_ahead:
        group, sequence = culprit.groups[instead.group], instead.sequence
    return Place(instead.step, group, sequence, culprit.text(instead))
