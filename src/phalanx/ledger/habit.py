"""What a group does in every step, and who has just done otherwise. Pure.

Steps are alike: at the same place of each there is the same operation, on the same dtype and the same width, whatever
the number of tokens. But steps in which no row is sampled, such as of a long prompt's first chunks, lack the end of
those that sample: so a step is compared with steps of its kind. Where two ranks differ and no majority settles it, the
one that does what both have always done there is right. Sizes other than the last one depend on the plan, and so does
the size of what has only one, such as the tokens that were drawn. Of these the steps before tell on what: a size that
has always been the plan's number of tokens, rows or samples, or always the same, is so again, and who issues another
one is wrong.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from phalanx.ledger.record import Kind, PlanSize, Record

if TYPE_CHECKING:
    from phalanx.ledger.look import RankLook

_SIZES = re.compile(r"\[(?P<sizes>\d+(, \d+)*)\]")
_TENSOR = re.compile(r"\[(?P<leading>.*, )(?P<last>\d+)\]|\[\d*\]")


def out_of_habit(ranks: Mapping[int, RankLook], group: str, records: Mapping[int, Record]) -> list[int]:
    """Of the ranks that differ at one place of a group, by their records there: those that do what they never did.

    Nobody, if that does not tell them apart.
    """
    step = min(record.step for record in records.values())
    odd = [rank for rank, record in records.items() if is_out_of_habit(ranks[rank], group, record, step)]
    return sorted(odd) if len(odd) < len(records) else []


def against_plan(ranks: Mapping[int, RankLook], group: str, records: Mapping[int, Record]) -> list[int]:
    """Of the ranks that differ at one place of a group: those whose sizes are not what the plan of the step makes them.

    Nobody, if that does not tell them apart.
    """
    odd = [rank for rank, record in records.items() if _is_against_plan(ranks[rank], group, record)]
    return sorted(odd) if len(odd) < len(records) else []


def odd_at(ranks: Mapping[int, RankLook], group: str, step: int, records: Mapping[int, Record | None]) -> list[int]:
    """Of the ranks that differ at one place of a group in a step, where None is of one that has left the step without
    anything there: those that do what they never did, or not by the plan.

    Nobody, if that does not tell them apart.
    """
    odd = [
        rank
        for rank, record in records.items()
        if (
            _is_short(ranks[rank], group, step)
            if record is None
            else is_out_of_habit(ranks[rank], group, record, step) or _is_against_plan(ranks[rank], group, record)
        )
    ]
    return sorted(odd) if len(odd) < len(records) else []


def _is_short(rank: RankLook, group: str, step: int) -> bool:
    """Whether a rank that has left a step has issued less there in a group than in any step before."""
    steps = steps_of(rank, group)
    usual = [len(issued) for issued in _before(rank, steps, step)]
    return step in steps and bool(usual) and len(steps[step]) < min(usual)


def form(text: str) -> str:
    """What is the same in every step, of a collective's description."""

    def keep(found: re.Match[str]) -> str:
        return f"[{'_, ' * found['leading'].count(',')}{found['last']}]" if found["last"] else "[_]"

    return _TENSOR.sub(keep, text)


def is_out_of_habit(rank: RankLook, group: str, record: Record, step: int | None = None) -> bool:
    """Whether the rank has never issued this at the same place of a step before `step`, by default the record's own.

    Who is in a later step than `step` has left that one, and is out of habit if it did less there than usual.
    """
    step = record.step if step is None else step
    steps = _steps(rank, group)
    if record.step not in steps:
        return False
    if record.step > step and rank.decision(step) is not None:
        lengths = {len(issued) for issued in _before(rank, steps, step)}
        if lengths and len(steps.get(step, ())) not in lengths:
            return True
    usual = _before(rank, steps, record.step, earlier_than=step)
    place = record.sequence - steps[record.step][0].sequence
    forms = {_form_of(rank, issued[place]) for issued in usual if place < len(issued)}
    done = _form_of(rank, record)
    return bool(usual) and done is not None and None not in forms and done not in forms


def has_habit(rank: RankLook, group: str, step: int) -> bool:
    """Whether the rank has issued anything in the group in a step of this one's kind before it."""
    return bool(_before(rank, _steps(rank, group), step))


def _is_against_plan(rank: RankLook, group: str, record: Record) -> bool:
    """Whether any size of what the rank has issued is known by its plan, and another one."""
    steps, done = _steps(rank, group), _sized(rank, record)
    if record.step not in steps or done is None:
        return False
    place = record.sequence - steps[record.step][0].sequence
    usual = [_sized(rank, issued[place]) for issued in _before(rank, steps, record.step) if place < len(issued)]
    before = [one for one in usual if one is not None and len(one.sizes) == len(done.sizes)]
    if not usual or len(before) < len(usual):  # something else is done there as well, or is not known
        return False
    return any(
        _known_size([(one.plan, one.sizes[i]) for one in before], done.plan) not in (None, done.sizes[i])
        for i in range(len(done.sizes))
    )


class _Sized(NamedTuple):
    """The sizes of a collective, and what they may depend on: numbers that are the same in every rank of a group, or of
    the rank's replica."""

    plan: tuple[int, ...]
    sizes: tuple[int, ...]


