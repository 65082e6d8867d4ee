"""Which request makes steps fail, if one does: a pure policy.

Of a step that failed nobody knows which of its requests was the reason, or whether any was. So a request is suspected
while steps with it fail and it gets no further. One that has been in FAILURES_TO_ISOLATE of them is run alone: then
either it gets further, or it is to blame.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

FAILURES_TO_ISOLATE = 2
FAILURES_TO_BLAME = 4
"""So many in a row, FAILURES_ALONE_TO_BLAME of them alone, before a request is given up. A fault that is not its own
and comes back, even in the first step after each recovery, must not cost a request."""
FAILURES_ALONE_TO_BLAME = 2


@dataclass(slots=True)
class _Suspect:
    num_failures: int = 0
    """In a row: since it last got further."""
    num_alone: int = 0
    """Of these, those of steps without other requests."""
    reach: int = 0
    """Tokens in the KV cache after the steps that failed: with as many it has got past what made them fail."""


class Suspects:
    """The requests that have been in steps that failed, and have got no further since. Ids grow with arrival."""

    def __init__(self) -> None:
        self._suspects: dict[int, _Suspect] = {}

    def __len__(self) -> int:
        return len(self._suspects)

    @property
    def alone(self) -> int | None:
        """Who is to run alone now, if anybody is.

        The last to arrive comes first: those before it have been in more steps that went well.
        """
        isolated = (i for i, suspect in self._suspects.items() if suspect.num_failures >= FAILURES_TO_ISOLATE)
        return max(isolated, default=None)

    def failed(self, reach: Mapping[int, int], cause: str) -> dict[int, str]:
        """Steps failed that would have brought requests to so many tokens in the KV cache, by id.

        Gives those that are to end for it, and what to tell their users. Those that were suspected beside them are
        suspected no more.
        """
        for request_id, num_tokens in reach.items():
            suspect = self._suspects.setdefault(request_id, _Suspect())
            suspect.num_failures += 1
            suspect.num_alone += len(reach) == 1
            suspect.reach = max(suspect.reach, num_tokens)
        guilty = {i: _complaint(suspect, cause) for i, suspect in self._suspects.items() if _is_guilty(suspect)}
        if guilty:
            self._suspects.clear()
        return guilty

    def committed(self, reach: Mapping[int, int]) -> None:
        """A step succeeded that brought requests to so many tokens in the KV cache, by id."""
        for request_id, num_tokens in reach.items():
            suspect = self._suspects.get(request_id)
            if suspect is not None and num_tokens >= suspect.reach:
                del self._suspects[request_id]

    def ended(self, request_ids: Iterable[int]) -> None:
        """They are no longer there."""
        for request_id in request_ids:
            self._suspects.pop(request_id, None)


def _is_guilty(suspect: _Suspect) -> bool:
    return suspect.num_failures >= FAILURES_TO_BLAME and suspect.num_alone >= FAILURES_ALONE_TO_BLAME


def _complaint(suspect: _Suspect, cause: str) -> str:
    return (
        f"the engine has failed {suspect.num_failures} times in a row in steps with this request, "
        f"{suspect.num_alone} times with no other; the last time: {cause}"
    )
