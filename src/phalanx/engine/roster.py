"""Which replicas a fleet has, and what becomes of them: the states of a resize, and how each failure is undone. Pure.

    joining ── all are ready ──▶ serving ──▶ leaving ── all are empty ──▶ ending ──▶ gone
       └── undone ──▶ ending     ▲     │        └── undone ──▶ as before
                                 └─ dead (another engine is started in its place)

What happens is told to the roster, and each method gives what is to be done about it. A resize commits when all that
join are ready, or all that leave are empty: before that every failure, death or cancellation undoes all of it, and
after that nothing does. Requests go to those that serve, and to no others.

A replica that has no place any more, as its node is gone and no other has room, is lost: then there is one less. It is
missing until there are as many as an operator has asked for last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from phalanx.errors import RequestError, ResizeUnderWayError

Phase = Literal["joining", "serving", "leaving", "ending", "dead"]
Ending = Literal["done", "failed", "cancelled"]


class Start(msgspec.Struct, frozen=True):
    """Start an engine; then it is `ready` or has `failed`."""

    number: int


class Empty(msgspec.Struct, frozen=True):
    """Have a replica end the requests it has, or others take them over; then it is `emptied`."""

    number: int


class Keep(msgspec.Struct, frozen=True):
    """Give up emptying: it serves again."""

    number: int


class Replace(msgspec.Struct, frozen=True):
    """Start another engine for a replica whose own has died, again and again until one is `ready`."""

    number: int


class End(msgspec.Struct, frozen=True):
    """Give up what is done about a replica, and end its engine if it has one; then it is `ended`."""

    number: int


Order = Start | Empty | Keep | Replace | End


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a resize has ended. If it is not done, there are as many replicas as before."""

    ending: Ending
    reason: str | None = None
    """Why, if it is not done."""
    size_before: int
    size_asked_for: int


class FleetResize(msgspec.Struct, kw_only=True):
    """One that is under way."""

    size_before: int
    size_asked_for: int
    because: str | None = None
    """Why, if it is not that an operator wants so many from now on."""
    joining: frozenset[int] = frozenset()
    leaving: frozenset[int] = frozenset()
    prepared: set[int] = msgspec.field(default_factory=set)
    """Of those, what is ready or empty."""
    undone: dict[int, Phase] = msgspec.field(default_factory=dict)
    """What becomes of each that leaves, if it is undone."""
    outcome: Outcome | None = None
    """Once it is committed or undone: engines are ended that are not needed, and that is all."""


