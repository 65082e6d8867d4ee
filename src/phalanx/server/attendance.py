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
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        return await _unless(work, service.cut_off, leaving)
    finally:
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)


async def uncut(work: Coroutine[Any, Any, T], service: Service) -> T:
    """The result of `work`, which itself sees to it that the client is there. Otherwise like `attended`."""
    return await _unless(work, service.cut_off)


async def _unless(work: Coroutine[Any, Any, T], *ends: asyncio.Future[Any]) -> T:
    """The result of `work`. Raises the error that one of `ends` resolves to before."""
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait((working, *ends), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise next(end.result() for end in ends if end.done())
        return working.result()
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def _disconnect(receive: Receive) -> ClientGoneError:
    while (await receive())["type"] != "http.disconnect":
        pass
    return ClientGoneError("the client closed its connection")
