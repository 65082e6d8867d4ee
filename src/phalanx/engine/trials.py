"""Which requests an engine is given, when engines end one after the other. Pure.

A request that takes its engine down would take down every one that it is given to. Nobody sees which one it is: all
that run are lost together. But it is among those that are where they were at the end before. So after the second end in
a row such requests are *suspects*: the next engine gets them one at a time, first of all, and the next one only when
the one before has gone on. One that is there again when that engine ends, and alone has not gone on, is the one.

An end that came from outside is nobody's doing: it proves nothing, and what was known before it is known after it.
"""

from __future__ import annotations

from collections.abc import Callable

SLACK = 8
"""Tokens that a request may make without having gone on: those that were under way at the end are made again."""
ENDS_OF_A_SUSPECT = 2
ENDS_OF_A_CULPRIT = 3


class Trials:
    """The running requests of one client: those that its engine has, and those that wait for one.

    `num_tokens` says how many tokens of a request have come.
    """

    def __init__(self, num_tokens: Callable[[int], int]) -> None:
        self._num_tokens = num_tokens
        self._waiting: dict[int, None] = {}
        self._given: dict[int, int] = {}
        """The requests that the engine has, and how many tokens each had when it was given."""
        self._ends: dict[int, int] = {}
        """At how many ends in a row each request was where it had been at the one before."""
        self._had: dict[int, int] = {}
        """Tokens at the last end."""
        self._suspects: set[int] = set()

    def add(self, request_id: int) -> None:
        """One more, the last to come."""
        self._waiting[request_id] = None

    def drop(self, request_id: int) -> bool:
        """It has ended, or nobody waits for it any more. True if the engine has it."""
        self._waiting.pop(request_id, None)
        self._ends.pop(request_id, None)
        self._had.pop(request_id, None)
        self._suspects.discard(request_id)
        return self._given.pop(request_id, None) is not None

    def take_next(self) -> list[int]:
        """Those to be given to the engine now, in the order in which they came."""
        if not self._waiting:
            return []
        self._suspects = {request_id for request_id in self._suspects if not self._has_moved(request_id)}
        if self._suspects & self._given.keys():
            return []
        # The last to come is the first to be tried: those before it have seen more go well.
        chosen = [max(self._suspects)] if self._suspects else list(self._waiting)
        for request_id in chosen:
            del self._waiting[request_id]
            self._given[request_id] = self._num_tokens(request_id)
        return chosen

    def engine_ended(self, *, is_from_outside: bool = False) -> int | None:
        """All wait for another engine. Gives the request that takes engines down, if it is known by now: `drop` it."""
        if is_from_outside:
            self._let_wait()
            return None
        stuck = [request_id for request_id in self._given if not self._has_gone_on(request_id)]
        for request_id in self._given:
            self._ends[request_id] = 1 if self._has_moved(request_id) else self._ends.get(request_id, 0) + 1
            self._had[request_id] = self._num_tokens(request_id)
        self._suspects = {request_id for request_id, num in self._ends.items() if num >= ENDS_OF_A_SUSPECT}
        self._let_wait()
        if len(stuck) != 1 or self._ends[stuck[0]] < ENDS_OF_A_CULPRIT:
            return None
        self._ends.clear()  # of the others: it was not them
        self._suspects.clear()
        return stuck[0]

    def _let_wait(self) -> None:
        self._waiting = dict.fromkeys(sorted({*self._given, *self._waiting}))
        self._given.clear()

    def _has_moved(self, request_id: int) -> bool:
        """Since the end before."""
        return self._num_tokens(request_id) > self._had.get(request_id, 0) + SLACK

    def _has_gone_on(self, request_id: int) -> bool:
        """Since this engine has it."""
        return self._num_tokens(request_id) > self._given[request_id] + SLACK
