"""What is asked of the process that looks at a Ray cluster, and what it answers."""

from __future__ import annotations

import msgspec

from phalanx.config import ClusterConfig
from phalanx.topology.placement import Node


class CensusQuestion(msgspec.Struct, frozen=True, kw_only=True):
    """Which nodes are there, and what have they of this resource?"""

    cluster: ClusterConfig
    resource: str


class CensusAnswer(msgspec.Struct, frozen=True, kw_only=True):
    nodes: tuple[Node, ...] = ()
    has_cluster: bool = True
    """False where each engine would start a Ray of its own."""
    error: str | None = None
    """Why nothing can be said of them."""
