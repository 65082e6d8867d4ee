"""The store through which Gloo connects ranks of several hosts: no server, no port."""

from __future__ import annotations

import time
from datetime import timedelta

from torch._C._distributed_c10d import Store

from phalanx.collectives.exchange import Exchange

_PREFIX = "store "


class ExchangeStore(Store):
    """A store of one group upon an `Exchange`. It can do what connecting takes: set, get and wait.

    For the thread that uses the exchange. Not for NCCL, whose own threads ask a store for as long as the group lives.
    """

    def __init__(self, exchange: Exchange, group: str, timeout_s: float) -> None:
        """No wait goes on for longer than `timeout_s` from now, and none ends before."""
        super().__init__()
        self._exchange = exchange
        self._group = group
        self._timeout_s = timeout_s
        self._expires_at = time.monotonic() + timeout_s

    def set(self, key: str, value: str | bytes) -> None:
        self._exchange.publish(self._group, _PREFIX + key, value.encode() if isinstance(value, str) else value)

    def get(self, key: str) -> bytes:
        return self._found([key])[_PREFIX + key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._found(keys)

    def _found(self, keys: list[str]) -> dict[str, bytes]:
        remaining_s = max(self._expires_at - time.monotonic(), 0.0)
        found = self._exchange.wait(self._group, [_PREFIX + key for key in keys], remaining_s)
        if len(found) < len(keys):
            raise TimeoutError(f"{', '.join(keys)} was not set within {self._timeout_s:.3g} s")
        return found
