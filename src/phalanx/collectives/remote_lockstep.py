"""Ranks of several hosts that issue the same collectives in the same order, and tell each other why they cannot go on.

They share no memory, and a word between them goes by way of the brain. So nothing is exchanged while all goes well: a
rank only counts what it issues. One that gives a group up (a wait came to its deadline, a connection broke, it leaves)
publishes a report: in which collective it was, and for whom it waited. The others then fail too, because its
connections close, and publish theirs. Who waits for whom leads from every rank to those that have nothing to say: they
are dead, stopped, cut off or late. If it only leads round in circles, ranks that live wait for each other: in different
collectives, or for data that was lost on the way. What each has issued last tells which: a rank that is ahead has been
where the others are, with another collective or with the same one.

What this cannot see is a rank in another collective whose data nevertheless fits: that is for what carries the data to
prevent. `SpanningGroup` does; NCCL does not. No torch here.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import msgspec

from phalanx.collectives.descriptor import CollectiveRecord, Descriptor
from phalanx.collectives.exchange import Exchange
from phalanx.collectives.row_counts import Disagreement
from phalanx.collectives.spec import GroupSpec
from phalanx.errors import CollectiveMismatchError, DeadlineError, PeerDiedError, PhalanxError

NUM_REPORTED = 8
"""Collectives: more than a source of broadcasts, which does not wait for its peers, is ahead of them in general."""
REPORTS_TAKE_S = 0.5
"""From one rank's giving up until all that live have reported: they notice within milliseconds."""


class _Member(msgspec.Struct, frozen=True, array_like=True):
    """Who a rank is."""

    pid: int
    address: str


class _Report(msgspec.Struct, frozen=True, array_like=True):
    """Why a rank gave a group up. `awaited` are seats; `recent` are the collectives that it has issued last, encoded,
    up to the one that has the number `sequence`: none before the first.
    """

    reason: Literal["deadline", "broken", "left"]
    sequence: int
    recent: tuple[bytes, ...]
    awaited: tuple[int, ...]
    disagreement: str = ""
    """What it left for: the counts of an all_to_all."""

    def __str__(self) -> str:
        return f"{Descriptor.decode(self.recent[-1])} (sequence {self.sequence})" if self.recent else "joining"

    def diverges_from(self, other: _Report) -> bool:
        """Whether the two ranks have issued different collectives under one number, or are too far apart to tell."""
        behind, ahead = sorted((self, other), key=lambda report: report.sequence)
        if not behind.recent:
            return bool(ahead.recent)
        place = len(ahead.recent) - 1 - (ahead.sequence - behind.sequence)
        return place < 0 or ahead.recent[place] != behind.recent[-1]


