"""One life of the engine's process: it starts, is spoken with over one stream, and ends."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from phalanx.config import Config
from phalanx.engine.child import ENGINE_COMMAND, KILL_TIMEOUT_S, EngineChild
from phalanx.engine.condition import Condition, ProcessWatch
from phalanx.errors import FrameError, PeerDiedError, PhalanxError, PlacementError, StartError, UserError
from phalanx.executor.shared_fate import was_ended_from_outside
from phalanx.ledger.attach import SILENT_WATCHER_S, Attached, silent_s
from phalanx.ledger.board import Notice
from phalanx.ledger.instance import shown_by
from phalanx.ledger.report import VerdictReport
from phalanx.ledger.status import InstanceStatus
from phalanx.protocol.client import (
    Begin,
    ClientMessage,
    EngineFailed,
    EngineMessage,
    EngineReady,
    EngineStats,
    Maintained,
    ResizeBegun,
    ResizeEnded,
    Shutdown,
    StartProgress,
    TokenBatch,
    WeightsShared,
)
from phalanx.transport.liveness import Party, group_members
from phalanx.transport.stream import AsyncStream

OnProgress = Callable[[StartProgress], None]
ResizeNews = ResizeBegun | StartProgress | ResizeEnded
OnResize = Callable[[ResizeNews], None]

NAME = "the engine"
START_GRACE_S = 10.0
"""Beyond the start's own deadline: that the engine reports it says more than its silence."""
SHUTDOWN_TIMEOUT_S = 10.0
LAST_WORDS_S = 1.0
"""Between the end of the engine's stream and the end of its process."""
LISTEN_S = 0.25
RANKS_POLL_S = 0.02
SILENCE_GRACE_S = 15.0
"""Beyond the time for a step, in which the engine is silent in good order. It is more than any other wait of its loop
takes (HEARTBEAT_DEADLINE_S of process.py is the longest): that it tells which rank it waits for says more than silence.
"""

log = logging.getLogger("phalanx.engine")

_encode = msgspec.msgpack.Encoder().encode
_decode: Callable[[bytes], EngineMessage] = msgspec.msgpack.Decoder(EngineMessage).decode


class End(NamedTuple):
    """Why an engine has ended."""

    reason: str
    verdict: VerdictReport | None
    """What the ledger, or the look of its process, had to say of it."""
    is_user_error: bool = False
    is_from_outside: bool = False
    """Whether it was nothing that the engine did, as far as anybody can tell: its process was killed or stopped."""


