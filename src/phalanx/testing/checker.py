"""Blows against an engine that heals, while it serves streams of different kinds, and what must hold after each.

Every request ends exactly once. Every stream is that of a run without faults, token for token. What ended the ranks is
told, by the name of the rank that was hurt. No wait passes its deadline. Nothing is left over.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import msgspec

from phalanx.config import Config
from phalanx.engine.child import ENGINE_COMMAND
from phalanx.engine.client import EngineClient
from phalanx.errors import DeadlineError, PhalanxError, UserError
from phalanx.ledger.status import InstanceStatus
from phalanx.protocol import FormationStats
from phalanx.testing.blows import Blow, is_named
from phalanx.testing.holdings import Holdings, children_of, parent_of
from phalanx.testing.mailbox import Mailbox
from phalanx.testing.streams import Asked, Seen, difference, follow, requests, with_stop_strings
from phalanx.transport.liveness import group_members

WELL_S = 120.0
"""For an engine to serve again, with a standby line if it has one: what it may take, and as long again."""
TOLD_S = 5.0
"""For the engine to tell what it has done about a fault."""
LEFT_S = 10.0
"""For what a line or an engine has used to be let go."""
HAPPENS_S = 30.0
"""For a blow to happen, while there is work of all kinds."""
SWITCH_S = 0.2
"""Within that time after the first one, the second kill of a switch comes."""
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
    num_streams: int = 0
    took_s: float = 0.0


class _Violation(Exception):
    """The round cannot go on."""


class Checker:
    """One engine, and the same streams again and again. Use `Checker.start`."""

    def __init__(self, engine: EngineClient, config: Config, asked: Sequence[Asked]) -> None:
        self._engine = engine
        self._config = config
        self._asked = asked
        self._expected: Sequence[Seen] = ()
        self._clean_s = 0.0
        """What all streams take without a fault."""
        self._has = Holdings.of(engine.condition.pid)
        self._had_fault = False
        self._num_tokens = 0

    @classmethod
    async def start(cls, config: Config, *, num_streams: int, seed: int, log: Path | None = None) -> Checker:
        """Start the engine and see what its streams are. `log`: where what it says goes; else nobody hears it.

        Raises what EngineClient.start does, and UserError if two runs without a fault are not the same.
        """
        shell = ("/bin/sh", "-c", 'exec "$@" 2>>"$0"', str(log or os.devnull))
        engine = await EngineClient.start(config, command=(*shell, *ENGINE_COMMAND))
        try:
            asked = requests(seed, num_streams, engine.front.vocab_size, engine.info.max_model_len)
            checker = cls(engine, config, asked)
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
                made = await self._run(made, blow, _Strike(blow, before, stack))
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
        self._has = Holdings.of(self._engine.condition.pid)
        self._asked = with_stop_strings(self._asked, await self._streams(self._asked))
        self._expected = await self._streams([one._replace(cancelled_after=None) for one in self._asked])
        began_at = time.monotonic()
        again = await self._streams(self._asked)
        self._clean_s = time.monotonic() - began_at
        if complaints := self._complaints(again):
            raise UserError(f"without a fault, two runs of the same requests are not the same: {'; '.join(complaints)}")

    async def _streams(self, asked: Sequence[Asked]) -> list[Seen]:
        return await asyncio.gather(*(follow(self._engine, one, self._count) for one in asked))

    def _count(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens

    def _complaints(self, found: Sequence[Seen]) -> list[str]:
        differences = map(difference, self._asked, self._expected, found)
        return [f"stream {number}: {one}" for number, one in enumerate(differences) if one is not None]

    async def _run(self, made: Round, blow: Blow, strike: _Strike) -> Round:
        """The streams, and the blow; streams again, until it has happened."""
        waves: list[list[Seen]] = []
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
        await strike.end()
        complaints = [complaint for wave in waves for complaint in self._complaints(wave)]
        return msgspec.structs.replace(
            made,
            has_happened=strike.has_happened,
            violations=tuple(complaints),
            gap_s=max(seen.gap_s for wave in waves for seen in wave),
            num_streams=len(waves) * len(self._asked),
        )

    async def _wave(self) -> list[Seen]:
        """Within the time that a step, its healing and a start of the engine may take."""
        executor, healing = self._config.executor, self._config.healing
        limit_s = executor.step_timeout_s + healing.heal_timeout_s + WELL_S + 10 * self._clean_s
        try:
            return await asyncio.wait_for(self._streams(self._asked), limit_s)
        except TimeoutError:
            raise _Violation(f"streams have not ended after {limit_s:.0f} s") from None

    # ------------------------------------------------------------------------------------- the engine

    async def _well(self) -> _Before:
        """When it serves, with all the lines that it should have."""
        found: _Before | None = None

        def is_well() -> bool:
            nonlocal found
            if self._engine.dead is not None:
                raise _Violation(f"the engine is dead: {self._engine.dead}")
            found = self._look()
            return found is not None

        await _until(is_well, WELL_S, "the engine was not well again")
        assert found is not None
        return found

    def _look(self) -> _Before | None:
        """How it is, if it is well."""
        stats = self._formation()
        if self._engine.down is not None or stats is None or stats.is_healing:
            return None
        if self._config.healing.standby and stats.standby != "ready":
            return None
        (status,) = self._engine.statuses() or (None,)
        if status is None or status.epoch != stats.epoch or status.verdict is not None:
            return None
        pids = {rank.rank: rank.pid for rank in status.ranks if rank.phase == "idle" and rank.pid is not None}
        if len(pids) != status.world_size:
            return None
        return _Before(status, pids, stats, self._engine.condition.num_restarts)

    def _formation(self) -> FormationStats | None:
        return self._engine.condition.formation

    async def _judged(self, made: Round, before: _Before) -> Round:
        """With what the engine says of it, and what it has more than before."""
        blow, violations = made.blow, list(made.violations)
        if made.has_happened:
            with suppress(_Violation):
                await _until(lambda: self._has_told(blow, before), TOLD_S, "")
        after = (await self._well()).stats
        is_same_engine = self._engine.condition.num_restarts == before.num_restarts
        num_faults = after.num_faults - before.stats.num_faults if is_same_engine else after.num_faults
        if made.has_happened:
            violations += self._wrong(blow, before, after, num_faults)
        if num_faults or not is_same_engine:
            self._had_fault = True
        rungs = after.healed if not is_same_engine else _more(after.healed, before.stats.healed)
        violations += await self._left_over(is_new=not is_same_engine)
        return msgspec.structs.replace(
            made,
            violations=tuple(violations),
            fault=after.last_fault if num_faults else "",
            rungs=tuple(rung for rung, count in sorted(rungs.items()) for _ in range(count)),
            pause_s=after.last_pause_s if num_faults else 0.0,
        )

    def _has_told(self, blow: Blow, before: _Before) -> bool:
        now = self._formation()
        if blow.kind == "kill-engine":
            return self._engine.condition.num_restarts > before.num_restarts
        if now is None:
            return False
        if blow.kind == "kill-standby":
            return now.num_standby_faults > before.stats.num_standby_faults
        return blow.ends_a_line is None or now.num_faults > before.stats.num_faults

    def _wrong(self, blow: Blow, before: _Before, after: FormationStats, num_faults: int) -> list[str]:
        """In what the engine says."""
        if not self._has_told(blow, before):
            return ["nothing has noticed it"]
        if blow.ends_a_line is False and num_faults:
            return [f"ranks were ended for it: {after.last_fault}"]
        if blow.ends_a_line and num_faults > 1:
            return [f"{num_faults} faults, the last one: {after.last_fault}"]
        if num_faults and not is_named(blow, after.last_fault):
            return [f"it was not rank {blow.rank} that was blamed: {after.last_fault}"]
        return []

    async def _left_over(self, *, is_new: bool) -> list[str]:
        """What it has more than before the first fault, when all that was used has had time to go."""
        pid, num_ranks = self._engine.condition.pid, self._config.parallel.world_size
        has = Holdings.of(pid)
        if is_new or not self._had_fault:
            self._has = has
            return []
        expires_at = time.monotonic() + LEFT_S
        while (beyond := has.beyond(self._has, num_ranks)) and time.monotonic() < expires_at:
            await asyncio.sleep(10 * LOOK_S)
            has = Holdings.of(pid)
        if beyond:
            self._has = has  # told once
        return [f"left over: {one}" for one in beyond]


class _Before(msgspec.Struct, frozen=True):
    """How the engine was before a blow."""

    status: InstanceStatus
    pids: dict[int, int]
    """Of the ranks that compute."""
    stats: FormationStats
    num_restarts: int

    @property
    def server(self) -> int:
        """The process that has started all ranks."""
        parent = parent_of(self.pids[0])
        if parent is None:
            raise ProcessLookupError("rank 0 is gone")
        return parent

    def others(self) -> list[int]:
        """Ranks that do not compute: they stand ready, or begin."""
        return [pid for pid in children_of(self.server) if pid not in self.pids.values()]


class _Strike:
    """A blow, from its preparation on."""

    def __init__(self, blow: Blow, before: _Before, stack: ExitStack) -> None:
        self._blow = blow
        self._before = before
        self._mailbox: Mailbox | None = None
        if blow.fault is not None:
            self._mailbox = stack.enter_context(Mailbox(before.pids[blow.rank]))
        self._is_done = False
        self._second: asyncio.Task[None] | None = None

    @property
    def has_happened(self) -> bool:
        return self._is_done or (self._mailbox is not None and bool(self._mailbox.injected()))

    @property
    def refusal(self) -> str | None:
        """Why it cannot happen, if the rank has said so."""
        return self._mailbox.refusal() if self._mailbox is not None else None

    async def begin(self) -> None:
        """Do it, or have the rank do it to itself when its moment comes."""
        blow, before = self._blow, self._before
        if self._mailbox is not None and blow.fault is not None:
            self._mailbox.send(blow.fault)
            return
        strikes: dict[str, Callable[[], Awaitable[None]]] = {
            "kill": partial(self._signal, before.pids[blow.rank], signal.SIGKILL),
            "stop": partial(self._signal, before.pids[blow.rank], signal.SIGSTOP),
            "kill-engine": partial(self._signal, before.status.pid, signal.SIGKILL),
            "kill-lines": partial(self._signal, before.server, signal.SIGKILL),
            "kill-standby": self._kill_other,
            "kill-switch": self._kill_and_again,
        }
        await strikes[blow.kind]()

    async def end(self) -> None:
        """Wait for what it does by itself."""
        if self._second is not None:
            await self._second

    async def _signal(self, pid: int, number: int) -> None:
        os.kill(pid, number)
        self._is_done = True

    async def _kill_other(self) -> None:
        others = self._before.others()
        await self._signal(others[self._blow.rank % len(others)], signal.SIGKILL)

    async def _kill_and_again(self) -> None:
        known = {*self._before.pids.values()}
        server = self._before.server
        if not self._before.others():  # those that come are meant, and not those that stand ready
            known |= set(children_of(server))
        await self._signal(self._before.pids[self._blow.rank], signal.SIGKILL)
        self._second = asyncio.create_task(self._kill_next(server, known))

    async def _kill_next(self, server: int, known: set[int]) -> None:
        """One of those that take over, at any moment of that."""
        expires_at = time.monotonic() + TOLD_S
        while time.monotonic() < expires_at:
            if found := sorted({*children_of(server)} - known):
                await asyncio.sleep(SWITCH_S * self._blow.collective / 1000)
                with suppress(ProcessLookupError):
                    os.kill(found[self._blow.rank % len(found)], signal.SIGKILL)
                return
            await asyncio.sleep(LOOK_S / 10)


async def _until(condition: Callable[[], bool], within_s: float, complaint: str) -> None:
    expires_at = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > expires_at:
            raise _Violation(f"{complaint} after {within_s:.0f} s")
        await asyncio.sleep(LOOK_S)


def _more(now: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: count - before.get(name, 0) for name, count in now.items()}
