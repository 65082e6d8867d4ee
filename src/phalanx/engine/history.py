"""What earlier processes of an engine have counted: nothing starts at zero again with the next one."""

from __future__ import annotations

import collections
from collections.abc import Mapping

import msgspec

from phalanx.engine.condition import Condition
from phalanx.protocol.client import EngineStats, FormationStats, ReplicaStats


class History:
    """Of one client's engines, but for the one that it has now."""

    def __init__(self) -> None:
        self.num_restarts = 0
        self.num_watcher_restarts = 0
        """Of watchers that had ended, or hung."""
        self._stats: EngineStats | None = None
        self._formation: FormationStats | None = None
        self._verdicts: collections.Counter[str] = collections.Counter()

    def add(self, stats: EngineStats | None, last: Condition) -> None:
        """One more has ended, with this for its last words, and another one has begun."""
        self.num_restarts += 1
        self._stats = self.stats_with(stats)
        self._formation = self.formation_with(stats.formation if stats is not None else None) or self._formation
        self._verdicts.update(last.verdicts)
        self.num_watcher_restarts += last.num_watcher_restarts

    def verdicts_with(self, now: Mapping[str, int]) -> dict[str, int]:
        """By cause, those of the engine that there is now included."""
        return _sum(self._verdicts, now)

    def formation_with(self, now: FormationStats | None) -> FormationStats | None:
        """Its lines now, and counts of all; None if it has said nothing of them."""
        before = self._formation
        if now is None or before is None:
            return now
        return msgspec.structs.replace(
            now,
            num_faults=before.num_faults + now.num_faults,
            healed=_sum(before.healed, now.healed),
            failed=_sum(before.failed, now.failed),
            num_standby_faults=before.num_standby_faults + now.num_standby_faults,
        )

    def stats_with(self, now: EngineStats | None) -> EngineStats | None:
        """Its state now, and counts of all; None if none has said anything."""
        if self._stats is None:
            return now
        if now is None:
            return without_engine(self._stats, 0)
        # The engine may have another number of replicas than the one before it.
        earlier = self._stats.replicas[: len(now.replicas)]
        replicas = tuple(map(_continued, earlier, now.replicas)) + now.replicas[len(earlier) :]
        balance, before = now.balance, self._stats.balance
        if balance is not None and before is not None:
            balance = msgspec.structs.replace(balance, num_moves=balance.num_moves + before.num_moves)
        return msgspec.structs.replace(now, replicas=replicas, balance=balance or before)


def without_engine(last: EngineStats, num_waiting: int) -> EngineStats:
    """While there is no engine: its requests wait, in the first replica's name."""
    nothing = [msgspec.structs.replace(one, num_running=0, num_waiting=0, num_blocks_used=0) for one in last.replicas]
    nothing[0] = msgspec.structs.replace(nothing[0], num_waiting=num_waiting)
    return msgspec.structs.replace(last, replicas=tuple(nothing))


def with_replicas(stats: EngineStats, count: int) -> EngineStats:
    """The same of so many replicas: none of those that are gone, and nothing of those that are to come."""
    nothing = ReplicaStats(0, 0, 0, stats.replicas[0].num_blocks, 0, 0, 0, 0, 0)
    missing = (nothing,) * (count - len(stats.replicas))
    return msgspec.structs.replace(stats, replicas=stats.replicas[:count] + missing)


def _sum(before: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    return dict(collections.Counter(before) + collections.Counter(now))


def _continued(before: ReplicaStats, now: ReplicaStats) -> ReplicaStats:
    return msgspec.structs.replace(
        now,
        num_steps=before.num_steps + now.num_steps,
        num_preemptions=before.num_preemptions + now.num_preemptions,
        num_prompt_tokens=before.num_prompt_tokens + now.num_prompt_tokens,
        num_cached_tokens=before.num_cached_tokens + now.num_cached_tokens,
        num_generated_tokens=before.num_generated_tokens + now.num_generated_tokens,
    )
