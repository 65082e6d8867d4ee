"""The number of replicas, as an operator sees and changes it: one resize at a time, in the background."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from phalanx.engine.engine import DRAIN_TIMEOUT_S, ReplicaState
from phalanx.errors import RequestError, ResizeRefusedError, ResizeUnderWayError
from phalanx.server.api_error import ApiError
from phalanx.server.service import Service

Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Number = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e6)]

log = logging.getLogger(__name__)


class ScaleRequest(msgspec.Struct, kw_only=True):
    """`POST /scale`: what is left out stays as it is."""

    data_parallel_size: Size | UnsetType = UNSET
    tensor_parallel_size: Size | UnsetType = UNSET
    """Ranks that share every layer: of a single replica, or of all in lockstep."""
    leaving: list[Number] = []
    """Replicas that are to leave before any others."""
    drain_timeout_s: Seconds = DRAIN_TIMEOUT_S


class DrainRequest(msgspec.Struct, kw_only=True):
    """`POST /drain`: one replica less, this one."""

    replica: Number
    drain_timeout_s: Seconds = DRAIN_TIMEOUT_S


class ResizeReport(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A resize that is under way, or the last one."""

    id: int
    size_before: int
    data_parallel_size: int
    """That was asked for."""
    tensor_parallel_size_before: int = 1
    tensor_parallel_size: int = 1
    state: Literal["running", "done", "failed", "cancelled"]
    error: str | None = None
    """Why it has failed: there are as many replicas as before."""
    took_s: float
    """So far, while it is running."""


class ScaleReport(msgspec.Struct, kw_only=True):
    """`GET /scale`"""

    data_parallel_size: int
    """Replicas that serve, or will again: one that died is replaced."""
    tensor_parallel_size: int = 1
    """Ranks that share every layer of a replica, in each stage."""
    replicas: tuple[ReplicaState, ...]
    resize: ResizeReport | None


class Scaling:
    """Begins resizes of one service's engine, follows them, and cancels them."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._num_resizes = 0
        self._last: ResizeReport | None = None
        self._resizing: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None  # the loop itself holds tasks weakly
        self._began_at = 0.0

    async def begin(self, asked: ScaleRequest) -> ScaleReport:
        """Raises ApiError 409 if something else has to end first, such as another one, and what Engine.begin_resize
        does for what cannot be.
        """
        if asked.data_parallel_size is UNSET and asked.tensor_parallel_size is UNSET:
            raise RequestError("data_parallel_size", None, "it, or tensor_parallel_size, says what is to change")
        before, began_at = (self._size(), self._tensor_parallel_size()), time.monotonic()
        try:
            resizing = await self._service.engine.begin_resize(
                None if asked.data_parallel_size is UNSET else asked.data_parallel_size,
                tensor_parallel_size=None if asked.tensor_parallel_size is UNSET else asked.tensor_parallel_size,
                leaving=asked.leaving,
                drain_timeout_s=asked.drain_timeout_s,
            )
        except ResizeUnderWayError as error:
            raise ApiError(409, str(error), code="resize_under_way") from None
        except ResizeRefusedError as error:
            raise ApiError(409, str(error), code="not_now") from None
        self._num_resizes += 1
        self._last = ResizeReport(
            id=self._num_resizes,
            size_before=before[0],
            data_parallel_size=before[0] if asked.data_parallel_size is UNSET else asked.data_parallel_size,
            tensor_parallel_size_before=before[1],
            tensor_parallel_size=before[1] if asked.tensor_parallel_size is UNSET else asked.tensor_parallel_size,
            state="running",
            took_s=0.0,
        )
        self._began_at = began_at
        self._resizing = resizing
        self._following = asyncio.create_task(self._follow(resizing, self._last))
        return self.report()

    async def drain(self, asked: DrainRequest) -> ScaleReport:
        """As `begin`, to one replica less."""
        size = self._size() - 1
        if size < 1:
            raise ApiError(400, "the last replica cannot leave: stop the server instead", param="replica")
        return await self.begin(
            ScaleRequest(data_parallel_size=size, leaving=[asked.replica], drain_timeout_s=asked.drain_timeout_s)
        )

    def cancel(self) -> ScaleReport:
        """Have the resize undone that is under way. Raises ApiError 409 if none is."""
        if self._resizing is None or self._resizing.done():
            raise ApiError(409, "no resize is under way", code="no_resize")
        self._resizing.cancel()
        return self.report()

    def report(self) -> ScaleReport:
        if self._last is not None and self._last.state == "running":
            self._last.took_s = self._taken_s()
        return ScaleReport(
            data_parallel_size=self._size(),
            tensor_parallel_size=self._tensor_parallel_size(),
            replicas=tuple(self._service.engine.replicas()),
            resize=self._last,
        )

    async def _follow(self, resizing: asyncio.Task[None], report: ResizeReport) -> None:
        await asyncio.wait((resizing,))
        state: Literal["done", "failed", "cancelled"] = "cancelled" if resizing.cancelled() else "done"
        if not resizing.cancelled() and (error := resizing.exception()) is not None:
            state, report.error = "failed", str(error)
        report.state, report.took_s = state, self._taken_s()
        self._service.metrics.note_resize(state, report.took_s)
        log.log(
            logging.INFO if state == "done" else logging.WARNING,
            "resize from %d to %d replicas of TP %d, before %d: %s after %.1f s%s",
            report.size_before,
            report.data_parallel_size,
            report.tensor_parallel_size,
            report.tensor_parallel_size_before,
            state,
            report.took_s,
            f": {report.error}" if report.error else "",
        )

    def _taken_s(self) -> float:
        return round(time.monotonic() - self._began_at, 3)

    def _size(self) -> int:
        return sum(one.state in ("serving", "dead") for one in self._service.engine.replicas())

    def _tensor_parallel_size(self) -> int:
        return self._service.engine.info.tensor_parallel_size