class Roster:
    """Replicas by number. A number is its replica's as long as that one is there; new ones get the lowest ones free."""

    def __init__(self, num_replicas: int, *, replaces_dead: bool) -> None:
        """All serve. Without `replaces_dead`, one that dies is gone."""
        self._phases: dict[int, Phase] = dict.fromkeys(range(num_replicas), "serving")
        self._replaces_dead = replaces_dead
        self.resize: FleetResize | None = None
        """Under way."""
        self.last: Outcome | None = None
        """Of the latest resize that is over."""
        self.wanted = num_replicas
        """As many as an operator has asked for last."""
        self.num_lost = 0
        """Replicas that have lost their places, ever."""
        self._lost_because = ""

    @property
    def phases(self) -> Mapping[int, Phase]:
        return self._phases

    @property
    def size(self) -> int:
        """Replicas that serve, or will again when another engine has been started for them."""
        return len(self.members())

    @property
    def num_missing(self) -> int:
        """Replicas that were lost and have not come back. While a resize is under way that is not known."""
        return max(self.wanted - self.size, 0) if self.resize is None else 0

    @property
    def missing_because(self) -> str | None:
        """Why the last one of those that are missing was lost; None if none is."""
        return self._lost_because if self.num_missing else None

    def serving(self) -> list[int]:
        return self._in("serving")

    def members(self) -> list[int]:
        """Those that `size` counts."""
        return sorted(number for number, phase in self._phases.items() if phase in ("serving", "dead"))

    def counts_on(self, number: int) -> bool:
        """Whether it makes a difference that its engine has ended by itself: it was to run, and nobody has told."""
        is_told = self.resize is not None and self.resize.undone.get(number) == "dead"
        return self._phases.get(number) in ("joining", "serving", "leaving") and not is_told

    def free_numbers(self, count: int) -> list[int]:
        """That so many more replicas will get."""
        free = (number for number in range(len(self._phases) + count) if number not in self._phases)
        return [number for number, _ in zip(free, range(count), strict=False)]

    def check(self, size: int, leaving: Sequence[int], down: Collection[int] = ()) -> None:
        """Raises what `begin` would."""
        if self.resize is not None:
            raise ResizeUnderWayError(str(self.resize.size_before), f"{self.resize.size_asked_for} replicas")
        members = self.members()
        if size < 1:
            raise RequestError("data_parallel_size", size, "it must be at least 1")
        for number in leaving:
            if number not in members:
                raise RequestError("leaving", number, f"no such replica; there are {_listed(members)}")
        num_leaving = max(len(members) - size, 0)
        if len(set(leaving)) > num_leaving:
            allowed = f"at most {num_leaving} of {len(members)} replicas leave for there to be {size}"
            raise RequestError("leaving", _listed(leaving), allowed)
        if leaving and not set(self.serving()) - {*leaving, *down}:
            raise RequestError("leaving", _listed(leaving), "of those that are left, at least one must serve")

    def begin(
        self,
        size: int,
        leaving: Sequence[int],
        num_requests: Mapping[int, int],
        down: Collection[int] = (),
        *,
        because: str | None = None,
    ) -> list[Order]:
        """Begin to have `size` replicas. When fewer, those named in `leaving` go; beyond them those that are dead, then
        those in `down`, whose engines are being started again, then those with the fewest requests. With
        `because` as many are wanted as before. Raises ResizeUnderWayError, and RequestError for what cannot be.
        """
        self.check(size, leaving, down)
        members = self.members()
        self.resize = resize = FleetResize(size_before=len(members), size_asked_for=size, because=because)
        if size > len(members):
            resize.joining = frozenset(self.free_numbers(size - len(members)))
            self._set(resize.joining, "joining")
            return [Start(number) for number in sorted(resize.joining)]
        resize.leaving = frozenset(self._choose_leaving(len(members) - size, leaving, num_requests, down))
        resize.undone = {number: self._phases[number] for number in resize.leaving}
        self._set(resize.leaving, "leaving")
        return [Empty(number) for number in sorted(resize.leaving)] or self._commit()

    def ready(self, number: int) -> list[Order]:
        """An engine was started for it."""
        phase = self._phases.get(number)
        if phase == "dead":
            self._phases[number] = "serving"
        elif phase == "joining":
            return self._prepare(number)
        return []  # what was undone meanwhile is ended, and has this engine already

    def failed(self, number: int, reason: str) -> list[Order]:
        """Its engine could not be started. (One that replaces another is tried again.)"""
        if self._phases.get(number) == "joining":
            return self._undo("failed", f"replica {number} did not start: {reason}")
        return []

    def emptied(self, number: int) -> list[Order]:
        """It has no requests any more."""
        return self._prepare(number) if self._phases.get(number) == "leaving" else []

    def died(self, number: int, reason: str) -> list[Order]:
        """Its engine has ended by itself."""
        phase = self._phases.get(number)
        if phase == "joining":
            return self._undo("failed", f"replica {number} died before the others were ready: {reason}")
        if phase == "leaving" and self.resize is not None:
            self.resize.undone[number] = "dead"
            return self._prepare(number)
        return self._lose(number, f"died: {reason}", is_replaced=self._replaces_dead) if phase == "serving" else []

    def lost(self, number: int, reason: str) -> list[Order]:
        """It has no place any more. As died, but nothing is started in its stead."""
        if self._phases.get(number) not in ("serving", "dead"):
            return self.died(number, reason)
        self._note_lost(1, reason)
        return self._lose(number, f"was lost: {reason}", is_replaced=False)

    def restarting(self, down: Collection[int]) -> list[Order]:
        """The engines of these are being started again. Told as often as one likes, while they are."""
        resize = self.resize
        if resize is None or resize.outcome is not None or set(self.serving()) - set(down):
            return []
        if not {number for number, phase in resize.undone.items() if phase == "serving"} - set(down):
            return []  # nobody would be better off
        staying = _listed(self.members())
        return self._undo("failed", f"none of those that were to stay serves now: {staying}, started again")

    def ended(self, number: int) -> list[Order]:
        """Its engine was ended, and what it had is free."""
        if self._phases.get(number) == "ending":
            del self._phases[number]
            self._close_if_over()
        return []

    def cancel(self, reason: str) -> list[Order]:
        """Undo the resize that is under way, unless it is committed."""
        if self.resize is None or self.resize.outcome is not None:
            return []
        return self._undo("cancelled", reason)

    def _choose_leaving(
        self, count: int, named: Sequence[int], num_requests: Mapping[int, int], down: Collection[int]
    ) -> list[int]:
        def order(number: int) -> tuple[bool, bool, int, int]:
            return self._phases[number] != "dead", number not in down, num_requests.get(number, 0), -number

        others = sorted((number for number in self.members() if number not in named), key=order)
        return [*dict.fromkeys(named), *others][:count]

    def _prepare(self, number: int) -> list[Order]:
        assert self.resize is not None
        self.resize.prepared.add(number)
        return self._commit() if self.resize.prepared == self.resize.joining | self.resize.leaving else []

    def _commit(self) -> list[Order]:
        assert self.resize is not None
        self._settle("done", None)
        if self.resize.because is None:
            self.wanted = self.resize.size_asked_for
        else:
            missing = max(self.wanted - self.resize.size_asked_for, 0)
            self._note_lost(min(len(self.resize.leaving), missing), self.resize.because)
        self._set(self.resize.joining, "serving")
        return self._end(self.resize.leaving)

    def _undo(self, ending: Ending, reason: str) -> list[Order]:
        assert self.resize is not None
        self._settle(ending, reason)
        self._phases.update(self.resize.undone)
        orders: list[Order] = []
        for number, phase in sorted(self.resize.undone.items()):
            if phase == "dead" and not self._replaces_dead:
                orders += self._end((number,))
            else:
                orders.append(Replace(number) if phase == "dead" else Keep(number))
        return orders + self._end(self.resize.joining)

    def _lose(self, number: int, how: str, *, is_replaced: bool) -> list[Order]:
        """One that served is dead, or is to be gone."""
        self._phases[number] = "dead"
        orders: list[Order] = [Replace(number)] if is_replaced else self._end((number,))
        is_open = self.resize is not None and self.resize.outcome is None
        # Those that leave are the only ones left, or are needed as there is no other in its place.
        if is_open and self._in("leaving") and not (self.serving() and is_replaced):
            orders += self._undo("failed", f"replica {number}, which was to stay, {how}")
        return orders

    def _note_lost(self, count: int, because: str) -> None:
        if count:
            self.num_lost += count
            self._lost_because = because

    def _settle(self, ending: Ending, reason: str | None) -> None:
        assert self.resize is not None
        assert self.resize.outcome is None, "it was committed or undone before"
        self.resize.outcome = Outcome(
            ending=ending,
            reason=reason,
            size_before=self.resize.size_before,
            size_asked_for=self.resize.size_asked_for,
        )

    def _end(self, numbers: Iterable[int]) -> list[Order]:
        ordered = sorted(numbers)
        self._set(ordered, "ending")
        self._close_if_over()
        return [End(number) for number in ordered]

    def _close_if_over(self) -> None:
        """It is over when all is free again that it has no use for."""
        resize = self.resize
        if resize is None or resize.outcome is None:
            return
        if not any(self._phases.get(number) == "ending" for number in resize.joining | resize.leaving):
            self.resize, self.last = None, resize.outcome

    def _in(self, phase: Phase) -> list[int]:
        return sorted(number for number, found in self._phases.items() if found == phase)

    def _set(self, numbers: Iterable[int], phase: Phase) -> None:
        for number in numbers:
            self._phases[number] = phase


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(numbers))))
