"""Blows against an engine that heals, while it serves streams of different kinds, and what must hold after each.

Every request ends exactly once. Every stream is that of a run without faults, token for token. What ended the ranks is
told, by the name of the rank that was hurt. No wait passes its deadline. Nothing is left over.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec

from phalanx.config import Config
from phalanx.engine.child import ENGINE_COMMAND
from phalanx.engine.client import EngineClient
from phalanx.engine.stream import OutputDelta
from phalanx.errors import DeadlineError, PhalanxError, UserError
from phalanx.executor.out_of_memory import OutOfMemoryKills
from phalanx.protocol.client import FormationStats
from phalanx.testing.blows import Blow, is_named
from phalanx.testing.holdings import Holdings, used_of_gpus
from phalanx.testing.reach import Place, Reach, ThisHost
from phalanx.testing.streams import (
    Asked,
    Came,
    Seen,
    again_s,
    difference,
    follow,
    has_ended,
    requests,
    with_stop_strings,
)
from phalanx.testing.strike import Before, Strike
from phalanx.transport.liveness import group_members

WELL_S = 120.0
"""For an engine to serve again, with a standby line if it has one: what it may take, and as long again."""
TOLD_S = 5.0
"""For the engine to tell what it has done about a fault."""
LEFT_S = 10.0
"""For what a line or an engine has used to be let go."""
HAPPENS_S = 30.0
"""For a blow to happen, while there is work of all kinds."""
LOOK_S = 0.01


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one blow."""

    index: int
    blow: Blow
    has_happened: bool
    violations: tuple[str, ...]
    """Of what must hold."""
    fault: str = ""
    """What ended ranks, as the engine has told it."""
    rungs: tuple[str, ...] = ()
    """What was tried, and brought ranks that compute."""
    pause_s: float = 0.0
    """From the fault to ranks that compute."""
    gap_s: float = 0.0
    """The longest between two tokens of any stream."""
    again_s: float = 0.0
    """From the last kill to the first token of the line that took over, if one did; `gap_s` is from the first kill on,
    and of all waits the longest. Not of an engine that was killed, or resized meanwhile."""
    num_streams: int = 0
    num_wrong: int = 0
    """Streams that ended once, and were not those of a run without faults."""
    num_lost: int = 0
    """Requests that failed, or did not end exactly once."""
    num_left: int = 0
    """Of what is left over, kinds."""
    took_s: float = 0.0


class _Violation(Exception):
    """The round cannot go on."""


