"""Work that goes on only while somebody waits for its result."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from phalanx.errors import PhalanxError
from phalanx.server.service import Service

T = TypeVar("T")


class ClientGoneError(PhalanxError):
    """The client closed its connection: nobody is left to answer."""


async def attended(work: Coroutine[Any, Any, T], receive: Receive, service: Service) -> T:
    """The result of `work`. The request's body must have been read.

    Raises what `work` raises; ClientGoneError when the client leaves first; the service's ApiError when it cuts
    requests off. Whatever happens, `work` has ended, with its own cleaning up, when this returns.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, leaving, service.cut_off), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if service.cut_off.done():
            raise service.cut_off.result()
        raise ClientGoneError("the client closed its connection")
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
