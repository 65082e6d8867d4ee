"""An `Exchange` between ranks that are threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Sequence


class _Board:
    def __init__(self) -> None:
        self.values: dict[tuple[str, str], bytes] = {}
        self.changed = threading.Condition()


class ThreadExchange:
    """One rank's end. All ranks are on this host."""

    node_address = "127.0.0.1"

    def __init__(self, board: _Board) -> None:
        self._board = board

    @classmethod
    def make(cls, size: int) -> list[ThreadExchange]:
        """The ends of `size` ranks."""
        board = _Board()
        return [cls(board) for _ in range(size)]

    def publish(self, group: str, key: str, value: bytes) -> None:
        with self._board.changed:
            assert (group, key) not in self._board.values, f"{key} of {group} is published twice"
            self._board.values[group, key] = value
            self._board.changed.notify_all()

    def wait(self, group: str, keys: Sequence[str], timeout_s: float) -> dict[str, bytes]:
        values = self._board.values
        with self._board.changed:
            self._board.changed.wait_for(lambda: all((group, key) in values for key in keys), timeout_s)
            return {key: values[group, key] for key in keys if (group, key) in values}
