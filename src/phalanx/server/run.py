"""The server's life: listen, start the engine, serve, and stop in good order."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import uvicorn

from phalanx.config import Config, ServerConfig
from phalanx.engine.engine import Engine
from phalanx.engine.fleet import start_engine as start
from phalanx.engine.incarnation import OnProgress
from phalanx.errors import EngineDeadError, RequestError
from phalanx.ledger.instance import show_server
from phalanx.protocol.client import EngineReady, StartProgress
from phalanx.server.api_error import ApiError, engine_dead
from phalanx.server.api_keys import ENVIRONMENT_VARIABLE, ApiKeys
from phalanx.server.app import create_app
from phalanx.server.doorway import Doorway
from phalanx.server.listen import is_loopback, listen, url_of
from phalanx.server.service import Service
from phalanx.server.stop_signals import StopSignals

logger = logging.getLogger(__name__)

DEATH_POLL_S = 0.1
ACCEPTED_AT_A_TURN = 128
"""asyncio takes an application's backlog for that, too; the queue of those that wait is as long as may be."""

LAST_ANSWERS_S = 5.0
"""For answers that only have to be written: errors to requests that were cut off."""

T = TypeVar("T")


class Served(NamedTuple):
    """What there is to say when the server is ready."""

    engine: EngineReady
    model_name: str
    url: str
    needs_key: bool
    can_chat: bool


OnReady = Callable[[Served], None]
StartEngine = Callable[[Config, OnProgress], Awaitable[Engine]]


def run_server(
    config: Config,
    server: ServerConfig,
    *,
    on_progress: OnProgress,
    on_ready: OnReady,
    start_engine: StartEngine = start,
) -> None:
    """Serve until a signal. Blocks; must run in the main thread. A stop during the start ends the start.

    Raises ConfigError before anything is loaded; what `start_engine` raises; EngineDeadError if the engine is
    dead for good, after the requests in flight have their errors.
    """
    keys = ApiKeys.load(server)
    _raise_file_limit()
    with listen(server.host, server.port) as listener, show_server(url_of(listener), served_name(config)):
        if not keys and not is_loopback(listener):
            logger.warning(
                "everybody who can reach %s may use this server: set --api-key-file or %s",
                server.host,
                ENVIRONMENT_VARIABLE,
            )
        lifetime = _Lifetime(config, server, keys, listener)
        asyncio.run(lifetime.run(on_progress, on_ready, start_engine))


def _raise_file_limit() -> None:
    """Every client takes a descriptor, and many systems start processes with a low limit that they may raise."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def served_name(config: Config) -> str:
    """The model's name for clients: as set, or the last part of its path, or its hub name."""
    model = config.model
    if model.served_model_name is not None:
        return model.served_model_name
    path = Path(model.model)
    return path.name.removesuffix(".gguf") if path.exists() else model.model


class _Lifetime:
    def __init__(self, config: Config, server: ServerConfig, keys: ApiKeys, listener: socket.socket) -> None:
        self._config = config
        self._server = server
        self._keys = keys
        self._listener = listener
        self._doorway = Doorway()

    async def run(self, on_progress: OnProgress, on_ready: OnReady, start_engine: StartEngine) -> None:
        def note(progress: StartProgress) -> None:
            self._doorway.phase = progress.phase
            on_progress(progress)

        stop = StopSignals()
        http = _HttpServer(self._doorway)
        with stop.installed():
            serving = asyncio.create_task(http.serve(sockets=[self._listener]))
            try:
                engine = await _unless(stop.first, start_engine(self._config, note))
                if engine is not None:
                    await self._serve(engine, stop, on_ready)
            finally:
                http.should_exit = True
                http.force_exit = stop.second.is_set()
                await serving

    async def _serve(self, engine: Engine, stop: StopSignals, on_ready: OnReady) -> None:
        service = Service(engine, served_name(self._config))
        self._doorway.app = create_app(service, self._keys)
        try:
            on_ready(
                Served(engine.info, service.model_name, url_of(self._listener), bool(self._keys), _can_chat(engine))
            )
            await _unless(stop.first, _death(engine))
            if engine.dead is not None:
                service.cut(engine_dead(engine.dead))
                await service.drain(LAST_ANSWERS_S)
                raise EngineDeadError(engine.dead)
            await self._drain(service, stop)
        finally:
            await _unless(stop.second, engine.close(grace_s=0.0))

    async def _drain(self, service: Service, stop: StopSignals) -> None:
        service.close()
        phases = {one.maintenance.phase for one in service.engine.conditions() if one.maintenance is not None}
        is_asleep = bool(service.engine.asleep) and phases <= {"asleep"}  # one that wakes is worth the wait
        if service.num_in_flight and not is_asleep:
            logger.info(
                "stopping: requests in flight (%d) may finish within %g s; a second signal ends them now",
                service.num_in_flight,
                self._server.shutdown_timeout_s,
            )
            await _unless(stop.second, service.drain(self._server.shutdown_timeout_s))
        if service.num_in_flight:
            which = "wait for an engine that is asleep" if is_asleep else "did not finish in time"
            logger.warning("requests that %s and are cancelled: %d", which, service.num_in_flight)
            service.cut(ApiError(503, "the server has shut down before the request was finished", code="shutting_down"))
            await service.drain(LAST_ANSWERS_S)


class _HttpServer(uvicorn.Server):
    def __init__(self, app: Doorway) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=ACCEPTED_AT_A_TURN,
                timeout_keep_alive=75,  # longer than clients' and proxies' pools keep a connection
                timeout_graceful_shutdown=2,  # requests have ended by then; this is for connections
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():  # whose queue the backlog has cut
            listener.listen(socket.SOMAXCONN)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `StopSignals`."""
        yield


def _can_chat(engine: Engine) -> bool:
    try:
        engine.tokenizer.apply_chat([{"role": "user", "content": "What is gravity?"}])
    except RequestError:  # no template, or one that refuses this
        return False
    return True


async def _death(engine: Engine) -> None:
    while engine.dead is None:
        await asyncio.sleep(DEATH_POLL_S)


async def _unless(event: asyncio.Event, work: Awaitable[T]) -> T | None:
    """The result of `work`; None if `event` happens first, and then `work` is cancelled and has ended."""
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        waiting.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)
