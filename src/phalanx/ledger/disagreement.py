"""Whether members of a group have issued the same in a step, and who has not: from one word each. Pure.

Of a rank that is still in the step it is only known how far it has come: it disagrees already if it is as far as one
that has left the step, with another word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import msgspec

from phalanx.errors import DivergedError
from phalanx.ledger.habit import odd_at
from phalanx.ledger.journal_reader import Entries
from phalanx.ledger.look import RankLook
from phalanx.ledger.record import Kind, Record
from phalanx.ledger.step_digests import Issued, count_of

_UNKNOWN_NS = 2**63


class Member(NamedTuple):
    """A rank in a group."""

    rank: int
    place: int
    """Of the group, among the rank's."""


class Disagreement(msgspec.Struct, frozen=True):
    """Members of a group that have not issued the same in a step."""

    step: int
    group: str
    members: tuple[Member, ...]
    words: dict[int, int]
    """Of those that can be compared, by rank."""
    left: frozenset[int]
    """Those of them that will issue nothing more in the step."""


class Explained(NamedTuple):
    """A disagreement in words."""

    began_ns: int
    """When the first of what differs was issued; what nobody knows began after all else."""
    error: DivergedError


def disagreement(step: int, group: str, members: Sequence[Member], issued: Mapping[int, Issued]) -> Disagreement | None:
    """None if all members that can be compared have issued the same, as far as it is known."""
    found = {
        member.rank: (issued[member.rank].words[member.place], issued[member.rank].has_left)
        for member in members
        if member.rank in issued
    }
    least = min((count_of(word) for word, has_left in found.values() if has_left), default=None)
    if least is None:
        return None
    words = {rank: word for rank, (word, has_left) in found.items() if has_left or count_of(word) >= least}
    left = frozenset(rank for rank in words if found[rank][1])
    return Disagreement(step, group, tuple(members), words, left) if len(set(words.values())) > 1 else None


def explain(found: Disagreement, ranks: Mapping[int, RankLook]) -> Explained:
    """Who did what, by the journals if they still know all that the ranks have issued in the step."""
    lists = {
        member.rank: _records(ranks[member.rank].entries, member.place, found.step)
        for member in found.members
        if member.rank in found.words and member.rank in ranks
    }
    if all(count_of(word) <= len(lists.get(rank, ())) for rank, word in found.words.items()):
        explained = _by_records(found, lists, ranks)
        if explained is not None:
            return explained
    said = {rank: _in_short(word) for rank, word in found.words.items()}
    return Explained(_UNKNOWN_NS, _error(found, said, f"group {found.group}", ()))


def _in_short(word: int) -> str:
    number = count_of(word)
    return f"{number} collective{'' if number == 1 else 's'} (digest {word >> 16:012x})"


def _records(entries: Entries, group: int, step: int) -> list[Record]:
    of_step = [record for record in entries.records if record.kind == Kind.COLLECTIVE and record.step == step]
    return sorted((record for record in of_step if record.group == group), key=lambda record: record.sequence)


def _by_records(
    found: Disagreement, lists: Mapping[int, Sequence[Record]], ranks: Mapping[int, RankLook]
) -> Explained | None:
    """The first place where they differ. Who may still come there says nothing."""
    places = (
        {
            rank: records[i] if i < len(records) else None
            for rank, records in lists.items()
            if i < len(records) or rank in found.left
        }
        for i in range(max(map(len, lists.values())))
    )
    at = next((at for at in places if len({record and record.digest for record in at.values()}) > 1), None)
    if at is None:
        return None
    issued = {rank: record for rank, record in at.items() if record is not None}
    said = {rank: ranks[rank].text(record) if record is not None else "nothing more" for rank, record in at.items()}
    odd = odd_at(ranks, found.group, found.step, at)
    first = min(issued.values(), key=lambda record: record.issued_ns)
    where = f"sequence {first.sequence} of group {found.group}"
    return Explained(first.issued_ns, _error(found, said, where, odd))


def _error(found: Disagreement, said: Mapping[int, str], where: str, unusual: Collection[int]) -> DivergedError:
    """`said`: what each rank has issued, in words that are the same where it is. `unusual`: who has never done so."""
    (most, num_most), *_ = Counter(said.values()).most_common(1)
    has_majority = 2 * num_most > len(said)
    odd = [rank for rank in sorted(said) if not has_majority or said[rank] != most]
    if not has_majority and unusual:
        odd = sorted(unusual)
    message = " and ".join(f"rank {rank} issued {said[rank]}" for rank in odd)
    if peers := [rank for rank in sorted(said) if rank not in odd]:
        names = ", ".join(map(str, peers))
        others = " or ".join(dict.fromkeys(said[rank] for rank in peers))
        message += f" where rank{'s' if len(peers) > 1 else ''} {names} issued {others}"
    message += f" (step {found.step}, {where})"
    if not peers:
        message += "; which of them is wrong cannot be told"
    return DivergedError(message, found.step, found.group, tuple(odd))
