"""An exchange whose every wait is in its rank's journal: so a store that does not answer is told from a late rank."""

from __future__ import annotations

from collections.abc import Sequence

from phalanx.collectives.exchange import Exchange
from phalanx.ledger.journal import Journal


class JournaledExchange:
    """An `Exchange` around another one."""

    def __init__(self, exchange: Exchange, journal: Journal) -> None:
        self.node_address = exchange.node_address
        self._exchange = exchange
        self._journal = journal

    def publish(self, group: str, key: str, value: bytes) -> None:
        with self._journal.awaiting("the store"):
            self._exchange.publish(group, key, value)

    def wait(self, group: str, keys: Sequence[str], timeout_s: float) -> dict[str, bytes]:
        if not timeout_s:
            return self._exchange.wait(group, keys, timeout_s)
        with self._journal.awaiting("the store"):
            return self._exchange.wait(group, keys, timeout_s)
