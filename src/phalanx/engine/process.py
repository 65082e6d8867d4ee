"""The engine's process: checkpoint, executor, brain, and one stream to the client that it works for."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

import msgspec

from phalanx.engine.admission import refusal
from phalanx.engine.core import EngineCore, start_core
from phalanx.engine.maintenance import TURN_S
from phalanx.engine.resizing import EngineResizing, engine_ready
from phalanx.errors import (
    CheckpointError,
    DeadlineError,
    NotNowError,
    PeerDiedError,
    PhalanxError,
    PlacementError,
    RequestError,
    UserError,
    WorkerError,
)
from phalanx.executor.log_stream import log_to_stderr
from phalanx.executor.pending import Pending
from phalanx.executor.shared_fate import die_with_parent
from phalanx.ledger.stacks import offer_stacks
from phalanx.memory.shared_weights import decode_shared, encode_shared
from phalanx.models.checkpoint import resolve
from phalanx.protocol.client import (
    AvoidNodes,
    Begin,
    Cancel,
    CancelResize,
    ClientMessage,
    EngineFailed,
    EngineMessage,
    EngineStats,
    Maintained,
    MaintenanceOrder,
    Resize,
    ResizeEnded,
    ShareWeights,
    StartProgress,
    Submit,
    WeightsShared,
)
from phalanx.protocol.columns import WrongSetting
from phalanx.protocol.worker import Ping, ReplyBody
from phalanx.transport.liveness import Party
from phalanx.transport.stream import Stream
from phalanx.worker.error_text import sendable

CONFIG_DEADLINE_S = 10.0
SEND_DEADLINE_S = 30.0
LAST_WORDS_S = 1.0
STATS_INTERVAL_S = 0.2
SIGN_OF_LIFE_S = 1.0
"""Stats are sent this often also when they have not changed: the client takes silence for the loop's end."""
IDLE_CHECK_S = 0.5
"""How often an idle engine looks after its workers."""
HEARTBEAT_DEADLINE_S = 10.0
HEALING_LOOK_S = 0.005
"""How often the client is listened to while other ranks come."""
RESIZE_LOOK_S = 0.02
"""How often an idle engine looks whether ranks of another size are ready."""

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2

log = logging.getLogger("phalanx.engine")

_encode = msgspec.msgpack.Encoder().encode
_decode_begin: Callable[[bytes], Begin] = msgspec.msgpack.Decoder(Begin).decode
_decode: Callable[[bytes], ClientMessage] = msgspec.msgpack.Decoder(ClientMessage).decode


class ClientGone(Exception):
    """The client closed its end, or died."""


