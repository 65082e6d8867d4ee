"""What each way of launching hands to the executor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from phalanx.executor.channel import Channel
from phalanx.executor.launcher import Launcher
from phalanx.executor.watching import Watching
from phalanx.worker.spec import WorkerSpec


class Placed(NamedTuple):
    """What a launcher is to start, and how to speak with it."""

    launcher: Launcher
    channel: Channel
    specs: Sequence[WorkerSpec]
    watching: Watching | None = None
    nodes: tuple[str, ...] = ()
    """By rank, the name of the node of a cluster that it is on. Empty where all are on this host."""
