"""The number of replicas, as an operator sees and changes it: one resize at a time, in the background."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from phalanx.engine.engine import DRAIN_TIMEOUT_S, ReplicaState, Strength
from phalanx.errors import RequestError, ResizeRefusedError, ResizeUnderWayError
from phalanx.server.api_error import ApiError
from phalanx.server.service import Service

Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Number = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Name = Annotated[str, Meta(min_length=1)]
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
    """`POST /drain`: one replica less, this one; or no rank on this node of the cluster any more."""

    replica: Number | UnsetType = UNSET
    node: Name | UnsetType = UNSET
    undo: bool | UnsetType = UNSET
    """Of a node: let ranks come there again."""
    drain_timeout_s: Seconds = DRAIN_TIMEOUT_S


class ResizeReport(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A resize that is under way, or the last one."""

    id: int
    size_before: int
    data_parallel_size: int
    """That was asked for. Of a node that is drained: as many as before, and when it has ended as many as there are."""
    node: str | None = None
    """That is drained."""
    tensor_parallel_size_before: int
    tensor_parallel_size: int
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
    strength: Strength
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
            raise RequestError("data_parallel_size", None, "give data_parallel_size or tensor_parallel_size")
        report = self._new_report()
        if asked.data_parallel_size is not UNSET:
            report.data_parallel_size = asked.data_parallel_size
        if asked.tensor_parallel_size is not UNSET:
            report.tensor_parallel_size = asked.tensor_parallel_size
        resizing = self._service.engine.begin_resize(
            None if asked.data_parallel_size is UNSET else asked.data_parallel_size,
            tensor_parallel_size=None if asked.tensor_parallel_size is UNSET else asked.tensor_parallel_size,
            leaving=asked.leaving,
            drain_timeout_s=asked.drain_timeout_s,
        )
        return await self._begin(resizing, report)

    async def drain(self, asked: DrainRequest) -> ScaleReport:
        """As `begin`, to one replica less, or to as many as there is room for without a node."""
        if (asked.node is UNSET) == (asked.replica is UNSET):
            raise RequestError("replica", None, "give either replica or node")
        if asked.node is not UNSET:
            return await self._drain_node(asked.node, asked)
        if asked.undo is True:
            raise RequestError("undo", True, "only with a node: a replica comes back by a resize")
        assert asked.replica is not UNSET
        size = self._size() - 1
        if size < 1:
            raise ApiError(400, "the last replica cannot leave: stop the server instead", param="replica")
        return await self.begin(
            ScaleRequest(data_parallel_size=size, leaving=[asked.replica], drain_timeout_s=asked.drain_timeout_s)
        )

    async def _drain_node(self, node: str, asked: DrainRequest) -> ScaleReport:
        engine = self._service.engine
        if asked.undo is True:
            with _conflicts_told():
                await engine.undo_drain(node)
            return self.report()
        report = self._new_report()
        report.node = node
        return await self._begin(engine.begin_drain(node, drain_timeout_s=asked.drain_timeout_s), report)

    def _new_report(self) -> ResizeReport:
        """Of a resize that changes nothing."""
        size, tensor_parallel_size = self._size(), self._tensor_parallel_size()
        return ResizeReport(
            id=self._num_resizes + 1,
            size_before=size,
            data_parallel_size=size,
            tensor_parallel_size_before=tensor_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            state="running",
            took_s=0.0,
        )

    async def _begin(self, begin: Awaitable[asyncio.Task[None]], report: ResizeReport) -> ScaleReport:
        began_at = time.monotonic()
        with _conflicts_told():
            resizing = await begin
        self._num_resizes += 1
        report.id = self._num_resizes
        self._last, self._began_at, self._resizing = report, began_at, resizing
        self._following = asyncio.create_task(self._follow(resizing, report))
        return self.report()

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
            strength=self._service.engine.strength,
            resize=self._last,
        )

    async def _follow(self, resizing: asyncio.Task[None], report: ResizeReport) -> None:
        await asyncio.wait((resizing,))
        state: Literal["done", "failed", "cancelled"] = "cancelled" if resizing.cancelled() else "done"
        if not resizing.cancelled() and (error := resizing.exception()) is not None:
            state, report.error = "failed", str(error)
        report.state, report.took_s = state, self._taken_s()
        if report.node is not None:
            report.data_parallel_size = self._size()
        self._service.metrics.note_resize(state, report.took_s)
        log.log(
            logging.INFO if state == "done" else logging.WARNING,
            "%s from %d to %d replicas of TP %d, before %d: %s after %.1f s%s",
            "resize" if report.node is None else f"node {report.node} drained,",
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


@contextmanager
def _conflicts_told() -> Iterator[None]:
    """What something else is in the way of is 409, and not 400."""
    try:
        yield
    except ResizeUnderWayError as error:
        raise ApiError(409, str(error), code="resize_under_way") from None
    except ResizeRefusedError as error:
        raise ApiError(409, str(error), code="not_now") from None