class ClientLink:
    """The engine's end of the stream to its client."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def receive_begin(self) -> Begin:
        """The first frame. Raises DeadlineError, ClientGone."""
        frames: list[bytes] = []
        expires_at = time.monotonic() + CONFIG_DEADLINE_S
        while not frames:
            if not self._stream.wait(expires_at - time.monotonic()):
                raise DeadlineError("the configuration", "the server", CONFIG_DEADLINE_S)
            frames = self._poll()
        (frame,) = frames  # a client submits nothing before it knows that the engine is ready
        return _decode_begin(frame)

    def receive(self, timeout_s: float) -> list[ClientMessage]:
        """What has come, in order; waits up to `timeout_s` for anything to come. Raises ClientGone."""
        if timeout_s > 0 and not self._stream.wait(timeout_s):
            return []
        return [_decode(frame) for frame in self._poll()]

    def send(self, message: EngineMessage) -> None:
        """Raises ClientGone, and DeadlineError if the client does not read."""
        try:
            self._stream.send(_encode(message), deadline_s=SEND_DEADLINE_S)
        except PeerDiedError as error:
            raise ClientGone from error

    def send_last(self, message: EngineMessage) -> None:
        """Send, and wait a little for the client to close its end. Raises DeadlineError if it does not read at all.

        An end that is closed over unread bytes resets the connection; asyncio then drops what it has not handed out.
        """
        expires_at = time.monotonic() + LAST_WORDS_S
        with suppress(ClientGone):
            self.send(message)
            while (remaining_s := expires_at - time.monotonic()) > 0 and self._stream.wait(remaining_s):
                self._poll()

    def _poll(self) -> list[bytes]:
        try:
            return self._stream.poll()
        except PeerDiedError as error:
            raise ClientGone from error


class EngineLoop:
    """Feeds the brain with what the client sends, and the client with what the brain makes. Sleeps when idle.

    The client hears of it at least every SIGN_OF_LIFE_S, but for the time of one step. No thread of its own tells that
    it lives: that would say nothing of this loop.
    """

    def __init__(self, link: ClientLink, core: EngineCore) -> None:
        """The core calls `send_stats` before each step."""
        self._link = link
        self._core = core
        self._brain, self._formation, self._maintenance = core.brain, core.formation, core.maintenance
        self._resizing = EngineResizing(self._formation, self._brain, self._tell)
        self._heartbeat: Pending[list[ReplyBody]] | None = None
        self._avoided: tuple[str, ...] = ()
        self._is_healing = False
        """Whether another thread does."""
        self._sent_stats: EngineStats | None = None
        self._stats_due_at = 0.0
        self._sign_due_at = 0.0

    def run(self) -> None:
        """Return at Shutdown. Raises ClientGone, and whatever ends a step and is not healed."""
        while self._take_messages(self._patience_s()):
            try:
                self._turn()
            except PhalanxError as error:
                if not self._formation.heals(error):
                    raise
                if not self._heal(error):
                    return
            self._resizing.follow()
            self.send_stats()

    def _patience_s(self) -> float:
        """How long to wait for messages, at most."""
        if self._brain.has_work():
            return 0.0
        if self._maintenance.is_busy:
            return TURN_S
        return RESIZE_LOOK_S if self._resizing.is_under_way else IDLE_CHECK_S

    def _turn(self) -> None:
        self._core.succession.look()
        self._tell_maintained(self._maintenance.turn())
        if not self._brain.has_work():
            self._check_workers()
            return
        if (batch := self._core.step()) is not None:
            self._link.send(batch)

    def _tell_maintained(self, outcome: Maintained | None) -> None:
        if outcome is not None:
            self.send_stats(at_once=True)  # who hears of the outcome finds the state that it has led to
            self._link.send(outcome)

    def _heal(self, error: PhalanxError) -> bool:
        """Have other ranks go on from what is committed. False after Shutdown. Raises what keeps them from it."""
        healing = self._formation.begin_healing(error)
        self._is_healing = True
        self._heartbeat = None
        self._stats_due_at = 0.0
        while not healing.wait(HEALING_LOOK_S):
            self.send_stats()
            self._resizing.follow()  # one that was under way is undone
            if not self._take_messages(0.0):
                return False
        healed = healing.result()
        self._is_healing = False
        self._core.succession.go_on(healed, error, meanwhile=self.send_stats)
        self._tell_maintained(self._maintenance.ranks_replaced())
        self._stats_due_at = self._sign_due_at = 0.0
        return True

    def _take_messages(self, timeout_s: float) -> bool:
        """False after Shutdown."""
        for message in self._link.receive(timeout_s):
            if isinstance(message, Submit):
                self._submit(message)
            elif isinstance(message, Cancel):
                self._brain.cancel(message.request_ids)
            elif isinstance(message, MaintenanceOrder):
                self._begin_maintenance(message)
            elif isinstance(message, Resize):
                self._begin_resize(message)
            elif isinstance(message, CancelResize):
                self._resizing.cancel(message.number)
            elif isinstance(message, AvoidNodes):
                self._formation.avoid(message.nodes)
                self._avoided = message.nodes
            elif isinstance(message, ShareWeights):
                self._share_weights(message.number)
            else:
                return False
        return True

    def _share_weights(self, number: int) -> None:
        """Only while they are whole and stay what they are. Who gets none reads the checkpoint."""
        shared = None
        if self._maintenance.is_idle and not self._is_healing:
            try:
                shared = self._formation.share_weights()
            except CheckpointError as error:
                log.warning("weights are not shared: %s", error)
        self._link.send(WeightsShared(number, b"" if shared is None else encode_shared(shared)))

    def _begin_resize(self, asked: Resize) -> None:
        if self._maintenance.stats is None:
            self._resizing.begin(asked)
        else:
            reason = f"the engine is {self._maintenance.stats.phase}: ask again when that is over"
            self._tell(ResizeEnded(asked.number, "refused", reason))

    def _begin_maintenance(self, order: MaintenanceOrder) -> None:
        try:
            if self._resizing.is_under_way:
                raise NotNowError("a resize is under way: ask again when that is over")
            self._maintenance.begin(order)
        except UserError as error:
            self._link.send(Maintained(str(error), is_user_error=True, is_not_now=isinstance(error, NotNowError)))

    def _submit(self, request: Submit) -> None:
        try:
            self._brain.submit(request)
        except RequestError as error:
            self._link.send(refusal(request.request_id, error))

    def _check_workers(self) -> None:
        """Between requests nobody awaits a worker, so one that died or was stopped has to be looked for."""
        if self._heartbeat is not None and self._heartbeat.done():
            self._heartbeat = None
            self._formation.progressed()
        if self._heartbeat is None:
            self._heartbeat = self._formation.submit(Ping(), deadline_s=HEARTBEAT_DEADLINE_S)

    def _tell(self, message: EngineMessage) -> None:
        """Of a resize. When it is done, whoever was asked for a sign of life is gone."""
        if isinstance(message, ResizeEnded) and message.ending == "done":
            self._heartbeat = None
            self.send_stats(at_once=True)  # who hears of it finds where ranks are now
        self._link.send(message)

    def send_stats(self, *, at_once: bool = False) -> None:
        """If it is time to, or `at_once`. Raises as ClientLink.send."""
        now = time.monotonic()
        if now < self._stats_due_at and not at_once:
            return
        self._stats_due_at = now + STATS_INTERVAL_S
        stats = msgspec.structs.replace(
            self._brain.stats(),
            formation=self._formation.stats(),
            maintenance=self._maintenance.stats,
            nodes=self._formation.nodes,
            avoided=() if self._is_healing else self._avoided,
        )
        if stats != self._sent_stats or now >= self._sign_due_at:
            self._link.send(stats)
            self._sent_stats = stats
            self._sign_due_at = now + SIGN_OF_LIFE_S


def serve(link: ClientLink) -> int:
    """Be the engine until the client has enough of it; returns the process's exit code.

    The client hears of a failure before workers are ended, which may take seconds.
    """
    with ExitStack() as resources:
        try:
            _start(link, resources).run()
        except ClientGone:
            log.info("the server has gone")
        except UserError as error:
            failed = EngineFailed(sendable(str(error)), is_user_error=True, setting=WrongSetting.of(error))
            _tell(link, msgspec.structs.replace(failed, lacks_room=isinstance(error, PlacementError)))
            return EXIT_USER_ERROR
        except Exception as error:
            if isinstance(error, WorkerError):
                log.error("%s", error.traceback)
            if isinstance(error, PhalanxError):
                log.error("the engine cannot go on: %s", error)
                reason = str(error)
            else:
                log.exception("the engine cannot go on")
                reason = f"{type(error).__name__}: {error}"
            _tell(link, EngineFailed(sendable(reason), is_user_error=False))
            return EXIT_FAILURE
    return 0


def _start(link: ClientLink, resources: ExitStack) -> EngineLoop:
    begin = link.receive_begin()
    config = begin.config

    def on_progress(progress: StartProgress) -> None:
        # It is called from within the one rank, where a client that has gone would pass for that rank's failure. The
        # stream's other users find out as well, and a client that has gone kills this process anyway.
        with suppress(ClientGone):
            link.send(progress)

    def on_fetch(phase: str, done: int, total: int) -> None:
        on_progress(StartProgress(0, phase, done, total))

    checkpoint = resolve(config.model.model, revision=config.model.revision, progress=on_fetch)
    offered = decode_shared(begin.weights) if begin.weights else None
    core = start_core(config, checkpoint, on_progress, offered, before_step=lambda: loop.send_stats())
    resources.enter_context(core)
    loop: EngineLoop = EngineLoop(link, core)
    ready = engine_ready(config, core.formation.capacity)
    link.send(msgspec.structs.replace(ready, checkpoint=str(checkpoint.path)))
    return loop


def _tell(link: ClientLink, failure: EngineFailed) -> None:
    try:
        link.send_last(failure)
    except DeadlineError:
        log.warning("the server did not hear that %s", failure.reason)


def main() -> None:
    """Usage: python -m phalanx.engine.process DESCRIPTOR SERVER_PID"""
    descriptor, server_pid = map(int, sys.argv[1:])
    die_with_parent(server_pid)
    # Ctrl-C is the server's: it decides when the engine ends, and workers inherit this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    offer_stacks()
    log_to_stderr("%(levelname)s engine: %(message)s", level=logging.INFO)
    with Stream(descriptor, Party.of("the server", server_pid)) as stream:
        code = serve(ClientLink(stream))
    logging.shutdown()
    os._exit(code)  # everything is closed; with torch imported, the interpreter would tidy up for a second or more


if __name__ == "__main__":
    main()
