"""How ranks that share no memory tell each other what they need to form a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Exchange(Protocol):
    """A board that every rank of the run writes to and reads. For the use of one thread, the one that uses the groups.

    What is written stands under a group's name and a key; one rank writes a key, once.
    """

    node_address: str
    """An IP address of this host that the other ranks' hosts reach."""

    def publish(self, group: str, key: str, value: bytes) -> None:
        """Write `value`. Does not wait for those who read it: this rank may at once, the others soon.

        Raises DeadlineError if it cannot be handed on.
        """
        ...

    def wait(self, group: str, keys: Sequence[str], timeout_s: float) -> dict[str, bytes]:
        """What stands under those of `keys` that are written.

        Blocks until all are, `timeout_s` at most; 0 takes in what has come.
        """
        ...