class Incarnation:
    """The process from its start to its end, whichever way it comes.

    For one event loop, in a thread that lives as long as the engine: the kernel kills the engine with that thread. An
    engine that is silent for longer than a step may take, and SILENCE_GRACE_S, is killed.
    """

    def __init__(
        self,
        child: EngineChild,
        stream: AsyncStream,
        frames: AsyncIterator[bytes],
        info: EngineReady,
        silence_timeout_s: float,
    ) -> None:
        """Use `start`."""
        self.info = info
        self.pid = child.pid
        self.stats: EngineStats | None = None
        self.ended: End | None = None
        self._child = child
        self._stream = stream
        self._frames = frames
        self._silence_timeout_s = silence_timeout_s
        self._silent_s = 0.0
        self._process = ProcessWatch(child.pid, silence_timeout_s - SILENCE_GRACE_S)
        self._attached = _attach(child.pid)
        self._counts_before: collections.Counter[str] = collections.Counter()
        """Verdicts on ranks that others have come after."""
        self._num_watcher_restarts_before = 0
        self._stepped_at: float | None = None
        self._outbox: asyncio.Queue[ClientMessage] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._on_batch: Callable[[TokenBatch], None] = lambda _: None
        self._on_maintained: Callable[[Maintained], None] = lambda _: None
        self._on_end: Callable[[End], None] = lambda _: None
        self._on_resize: OnResize = lambda _: None
        self._on_shared: Callable[[WeightsShared], None] = lambda _: None

    @classmethod
    async def start(
        cls,
        config: Config,
        on_progress: OnProgress | None = None,
        weights: bytes = b"",
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        environment: Mapping[str, str] | None = None,
    ) -> Incarnation:
        """Start the process and wait until it serves. Nothing that it then says is read before `attend`.

        `weights` are what another one on this host shares (protocol.Begin), if one does.

        Raises UserError for the user's mistakes and StartError for the rest, also when nothing is heard for
        `start_timeout_s`. If it raises or is cancelled, no process is left.
        """
        child = EngineChild.spawn(command, environment)
        async with contextlib.AsyncExitStack() as on_failure:
            on_failure.callback(child.kill)
            stream = await AsyncStream.open(child.descriptor, Party(NAME, child.pid, start_time=0))
            on_failure.push_async_callback(stream.close)
            frames = aiter(stream)
            with contextlib.suppress(PeerDiedError):  # it ended at once: the end of `frames` will tell
                await stream.send(_encode(Begin(config, weights)))
            try:
                info = await _await_ready(frames, child, on_progress, config.executor.start_timeout_s + START_GRACE_S)
            except PhalanxError:
                await stream.close()  # tells the engine that its last words were heard
                await child.wait(LAST_WORDS_S)  # it is ending its workers
                raise
            # A turn of the engine may wait for an exchange of experts, and then for the step after it.
            num_waits = 2 if config.parallel.enable_eplb else 1
            silence_s = num_waits * config.executor.step_timeout_s + SILENCE_GRACE_S
            incarnation = cls(child, stream, frames, info, silence_s)
            on_failure.pop_all()
            return incarnation

    def attend(
        self,
        on_batch: Callable[[TokenBatch], None],
        on_maintained: Callable[[Maintained], None],
        on_end: Callable[[End], None],
        on_resize: OnResize,
        on_shared: Callable[[WeightsShared], None],
    ) -> None:
        """Begin to read. `on_end` is called once, after everything else; none may raise."""
        self._on_batch, self._on_maintained = on_batch, on_maintained
        self._on_end, self._on_resize, self._on_shared = on_end, on_resize, on_shared
        self._tasks = [asyncio.create_task(work) for work in (self._read(), self._write(), self._listen())]

    def send(self, message: ClientMessage) -> None:
        """Messages arrive in the order of the calls, unless the engine ends before."""
        self._outbox.put_nowait(message)

    @property
    def condition(self) -> Condition:
        """How the engine is, also when its process is stopped or hangs. Takes microseconds."""
        notice = self._attached.notice() if self._attached is not None else Notice()
        silent = silent_s(notice, time.monotonic_ns())
        is_watched = silent is not None and silent < SILENT_WATCHER_S and self.ended is None
        own = self._process.counts
        return Condition(
            pid=self.pid,
            dead=None if self.ended is None else self.ended.reason,
            trouble=(self.ended.verdict if self.ended is not None else None) or self._trouble(),
            since_step_s=None if self._stepped_at is None else time.monotonic() - self._stepped_at,
            num_watched=notice.num_ranks if is_watched else 0,
            num_watcher_restarts=self._num_watcher_restarts_before + notice.num_restarts,
            verdicts=dict(self._counts_before + collections.Counter(notice.counts) + collections.Counter(own)),
            formation=self.stats.formation if self.stats is not None else None,
            maintenance=self.stats.maintenance if self.stats is not None else None,
        )

    def statuses(self) -> Sequence[InstanceStatus]:
        """How each rank is, or was at the end, of those on this host. Takes milliseconds; for any thread."""
        return () if self._attached is None else (self._attached.status(self._trouble()),)

    async def end(self) -> None:
        """Have the process end, by force if it does not do so by itself, and if nobody attends to it.

        Takes SHUTDOWN_TIMEOUT_S at most, and a moment. May be called more than once.
        """
        try:
            if self.ended is not None:
                await self._stream.close()  # whatever it still does, nobody listens: it ends its workers, and itself
            else:
                self.send(Shutdown())
            if self._tasks:
                await self._child.wait(SHUTDOWN_TIMEOUT_S)
        finally:
            self._child.kill()
            self._end(f"{NAME} was shut down")
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)
            await self._stream.close()

    async def until_ranks_are_gone(self) -> None:
        """Wait for the ranks on this host, which the kernel ends with the engine: until then they hold memory.

        Those that it has not shown, as they stand ready or have just begun, are of its process group, as all its own.

        After KILL_TIMEOUT_S it says so in the log and waits no longer.
        """
        expires_at = time.monotonic() + KILL_TIMEOUT_S
        while left := (self._attached.ranks_left() if self._attached is not None else []) or group_members(self.pid):
            if time.monotonic() > expires_at:
                log.warning("ranks or pids that have not ended %g s after their engine: %s", KILL_TIMEOUT_S, left)
                return
            await asyncio.sleep(RANKS_POLL_S)

    def forget(self) -> None:
        """Let go of what is still known of it. May be called more than once."""
        if self._attached is not None:
            self._attached.close()

    async def _read(self) -> None:
        try:
            async for frame in self._frames:
                self._take(_decode(frame))
                if self.ended is not None:
                    await self._stream.close()  # tells the engine that its last words were heard
        except PeerDiedError:
            await self._child.wait(LAST_WORDS_S)
            how = self._child.how_it_ended()
            self._end(f"{NAME}'s process (pid {self.pid}) ended: {how}", is_from_outside=was_ended_from_outside(how))
        finally:
            # Whatever else ends this task, nobody may go on waiting for what it would have read.
            self._end(f"{NAME}'s messages cannot be read any more")

    async def _listen(self) -> None:
        """End it when it is silent: its process is stopped, or its loop hangs."""
        while self.ended is None:
            began_at = time.monotonic()
            await asyncio.sleep(LISTEN_S)
            # Whatever kept this process itself from running was no silence of the engine: what came is yet to be read.
            self._silent_s += min(time.monotonic() - began_at, 2 * LISTEN_S)
            self._process.look(self._silent_s)
            if self._silent_s > self._silence_timeout_s and self.ended is None:
                steps = (
                    f"after {self.stats.replicas[0].num_steps} steps"
                    if self.stats is not None
                    else "before its first step"
                )
                silence = f"was silent for {self._silent_s:.3g} s, {steps}"
                is_stopped = (trouble := self._process.trouble()) is not None and trouble.cause == "stopped"
                self._end(f"{NAME}'s process (pid {self.pid}) {silence}: it was killed", is_from_outside=is_stopped)
                self._child.begin_kill()

    async def _write(self) -> None:
        try:
            while True:
                await self._stream.send(_encode(await self._outbox.get()))
        except PeerDiedError:
            pass  # the reading task says so, with the reason
        except Exception as error:
            # Such as a frame beyond the stream's limit. Whatever comes after it would be waited for in vain.
            self._end(f"nothing can be sent to {NAME} any more: {error}")
            raise

    def _take(self, message: EngineMessage) -> None:
        self._silent_s = 0.0
        if self.ended is not None:
            return  # whoever was told of the end has given its requests to somebody else
        if isinstance(message, TokenBatch):
            self._stepped_at = time.monotonic()
            self._on_batch(message)
        elif isinstance(message, Maintained):
            self._on_maintained(message)
        elif isinstance(message, EngineStats):
            if self.stats is None or _num_steps(message) != _num_steps(self.stats):
                self._stepped_at = time.monotonic()
            self.stats = message
            if message.formation is not None:
                self._follow(message.formation.epoch)
        elif isinstance(message, ResizeBegun | StartProgress | ResizeEnded):
            self._on_resize(message)
        elif isinstance(message, WeightsShared):
            self._on_shared(message)
        elif isinstance(message, EngineFailed):
            self._end(message.reason, is_user_error=message.is_user_error)

    def _follow(self, epoch: int) -> None:
        """Other ranks go on, or these have not been seen yet: look at them from now on."""
        before = self._attached
        if before is not None and before.instance.epoch >= epoch:  # others may be shown before they are told of
            return
        found = _attach(self.pid)
        if found is None:  # it has just ended, or is about to show others
            return
        if before is not None and before.instance.epoch == found.instance.epoch:
            found.close()
            return
        self._attached = found
        if before is not None:
            last = before.notice()
            self._counts_before.update(last.counts)
            self._num_watcher_restarts_before += last.num_restarts
            before.close()

    def _end(self, reason: str, *, is_user_error: bool = False, is_from_outside: bool = False) -> None:
        if self.ended is None:
            self.ended = End(reason, self._trouble(), is_user_error, is_from_outside)
            self._on_end(self.ended)

    def _trouble(self) -> VerdictReport | None:
        """What keeps steps from progressing: a rank, says the ledger, or the engine's own process."""
        found = self._attached.standing(self._awaits_since_ns()) if self._attached is not None else None
        return found or self._process.trouble()

    def _awaits_since_ns(self) -> int | None:
        """When the last step was heard of, if requests run and wait for the next one."""
        is_busy = self.stats is not None and any(replica.num_running for replica in self.stats.replicas)
        return int(self._stepped_at * 1e9) if is_busy and self._stepped_at is not None else None


