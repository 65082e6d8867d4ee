"""How a rank reads what the brain sends: calls in their order, and in between what ranks publish to each other."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from phalanx.protocol.worker import Call, Publish, Published


class BrainExchange:
    """An `Exchange` over this rank's connection to the brain, which passes on to all ranks what one publishes.

    Calls that come while something else is awaited are kept for `next_call`.
    """

    def __init__(
        self,
        epoch: int,
        node_address: str,
        put: Callable[[Publish], None],
        get: Callable[[float | None], Call | None],
    ) -> None:
        """`get` takes a time-out in seconds; None waits for as long as it takes."""
        self.node_address = node_address
        self.num_stale = 0
        """Entries of another epoch: dropped (invariant 3)."""
        self._epoch = epoch
        self._put = put
        self._get = get
        self._board: dict[tuple[str, str], bytes] = {}
        self._calls: deque[Call] = deque()

    def publish(self, group: str, key: str, value: bytes) -> None:
        self._board[group, key] = value
        self._put(Publish(self._epoch, group, key, value))

    def wait(self, group: str, keys: Sequence[str], timeout_s: float) -> dict[str, bytes]:
        expires_at = time.monotonic() + timeout_s
        while True:
            found = {key: self._board[group, key] for key in keys if (group, key) in self._board}
            remaining_s = max(expires_at - time.monotonic(), 0.0)
            if len(found) == len(keys) or (not self._take_in(remaining_s) and not remaining_s):
                return found

    def take_in(self) -> None:
        """Take in what has come; never blocks. Whoever is busy for long does it, so that the brain gets rid of it."""
        while self._take_in(0.0):
            pass

    def next_call(self, timeout_s: float | None) -> Call | None:
        """The brain's next call; None after `timeout_s` (0 polls, None waits for as long as it takes)."""
        expires_at = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._calls:
            remaining_s = None if expires_at is None else max(expires_at - time.monotonic(), 0.0)
            if not self._take_in(remaining_s) and not remaining_s:
                return None
        return self._calls.popleft()

    def _take_in(self, timeout_s: float | None) -> bool:
        """Whether something came."""
        call = self._get(timeout_s)
        if call is None:
            return False
        if not isinstance(call.body, Published):
            self._calls.append(call)
            return True
        for entry in call.body.entries:
            if entry.epoch == self._epoch:
                self._board[entry.group, entry.key] = entry.value
            else:
                self.num_stale += 1
        return True
