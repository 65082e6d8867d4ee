"""What a running engine shows of itself to other processes of its user, and where its watcher makes verdicts known."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack

import msgspec

from phalanx.config import Config
from phalanx.errors import ConfigError
from phalanx.ledger.board import BOARD_BYTES
from phalanx.ledger.elsewhere import elsewhere_bytes
from phalanx.ledger.events import EventLines
from phalanx.ledger.instance import Instance, show
from phalanx.ledger.outlets import Outlets
from phalanx.ledger.watch_order import WatchOrder
from phalanx.transport.beacon import Beacon
from phalanx.transport.liveness import Party
from phalanx.transport.shared_memory import SharedSegment
from phalanx.version import __version__


def open_outlets(config: Config, resources: ExitStack, *, num_elsewhere: int = 0) -> Outlets:
    """A board that this process holds until `resources` are let go, and memory for what is known of ranks on other
    nodes, if there are any. Raises ConfigError if events cannot be written.
    """
    events = config.executor.ledger_events
    if events is not None:
        try:
            EventLines(events).close()
        except OSError as error:
            raise ConfigError("ledger_events", events, f"it cannot be written: {error.strerror}") from error
        events = os.path.abspath(events)
    board = resources.enter_context(SharedSegment.create(BOARD_BYTES, "board of the watcher"))
    elsewhere = None
    if num_elsewhere:
        size = elsewhere_bytes(num_elsewhere)
        elsewhere = resources.enter_context(SharedSegment.create(size, "ranks on other nodes")).handle
    return Outlets(board=board.handle, events=events, model=config.model.model, elsewhere=elsewhere)


def show_instance(config: Config, order: WatchOrder | None, epoch: int, started_at: float | None = None) -> Beacon:
    """Let others find this engine until what is returned is closed. `order`: where journals on this host are.

    `started_at`, in seconds since 1970, is now by default.
    """
    me, parallel = Party.me("the engine"), config.parallel
    sizes = {
        "data_parallel_size": parallel.data_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "tensor_parallel_size": parallel.tensor_parallel_size,
    }
    instance = Instance(
        pid=me.pid,
        start_time=me.start_time,
        parent_pid=os.getppid(),
        version=__version__,
        model=config.model.model,
        world_size=parallel.world_size,
        layout={name: size for name, size in sizes.items() if size > 1},
        launcher=config.executor.launcher,
        device=config.executor.device,
        epoch=epoch,
        started_at=started_at or time.time(),
        # How other nodes report is nobody else's business: there is a key in it.
        order=msgspec.structs.replace(order, other_nodes=None) if order is not None else None,
    )
    return show(instance)


class Presence:
    """What this process shows of one engine, whose lines come one after the other. Not thread-safe."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._started_at = time.time()
        self._beacon: Beacon | None = None

    def show(self, order: WatchOrder | None, epoch: int) -> None:
        """Another line is the one that is shown: `order` says where its journals on this host are."""
        self.close()
        self._beacon = show_instance(self._config, order, epoch, self._started_at)

    def resize(self, config: Config) -> None:
        """Lines that are shown from now on have this configuration."""
        self._config = config

    def close(self) -> None:
        """Be found no more. May be called more than once."""
        if self._beacon is not None:
            self._beacon.close()
            self._beacon = None