class Checker:
    """One engine, and the same streams again and again. Use `Checker.start`."""

    def __init__(self, engine: EngineClient, config: Config, asked: Sequence[Asked], reach: Reach) -> None:
        self._engine = engine
        self._config = config
        self._asked = asked
        self._reach = reach
        self._expected: Sequence[Seen] = ()
        self._clean_s = 0.0
        """What all streams take without a fault."""
        self._has: Holdings
        """Before the first fault."""
        self._had_fault = False
        self._num_tokens = 0
        self._came: list[Came] = []
        """In this round."""

    @classmethod
    async def start(
        cls, config: Config, *, num_streams: int, seed: int, log: Path | None = None, reach: Reach | None = None
    ) -> Checker:
        """Start the engine and see what its streams are. `log`: where what it says goes; else nobody hears it. `reach`:
        to ranks that are not all on this host.

        Raises what EngineClient.start does, and UserError if two runs without a fault are not the same, or GPUs do not
        tell what they have in use.
        """
        if config.executor.device == "cuda":
            used_of_gpus()
        shell = ("/bin/sh", "-c", 'exec "$@" 2>>"$0"', str(log or os.devnull))
        engine = await EngineClient.start(config, command=(*shell, *ENGINE_COMMAND))
        try:
            asked = requests(seed, num_streams, engine.front.vocab_size, engine.info.max_model_len)
            checker = cls(engine, config, asked, reach or ThisHost())
            await checker._learn()
        except _Violation as violation:
            await engine.close()
            raise DeadlineError("an engine that is well", f"process {engine.condition.pid}", WELL_S) from violation
        except BaseException:
            await engine.close()
            raise
        return checker

    @property
    def is_alive(self) -> bool:
        """Whether another round makes sense."""
        return self._engine.dead is None

    async def round(self, index: int, blow: Blow) -> Round:
        """Have it happen while streams run, or before they do. Raises nothing that is the engine's doing."""
        began_at = time.monotonic()
        made = Round(index=index, blow=blow, has_happened=False, violations=())
        try:
            before = await self._well()
            with ExitStack() as stack:
                made = await self._run(made, blow, Strike(blow, before, self._engine, self._reach, stack))
            made = await self._judged(made, before)
        except (_Violation, PhalanxError, OSError) as error:
            made = msgspec.structs.replace(made, violations=(*made.violations, str(error) or type(error).__name__))
        return msgspec.structs.replace(made, took_s=time.monotonic() - began_at)

    async def close(self) -> list[str]:
        """End the engine; what is left of it, in words."""
        pid = self._engine.condition.pid
        await self._engine.close()
        expires_at = time.monotonic() + LEFT_S
        while (left := group_members(pid)) and time.monotonic() < expires_at:
            await asyncio.sleep(LOOK_S)
        return [f"processes that have outlived the engine: {left}"] if left else []

    # ------------------------------------------------------------------------------------- streams

    async def _learn(self) -> None:
        """What the streams are without a fault, in two runs that must be the same."""
        await self._well()
        self._has = await self._holdings()
        self._asked = with_stop_strings(self._asked, await self._streams(self._asked))
        self._expected = await self._streams([one._replace(cancelled_after=None) for one in self._asked])
        began_at = time.monotonic()
        again = await self._streams(self._asked)
        self._clean_s = time.monotonic() - began_at
        if complaints := self._complaints(again):
            raise UserError(f"without a fault, two runs of the same requests are not the same: {'; '.join(complaints)}")

    async def _streams(self, asked: Sequence[Asked]) -> list[Seen]:
        return await asyncio.gather(*(follow(self._engine, one, self._note) for one in asked))

    def _note(self, delta: OutputDelta) -> None:
        self._num_tokens += len(delta.token_ids)
        if delta.origins:
            self._came.append(Came(time.monotonic(), delta.origins[-1].epoch))

    def _complaints(self, found: Sequence[Seen]) -> list[str]:
        differences = map(difference, self._asked, self._expected, found)
        return [f"stream {number}: {one}" for number, one in enumerate(differences) if one is not None]

    async def _run(self, made: Round, blow: Blow, strike: Strike) -> Round:
        """The streams, and the blow; streams again, until it has happened."""
        waves: list[list[Seen]] = []
        self._came.clear()
        if blow.state == "idle":
            await strike.begin()
            await _until(lambda: strike.has_happened, HAPPENS_S, "the blow did not happen to an idle rank")
            waves.append(await self._wave())
        else:
            total, self._num_tokens = sum(len(one.tokens) for one in self._expected), 0
            running = asyncio.create_task(self._wave())
            while self._num_tokens < blow.after * total and not running.done():
                await asyncio.sleep(LOOK_S / 10)
            await strike.begin()
            waves.append(await running)
            expires_at = time.monotonic() + HAPPENS_S
            while not strike.has_happened and strike.refusal is None and time.monotonic() < expires_at:
                waves.append(await self._wave())
        wrong = await strike.end()
        complaints = [complaint for wave in waves for complaint in self._complaints(wave)]
        pairs = [pair for wave in waves for pair in zip(self._asked, wave, strict=True)]
        num_lost = sum(not has_ended(*pair) for pair in pairs)
        return msgspec.structs.replace(
            made,
            has_happened=strike.has_happened,
            violations=(*complaints, *wrong),
            gap_s=max(seen.gap_s for wave in waves for seen in wave),
            again_s=self._again_s(blow, strike.struck_at),
            num_streams=len(pairs),
            num_wrong=len(complaints) - num_lost,
            num_lost=num_lost,
        )

    def _again_s(self, blow: Blow, struck_at: float | None) -> float:
        is_one_after_the_other = blow.kind not in ("kill-engine", "kill-resize")  # these count anew, or make more lines
        return again_s(struck_at, self._came) if struck_at is not None and is_one_after_the_other else 0.0

    async def _wave(self) -> list[Seen]:
        """Within the time that a step, its healing and a start of the engine may take."""
        executor, healing = self._config.executor, self._config.healing
        limit_s = executor.step_timeout_s + healing.heal_timeout_s + WELL_S + 10 * self._clean_s
        try:
            return await asyncio.wait_for(self._streams(self._asked), limit_s)
        except TimeoutError:
            raise _Violation(f"streams have not ended after {limit_s:.0f} s") from None

    # ------------------------------------------------------------------------------------- the engine

    async def _well(self) -> Before:
        """When it serves, with all the lines that it should have."""
        found: Before | None = None

        def is_well() -> bool:
            nonlocal found
            if self._engine.dead is not None:
                raise _Violation(f"the engine is dead: {self._engine.dead}")
            found = self._look()
            return found is not None

        await _until(is_well, WELL_S, "the engine was not well again")
        assert found is not None
        return found

    def _look(self) -> Before | None:
        """How it is, if it is well."""
        stats = self._formation()
        if self._engine.down is not None or stats is None or stats.is_healing:
            return None
        if self._config.healing.standby and stats.standby != "ready":
            return None
        (status,) = self._engine.statuses() or (None,)
        if status is None or status.epoch != stats.epoch or status.verdict is not None:
            return None
        places = {
            rank.rank: Place(rank.node, rank.pid)
            for rank in status.ranks
            if rank.phase == "idle" and rank.pid is not None
        }
        if len(places) != status.world_size or status.world_size != self._config.parallel.world_size:
            return None
        condition = self._engine.condition
        num_kills = OutOfMemoryKills.now().on_host
        return Before(status, places, stats, condition.num_restarts, condition.num_watcher_restarts, num_kills)

    def _formation(self) -> FormationStats | None:
        return self._engine.condition.formation

    async def _judged(self, made: Round, before: Before) -> Round:
        """With what the engine says of it, and what it has more than before."""
        blow, violations = made.blow, list(made.violations)
        if made.has_happened:
            with suppress(_Violation):
                await _until(lambda: self._has_told(blow, before), TOLD_S, "")
        after = (await self._well()).stats
        is_same_engine = self._engine.condition.num_restarts == before.num_restarts
        num_faults = after.num_faults - before.stats.num_faults
        if made.has_happened:
            violations += self._wrong(blow, before, after, num_faults)
        if num_faults or not is_same_engine or blow.ends_a_line is None:
            self._had_fault = True
        rungs = _more(after.healed, before.stats.healed)
        left = await self._left_over(is_new=not is_same_engine)
        violations += left
        return msgspec.structs.replace(
            made,
            violations=tuple(violations),
            num_left=len(left),
            fault=after.last_fault if num_faults else "",
            rungs=tuple(rung for rung, count in sorted(rungs.items()) for _ in range(count)),
            pause_s=after.last_pause_s if num_faults else 0.0,
        )

    def _has_told(self, blow: Blow, before: Before) -> bool:
        now = self._formation()
        if blow.kind == "kill-engine":
            return self._engine.condition.num_restarts > before.num_restarts
        if blow.kind == "kill-watcher":
            return self._engine.condition.num_watcher_restarts > before.num_watcher_restarts
        if now is None:
            return False
        if blow.kind == "kill-standby":
            return now.num_standby_faults > before.stats.num_standby_faults
        return blow.ends_a_line is None or now.num_faults > before.stats.num_faults

    def _wrong(self, blow: Blow, before: Before, after: FormationStats, num_faults: int) -> list[str]:
        """In what the engine says."""
        if not self._has_told(blow, before):
            return ["nothing has noticed it"]
        if blow.ends_a_line is False and num_faults:
            return [f"ranks were ended for it: {after.last_fault}"]
        if blow.ends_a_line and num_faults > 1:
            return [f"{num_faults} faults, the last one: {after.last_fault}"]
        if num_faults and not is_named(blow, after.last_fault):
            return [f"it was not rank {blow.rank} that was blamed: {after.last_fault}"]
        if blow.kind == "oom" and OutOfMemoryKills.now().on_host == before.num_memory_kills:
            return [f"the kernel has killed nobody for lack of memory: {after.last_fault}"]
        return []

    async def _left_over(self, *, is_new: bool) -> list[str]:
        """What it has more than before the first fault, when all that was used has had time to go."""
        num_ranks = self._config.parallel.world_size
        has = await self._holdings()
        if is_new or not self._had_fault:
            self._has = has
            return []
        expires_at = time.monotonic() + LEFT_S
        while (beyond := has.beyond(self._has, num_ranks)) and time.monotonic() < expires_at:
            await asyncio.sleep(10 * LOOK_S)
            has = await self._holdings()
        if beyond:
            self._has = has  # told once
        return [f"left over: {one}" for one in beyond]

    async def _holdings(self) -> Holdings:
        """In a thread: to ask what GPUs have in use takes a program of its own, and streams may run."""
        has_gpus = self._config.executor.device == "cuda"
        return await asyncio.to_thread(Holdings.of, self._engine.condition.pid, gpus=has_gpus)


async def _until(condition: Callable[[], bool], within_s: float, complaint: str) -> None:
    expires_at = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > expires_at:
            raise _Violation(f"{complaint} after {within_s:.0f} s")
        await asyncio.sleep(LOOK_S)


def _more(now: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: count - before.get(name, 0) for name, count in now.items()}
