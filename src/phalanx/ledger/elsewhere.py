"""What the judge shows of ranks on other nodes, to whoever looks at the instance on its own.

It is memory of the engine's process beside the board, written some times a second: other processes on this host have
no other way to know how those ranks are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from phalanx.ledger.look import RankLook
from phalanx.ledger.newest import NewestWriter, bytes_for, read_newest

SHOW_S = 0.25
_RANK_BYTES = 16 * 1024
_NS = 1e9

Word = Literal["heard", "lost", "unwatched"]
"""Of a node. unwatched: its watcher is not heard, and the run shows that it is there."""


class NodeSeen(msgspec.Struct, frozen=True, kw_only=True):
    """One of the other nodes."""

    node: str
    ranks: tuple[int, ...]
    word: Word
    seen_ns: int
    """Up to when, by the judge's clock, all is known that `looks` could say; 0 if nothing ever was."""
    looks: tuple[RankLook, ...]
    """Of those that have begun: with their newest records, and times upon the judge's clock. None of a node that is
    unwatched."""


def elsewhere_bytes(num_ranks: int) -> int:
    """Of memory that shows so many ranks."""
    return bytes_for(num_ranks * _RANK_BYTES)


class ElsewhereWriter:
    """For one thread of one process."""

    def __init__(self, memory: memoryview) -> None:
        """`memory`: as much as `elsewhere_bytes` says, zeroed."""
        self._newest = NewestWriter(memory)
        self._shown_ns = 0

    def show(self, nodes_seen: Callable[[], tuple[NodeSeen, ...]], now_ns: int) -> None:
        """Every SHOW_S at most."""
        if now_ns - self._shown_ns >= SHOW_S * _NS:
            self._shown_ns = now_ns
            self._newest.put(self._fitting(nodes_seen()))

    def _fitting(self, nodes: tuple[NodeSeen, ...]) -> bytes:
        """As much of it as there is room for: what is left out first are records."""
        content = msgspec.msgpack.encode(nodes)
        if len(content) > self._newest.room:
            content = msgspec.msgpack.encode(tuple(_without_records(node) for node in nodes))
        return content


def read_elsewhere(memory: memoryview) -> tuple[NodeSeen, ...]:
    """What is shown there; nothing before the judge has begun. Never blocks."""
    content = read_newest(memory)
    return () if content is None else msgspec.msgpack.decode(content, type=tuple[NodeSeen, ...])


def _without_records(node: NodeSeen) -> NodeSeen:
    looks = (
        msgspec.structs.replace(one, entries=msgspec.structs.replace(one.entries, records=(), texts={}))
        for one in node.looks
    )
    return msgspec.structs.replace(node, looks=tuple(looks))
