"""What /status and /status.json show: the server, its queues, and every rank of its engines."""

from __future__ import annotations

import asyncio
import time

import msgspec

from phalanx.engine.condition import Condition
from phalanx.engine.engine import Strength
from phalanx.engine.roster import Phase
from phalanx.errors import DeadlineError
from phalanx.ledger.status import InstanceStatus
from phalanx.server.health import HealthBody, health
from phalanx.server.service import Service
from phalanx.version import __version__

FRESH_S = 0.5
"""However many ask, ranks are looked at no more often."""
READ_DEADLINE_S = 5.0


class QueueStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Of one replica."""

    replica: int
    state: Phase
    num_running: int
    num_waiting: int
    num_blocks_used: int
    num_blocks: int
    num_steps: int
    num_preemptions: int
    num_generated_tokens: int


class ServerStatus(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    model: str
    up_s: float
    num_in_flight: int
    """HTTP requests."""
    health: HealthBody
    queues: tuple[QueueStatus, ...]
    strength: Strength
    engines: tuple[Condition, ...]
    instances: tuple[InstanceStatus, ...]


class StatusReader:
    """Reads how all is, in a thread: the event loop is not held up. For one event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._reading = asyncio.Lock()
        self._read_at = float("-inf")
        self._instances: tuple[InstanceStatus, ...] = ()

    async def read(self) -> ServerStatus:
        """Raises DeadlineError."""
        try:
            async with asyncio.timeout(READ_DEADLINE_S), self._reading:
                if time.monotonic() - self._read_at > FRESH_S:
                    self._instances = tuple(await asyncio.to_thread(self._service.engine.statuses))
                    self._read_at = time.monotonic()
        except TimeoutError:
            raise DeadlineError("how the ranks are", "the ledger", READ_DEADLINE_S) from None
        return status_of(self._service, self._instances)


def status_of(service: Service, instances: tuple[InstanceStatus, ...]) -> ServerStatus:
    conditions = tuple(service.engine.conditions())
    stats = service.engine.stats
    queues = (
        QueueStatus(
            replica=replica.replica,
            state=replica.state,
            num_running=one.num_running,
            num_waiting=one.num_waiting,
            num_blocks_used=one.num_blocks_used,
            num_blocks=one.num_blocks,
            num_steps=one.num_steps,
            num_preemptions=one.num_preemptions,
            num_generated_tokens=one.num_generated_tokens,
        )
        for replica, one in zip(service.engine.replicas(), stats.replicas if stats is not None else (), strict=False)
    )
    return ServerStatus(
        version=__version__,
        model=service.model_name,
        up_s=round(time.time() - service.created, 1),
        num_in_flight=service.num_in_flight,
        health=health(conditions, service.refusal()).body,
        queues=tuple(queues),
        strength=service.engine.strength,
        engines=conditions,
        instances=instances,
    )