def _attach(pid: int) -> Attached | None:
    """To what the engine's process shows of itself; None if it shows nothing, or has just ended."""
    with contextlib.suppress(PeerDiedError, FrameError):
        for found in shown_by(pid):
            if found.instance is not None:
                return Attached(found.instance)
    return None


def _num_steps(stats: EngineStats) -> int:
    return max((replica.num_steps for replica in stats.replicas), default=0)


async def _await_ready(
    frames: AsyncIterator[bytes], child: EngineChild, on_progress: OnProgress | None, silence_s: float
) -> EngineReady:
    phase = "starting"
    while True:
        try:
            async with asyncio.timeout(silence_s):
                message = _decode(await anext(frames))
        except TimeoutError:
            raise StartError(NAME, phase, f"nothing was heard of it for {silence_s:.0f} s") from None
        except PeerDiedError:
            await child.wait(LAST_WORDS_S)
            raise StartError(NAME, phase, child.how_it_ended()) from None
        if isinstance(message, EngineReady):
            return message
        if isinstance(message, EngineFailed):
            raise _start_failure(message, phase)
        assert isinstance(message, StartProgress), message
        phase = message.phase
        if on_progress is not None:
            on_progress(message)


def _start_failure(message: EngineFailed, phase: str) -> PhalanxError:
    if message.lacks_room:
        complaint, _, table = message.reason.partition("\n")
        return PlacementError(complaint, table)
    if message.setting is not None:
        return message.setting.error()
    return UserError(message.reason) if message.is_user_error else StartError(NAME, phase, message.reason)