class RemoteLockstep:
    """This rank's seat, the place of its rank in the group. For the use of one thread."""

    def __init__(self, spec: GroupSpec, rank: int, exchange: Exchange) -> None:
        """Take the seat of `rank`; wait until all seats are taken.

        Raises DeadlineError, naming the ranks that did not come within `spec.join_timeout_s`.
        """
        self.seat = spec.ranks.index(rank)
        self._spec = spec
        self._exchange = exchange
        self._peers = [seat for seat in range(spec.size) if seat != self.seat]
        self._sequence = 0
        self._current: Descriptor | None = None
        self._recent: deque[bytes] = deque(maxlen=NUM_REPORTED)
        self._failure: PhalanxError | None = None
        exchange.publish(spec.name, self._key("member"), msgspec.msgpack.encode(_Member(os.getpid(), self._address)))
        self._members = self._await_members()

    @property
    def last(self) -> CollectiveRecord | None:
        """The collective that was issued last."""
        if self._current is None:
            return None
        spec, what = self._spec, self._current
        return CollectiveRecord(spec.name, spec.epoch, self._sequence, what.operation, what.dtype, what.shape)

    @property
    def sequence(self) -> int:
        """How many collectives this rank has issued."""
        return self._sequence

    def issue(self, descriptor: Descriptor) -> None:
        """Begin the next collective. Never blocks. Raises the error that ended the group, if this rank knows of one."""
        if self._failure is not None:
            raise self._failure
        self._sequence += 1
        self._current = descriptor
        self._recent.append(descriptor.encoded)

    def mark_issued(self) -> None:
        """Nothing: how far this rank has issued is told when it gives up."""

    def check_peers(self) -> None:
        """Raise an error if a peer has given the group up. Blocks, for `REPORTS_TAKE_S` at most, only to raise one."""
        given_up = self._reports(0.0)
        if given_up:
            raise self.blame("which a peer has given up", 0.0, tuple(given_up))

    def blame(self, cause: Exception | str, waited_s: float, awaited: Sequence[int] = ()) -> PhalanxError:
        """End the group, because the data of the ranks at the seats `awaited` (none: of any) did not come.

        Tells the others, hears what they say (blocks for `REPORTS_TAKE_S` at most) and names those who say nothing.
        Close what carries the data before, so that nobody waits for this rank in vain.
        """
        if self._failure is not None:
            return self._failure
        mine = self._report("deadline" if waited_s >= self._limit_s else "broken", tuple(awaited or self._peers))
        self._publish(mine)
        reports = {self.seat: mine, **self._reports(REPORTS_TAKE_S)}
        self._failure = self._verdict(reports, f"{self._doing} ({cause})", waited_s)
        return self._failure

    def refuse(self, disagreement: Disagreement) -> PhalanxError:
        """End the group because this rank and a peer count differently what goes between them. Tells the others."""
        why = f"in {self._current} {disagreement.describe(self._spec.ranks)}"
        self._failure = CollectiveMismatchError(f"at sequence {self._sequence} of {self._group}: {why}")
        self._publish(msgspec.structs.replace(self._report("left", ()), disagreement=why))
        return self._failure

    def abandon(self, error: BaseException) -> None:
        """End the group because an operation was left half done. Does nothing if the group has ended."""
        if self._failure is None:
            self._leave(f"{self._doing} was left half done: {error!r}")

    def close(self) -> None:
        """Give the seat up; peers that wait for this rank are told. May be called more than once."""
        if self._failure is None:
            self._leave(f"{self._group} is closed")

    def _leave(self, why: str) -> None:
        self._failure = CollectiveMismatchError(why)
        self._publish(self._report("left", ()))

    def _await_members(self) -> list[_Member]:
        keys = [self._key("member", seat) for seat in range(self._spec.size)]
        timeout_s = self._spec.join_timeout_s
        found = self._exchange.wait(self._spec.name, keys, timeout_s)
        missing = [seat for seat, key in enumerate(keys) if key not in found]
        if missing:
            raise DeadlineError(f"the joining of {self._group}", self._names(missing), timeout_s)
        return [msgspec.msgpack.decode(found[key], type=_Member) for key in keys]

    def _report(self, reason: Literal["deadline", "broken", "left"], awaited: tuple[int, ...]) -> _Report:
        return _Report(reason, self._sequence, tuple(self._recent), awaited)

    def _publish(self, report: _Report) -> None:
        self._exchange.publish(self._spec.name, self._key("report"), msgspec.msgpack.encode(report))

    def _reports(self, timeout_s: float) -> dict[int, _Report]:
        """What peers have reported, once all have, or after `timeout_s`."""
        seats = {self._key("report", seat): seat for seat in self._peers}
        found = self._exchange.wait(self._spec.name, list(seats), timeout_s)
        return {seats[key]: msgspec.msgpack.decode(value, type=_Report) for key, value in found.items()}

    def _verdict(self, reports: dict[int, _Report], what: str, waited_s: float) -> PhalanxError:
        """Follow who waits for whom, from this rank to those to blame."""
        reached, edges = [self.seat], list[tuple[int, int]]()
        for seat in reached:
            if seat in reports:
                edges += [(seat, other) for other in reports[seat].awaited]
                reached += [other for other in reports[seat].awaited if other not in reached]
        broken = [
            (finder, seat) for finder, seat in edges if seat not in reports and reports[finder].reason == "broken"
        ]
        silent = [seat for seat in reached if seat not in reports]
        gone = [seat for seat in reached if seat in reports and reports[seat].reason == "left"]
        if gone:
            why = next((f", because {reports[seat].disagreement}," for seat in gone if reports[seat].disagreement), ",")
            return CollectiveMismatchError(
                f"{self._names(gone)} has left {self._group}{why} and {self._me} is in {what}"
            )
        # While ranks connect, one that is at it cannot report, and that it is not reached says nothing of its life.
        if len(silent) == 1 and broken and self._current is not None:
            ((finder, seat), *_) = broken
            found = "" if finder == self.seat else f", as {self._name(finder)} found"
            detail = f"its connection broke{found}, and {self._me} needs it for {what}"
            return PeerDiedError(self._name(seat), self._members[seat].pid, detail)
        if silent:
            return DeadlineError(what, self._parties(silent), waited_s)
        # If connections broke and nobody waited in vain, one rank may simply be ahead of another.
        has_waited = any(report.reason == "deadline" for report in reports.values())
        if has_waited and any(one.diverges_from(other) for one, other in combinations(reports.values(), 2)):
            who = "; ".join(f"{self._name(seat)} is in {reports[seat]}" for seat in sorted(reports))
            return CollectiveMismatchError(f"at sequence {self._sequence} of {self._group}: {who}")
        awaited = reports[self.seat].awaited
        return DeadlineError(what, f"{self._parties(awaited)}, which lives", waited_s)

    def _key(self, what: str, seat: int | None = None) -> str:
        return f"{what} {self.seat if seat is None else seat}"

    def _name(self, seat: int) -> str:
        return f"rank {self._spec.ranks[seat]}"

    def _names(self, seats: Sequence[int]) -> str:
        return ", ".join(map(self._name, seats))

    def _parties(self, seats: Sequence[int]) -> str:
        return ", ".join(
            f"{self._name(seat)} (pid {self._members[seat].pid} on {self._members[seat].address})" for seat in seats
        )

    @property
    def _me(self) -> str:
        return self._name(self.seat)

    @property
    def _address(self) -> str:
        return self._exchange.node_address

    @property
    def _group(self) -> str:
        return f"group {self._spec.name}, epoch {self._spec.epoch}"

    @property
    def _doing(self) -> str:
        return str(self.last or f"the joining of {self._group}")

    @property
    def _limit_s(self) -> float:
        return self._spec.timeout_s if self._current else self._spec.join_timeout_s
