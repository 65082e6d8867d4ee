"""What a watcher is to watch, and how it is told to stop."""

from __future__ import annotations

import os
from collections.abc import Iterable

import msgspec

from phalanx.ledger.dump import DumpOrder
from phalanx.ledger.limits import Limits
from phalanx.ledger.other_nodes import OtherNodesOrder
from phalanx.ledger.outlets import Outlets
from phalanx.ledger.verdict import Verdict
from phalanx.transport.shared_memory import SegmentHandle

_STOP_BYTES = 1 << 16


class WatchedRank(msgspec.Struct, frozen=True, kw_only=True):
    """A rank of this node."""

    rank: int
    node: str
    groups: tuple[str, ...]
    """Names, by their index in its records."""
    journal: SegmentHandle


class WatchOrder(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a watcher is to watch."""

    ranks: tuple[WatchedRank, ...]
    groups: dict[str, tuple[int, ...]]
    """The members of each group."""
    limits: Limits = Limits()
    outlets: Outlets | None = None
    dump: DumpOrder | None = None
    """Where verdicts are written, with all that the journals say."""
    other_nodes: OtherNodesOrder | None = None
    """None if all ranks are on this node."""
    standing: Verdict | None = None
    """What a watcher before this one has told, and was not over."""
    num_restarts: int = 0
    """How many there have been before this one."""

    @property
    def num_ranks(self) -> int:
        """On all nodes."""
        others = self.other_nodes.ranks.values() if self.other_nodes is not None else ()
        return len(self.ranks) + sum(map(len, others))


def stop_word(ended: Iterable[int]) -> bytes:
    """What to write for a watcher to stop: these ranks have ended before, by themselves, and are to be told of."""
    return b" ".join((b"!", *(b"%d" % rank for rank in sorted(ended))))


def ended_before(stop: int) -> frozenset[int]:
    """Nobody if `stop` is closed."""
    return frozenset(int(rank) for rank in os.read(stop, _STOP_BYTES).split()[1:])
