"""Which request makes steps fail, if one does: a pure policy.

Of a step that failed nobody knows which of its requests was the reason, or whether any was. So a request is suspected
while steps with it fail and it gets no further. One that has been in FAILURES_TO_ISOLATE of them is run alone: then
either it gets further, or it is to blame.

A failure that came from outside, such as a rank that somebody has killed, is the request's doing only if it comes with
the request and not without: before a request is given up for such failures, others run while it is put aside.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

FAILURES_TO_ISOLATE = 2
FAILURES_TO_BLAME = 4
"""So many in a row, FAILURES_ALONE_TO_BLAME of them alone, before a request is given up. A fault that is not its own
and comes back, even in the first step after each recovery, must not cost a request."""
FAILURES_ALONE_TO_BLAME = 2
STEPS_WITHOUT = 16
"""That others make without a failure while a request is put aside: then failures come with it alone."""


@dataclass(slots=True)
class _Failures:
    """In a row: since a request last got further."""

    num: int = 0
    num_alone: int = 0
    """Of these, those of steps without other requests."""

    def add(self, *, is_alone: bool) -> None:
        self.num += 1
        self.num_alone += is_alone

    @property
    def are_enough(self) -> bool:
        return self.num >= FAILURES_TO_BLAME and self.num_alone >= FAILURES_ALONE_TO_BLAME


@dataclass(slots=True)
class _Suspect:
    all: _Failures = field(default_factory=_Failures)
    own: _Failures = field(default_factory=_Failures)
    """Those that did not come from outside."""
    others_run: bool = False
    """Whether others have run without it, and without a failure."""
    reach: int = 0
    """Tokens in the KV cache after the steps that failed: with as many it has got past what made them fail."""

    @property
    def is_guilty(self) -> bool:
        return self.own.are_enough or (self.all.are_enough and self.others_run)


class Suspects:
    """The requests that have been in steps that failed, and have got no further since. Ids grow with arrival."""

    def __init__(self) -> None:
        self._suspects: dict[int, _Suspect] = {}
        self._aside: int | None = None
        self._num_without = 0

    def __len__(self) -> int:
        return len(self._suspects)

    @property
    def alone(self) -> int | None:
        """Who is to run alone now, if anybody is.

        The last to arrive comes first: those before it have been in more steps that went well.
        """
        isolated = (i for i, suspect in self._suspects.items() if suspect.all.num >= FAILURES_TO_ISOLATE)
        return max((i for i in isolated if i != self.aside), default=None)

    @property
    def aside(self) -> int | None:
        """Who is to wait while others run: whether steps fail without it as well is not known yet."""
        return self._aside if self._aside in self._suspects else None

    def failed(self, reach: Mapping[int, int], cause: str, *, is_from_outside: bool = False) -> dict[int, str]:
        """Steps failed that would have brought requests to so many tokens in the KV cache, by id.

        `is_from_outside`: as far as anybody can tell, what they computed was not why. Gives the requests that are to
        end for it, and what to tell their users. Those that were suspected beside them are suspected no more.
        """
        if self.aside is not None and self.aside not in reach:  # it happens without it
            self.ended([self.aside])
        for request_id, num_tokens in reach.items():
            suspect = self._suspects.setdefault(request_id, _Suspect())
            suspect.all.add(is_alone=len(reach) == 1)
            if not is_from_outside:
                suspect.own.add(is_alone=len(reach) == 1)
            suspect.reach = max(suspect.reach, num_tokens)
        guilty = {i: _complaint(suspect.all, cause) for i, suspect in self._suspects.items() if suspect.is_guilty}
        if guilty:
            self._suspects.clear()
        elif self.aside is None:
            self._put_aside()
        return guilty

    def committed(self, reach: Mapping[int, int]) -> None:
        """A step succeeded that brought requests to so many tokens in the KV cache, by id."""
        for request_id, num_tokens in reach.items():
            suspect = self._suspects.get(request_id)
            if suspect is not None and num_tokens >= suspect.reach:
                del self._suspects[request_id]
        if (aside := self.aside) is not None and aside not in reach:
            self._num_without += 1
            if self._num_without == STEPS_WITHOUT:
                self._suspects[aside].others_run = True
                self._aside = None

    def ended(self, request_ids: Iterable[int]) -> None:
        """They are no longer there."""
        for request_id in request_ids:
            self._suspects.pop(request_id, None)

    def _put_aside(self) -> None:
        """One that has failed often enough, if it is not known whether others do so without it: the last to arrive."""
        unknown = (i for i, suspect in self._suspects.items() if suspect.all.are_enough and not suspect.others_run)
        self._aside = max(unknown, default=None)
        self._num_without = 0


def _complaint(failures: _Failures, cause: str) -> str:
    return (
        f"the engine has failed {failures.num} times in a row in steps with this request, "
        f"{failures.num_alone} times with no other; the last time: {cause}"
    )