def _sized(rank: RankLook, record: Record) -> _Sized | None:
    """None if the journal does not have all of it."""
    text, decision = rank.entries.texts.get(record.digest), rank.decision(record.step)
    size = PlanSize.of_word(decision.rolling) if decision is not None else None
    tensor = _SIZES.search(text) if text is not None else None
    if decision is None or size is None or tensor is None:
        return None
    return _Sized((*size, decision.sequence), tuple(int(number) for number in tensor["sizes"].split(", ")))


def _known_size(before: Sequence[tuple[tuple[int, ...], int]], plan: tuple[int, ...]) -> int | None:
    """What a size must be by a plan, where it is known what it was by others; None if these leave several.

    It is one of the plan's numbers, or always the same: what fits all that was before.
    """
    fitting = {plan[i] for i in range(len(plan)) if all(size == numbers[i] for numbers, size in before)}
    if len({size for _, size in before}) == 1:
        fitting.add(before[0][1])
    return fitting.pop() if len(fitting) == 1 else None


class Deviation(NamedTuple):
    """The first collective of a step that a rank has left out, or done otherwise."""

    group: str
    sequence: int
    instead: Record
    """What it issued in its place, in this group or another one."""
    is_ahead: bool
    """Whether that comes later in the step, as steps usually go."""


def first_deviation(rank: RankLook, step: int) -> Deviation | None:
    """Where a rank has left the order that the step before had, over all groups, or issued more; None if it has not, as
    far as it has come, or if nothing tells."""
    usual, issued = _step_before(rank, step)
    if not usual:
        return None
    forms = [(record.group, _form_of(rank, record)) for record in usual]
    for place, done in enumerate(issued):
        if place == len(usual):
            # Steps of a kind are longer or shorter where some of them are replayed from graphs.
            is_new = not _has_issued_as_much(rank, step, len(issued))
            return Deviation(rank.groups[done.group], done.sequence, done, is_ahead=False) if is_new else None
        what = done.group, _form_of(rank, done)
        if None in (what[1], forms[place][1]):
            return None
        if what != forms[place]:
            name = rank.groups[usual[place].group]
            before = [one.sequence for one in rank.collectives(name).values() if one.number < done.number]
            return Deviation(name, max(before, default=0) + 1, done, what in forms[place:])
    return None


def _has_issued_as_much(rank: RankLook, step: int, count: int) -> bool:
    """Whether the rank has issued so much in any step before."""
    records = rank.entries.records
    counts = Counter(one.step for one in records if one.kind == Kind.COLLECTIVE and 0 < one.step < step)
    return max(counts.values(), default=0) >= count


def next_group(rank: RankLook, step: int) -> str | None:
    """The group of the collective that the rank comes to next in a step, if that goes as the one before; None if
    nothing tells."""
    usual, issued = _step_before(rank, step)
    return rank.groups[usual[len(issued)].group] if len(issued) < len(usual) else None


def _form_of(rank: RankLook, record: Record) -> str | None:
    """None if the journal had no more room to describe it, which tells nothing."""
    text = rank.entries.texts.get(record.digest)
    return None if text is None else form(text)


def _step_before(rank: RankLook, step: int) -> tuple[list[Record], list[Record]]:
    """What the rank issued in the newest step of its kind before one, of which the journal still has all, and in that
    step."""
    kinds = _kinds(rank)
    before = max((one for one, kind in kinds.items() if 0 < one < step and kind == kinds.get(step)), default=0)
    issued = [record for record in rank.entries.records if record.kind == Kind.COLLECTIVE]
    return [one for one in issued if before and one.step == before], [one for one in issued if one.step == step]


def steps_of(rank: RankLook, group: str) -> dict[int, list[Record]]:
    """What the rank issued in the group, by the steps of which the journal still has all; nothing in some, perhaps."""
    records = rank.entries.records
    steps: dict[int, list[Record]] = {record.step: [] for record in records if record.kind == Kind.STEP}
    for record in rank.collectives(group).values():
        if record.step in steps:
            steps[record.step].append(record)
    return steps


def _before(
    rank: RankLook, steps: Mapping[int, list[Record]], step: int, *, earlier_than: int | None = None
) -> list[list[Record]]:
    """What was issued in those that came before a step, or before another one, and are of its kind."""
    kinds, end = _kinds(rank), step if earlier_than is None else earlier_than
    return [issued for number, issued in steps.items() if number < end and kinds.get(number) == kinds.get(step)]


def _kinds(rank: RankLook) -> dict[int, bool | None]:
    """By step, whether rows of the rank's replica are sampled; None if it has none, or if nothing was said of them."""
    sizes = {one.step: PlanSize.of_word(one.rolling) for one in rank.entries.records if one.kind == Kind.STEP}
    return {step: None if size is None else size.num_samples > 0 for step, size in sizes.items()}


def _steps(rank: RankLook, group: str) -> dict[int, list[Record]]:
    """The same, without the steps in which it issued nothing there."""
    return {step: issued for step, issued in steps_of(rank, group).items() if issued}
