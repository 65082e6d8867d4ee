"""The engines of a fleet, by the numbers of their replicas, and how they are as one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from phalanx.engine.client import EngineClient
from phalanx.engine.condition import Condition
from phalanx.engine.engine import ReplicaState
from phalanx.engine.roster import Roster
from phalanx.errors import EngineDeadError
from phalanx.ledger.status import InstanceStatus
from phalanx.protocol.client import EngineStats, ReplicaStats


class Members:
    """Whoever starts or ends an engine tells it here, and the roster what that means."""

    def __init__(self, engines: Sequence[EngineClient]) -> None:
        self.engines = dict(enumerate(engines))
        self.roster = Roster(len(engines), replaces_dead=True)

    def stats(self, num_blocks: int) -> EngineStats | None:
        """Of all in the roster; of one that has told nothing, that it has so many blocks."""
        found = {number: engine.stats for number, engine in self.engines.items() if engine.stats is not None}
        if not found:
            return None
        nothing = ReplicaStats(0, 0, 0, num_blocks, 0, 0, 0, 0, 0)
        return EngineStats(
            tuple(found[number].replicas[0] if number in found else nothing for number in self.roster.phases)
        )

    @property
    def dead(self) -> str | None:
        reasons = [engine.dead for engine in self.active().values()]
        return None if None in reasons else "; ".join(reason for reason in reasons if reason is not None)

    @property
    def down(self) -> str | None:
        living = self._not_dead()
        reasons = [engine.down for engine in living if engine.down is not None]
        return "; ".join(reasons) if living and len(reasons) == len(living) else None

    @property
    def asleep(self) -> int:
        """The least of the levels."""
        return min((engine.asleep for engine in self._not_dead()), default=0)

    @property
    def num_running(self) -> int:
        return sum(engine.num_running for engine in self.engines.values())

    def num_requests(self) -> dict[int, int]:
        """Of each."""
        return {number: engine.num_running for number, engine in self.engines.items()}

    def pids(self) -> list[int]:
        """Of the engines that live."""
        return [engine.condition.pid for engine in self._not_dead()]

    def conditions(self) -> Sequence[Condition]:
        return [msgspec.structs.replace(engine.condition, replica=number) for number, engine in self.active().items()]

    def statuses(self) -> Sequence[InstanceStatus]:
        return [status for engine in list(self.engines.values()) for status in engine.statuses()]

    def replicas(self) -> list[ReplicaState]:
        """All in the roster, also those that have no engine yet."""
        num_requests = self.num_requests()
        return [
            ReplicaState(replica=number, state=phase, num_requests=num_requests.get(number, 0))
            for number, phase in self.roster.phases.items()
        ]

    async def until_settled(self) -> None:
        """As EngineClient.until_settled, of any that is not dead."""
        while self.down is not None or self.asleep:
            waits = [asyncio.create_task(engine.until_settled()) for engine in self._not_dead()]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()

    def active(self) -> dict[int, EngineClient]:
        """Those that have requests, or would have. One that is being ended lives for a while, and takes none."""
        phases = self.roster.phases
        return {number: self.engines[number] for number in phases if phases[number] in ("serving", "leaving", "dead")}

    def living(self) -> list[int]:
        """At least one. Raises EngineDeadError if none is left."""
        living = [number for number, engine in self.active().items() if engine.dead is None]
        if not living:
            raise EngineDeadError(str(self.dead))
        return living

    def numbers_down(self) -> list[int]:
        """Those whose engines are being started again."""
        return [number for number, engine in self.engines.items() if engine.down is not None]

    def _not_dead(self) -> list[EngineClient]:
        return [engine for engine in self.engines.values() if engine.dead is None]
