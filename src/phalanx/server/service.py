"""What all endpoints share, and the one place that decides whether requests are taken, finished or cut off."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from phalanx.engine.engine import Engine
from phalanx.server.api_error import ApiError, engine_dead
from phalanx.server.metrics import Metrics


class Service:
    """One served model. Belongs to one event loop."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self.engine = engine
        self.model_name = model_name
        self.metrics = Metrics(engine)
        self.created = int(time.time())
        self.cut_off: asyncio.Future[ApiError] = asyncio.get_running_loop().create_future()
        """Resolves when requests in flight must end at once, to the error that they get."""
        self.num_waiting = 0
        """Requests that have not reached the engine, because it is being started again or asleep."""
        self._num_in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_closing = False

    def refusal(self) -> ApiError | None:
        """Why no new request is taken now; None if one is."""
        if self.engine.dead is not None:
            return engine_dead(self.engine.dead)
        if self._is_closing:
            return ApiError(503, "the server is shutting down", code="shutting_down")
        return None

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Around a request, from acceptance to the last byte of its answer. Raises ApiError if none is accepted."""
        refusal = self.refusal()
        if refusal is not None:
            raise refusal
        self._num_in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_in_flight -= 1
            if self._num_in_flight == 0:
                self._idle.set()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the time in which a request in flight waits for an engine that is started again or asleep."""
        self.num_waiting += 1
        try:
            yield
        finally:
            self.num_waiting -= 1

    @property
    def num_in_flight(self) -> int:
        return self._num_in_flight

    def close(self) -> None:
        """Take no new requests; those in flight go on."""
        self._is_closing = True

    def cut(self, error: ApiError) -> None:
        """End all requests in flight with `error`. The first call counts."""
        self.close()
        if not self.cut_off.done():
            self.cut_off.set_result(error)

    async def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight. False if something still is after `timeout_s`."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 if `name` is not the served model. A request need not name one."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404, f"model: {name!r} is not served; {self.model_name!r} is", param="model", code="model_not_found"
            )
