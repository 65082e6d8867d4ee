"""Where requests wait that come while the engine is started again, before anything is answered."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from phalanx.server.api_error import engine_restarting
from phalanx.server.attendance import attended
from phalanx.server.service import Service

MOST_WAITING = 1024
LONGEST_WAIT_S = 60.0


async def wait_for_engine(request: Request, service: Service) -> None:
    """Return at once unless the engine is being started again: then when it serves, or is dead.

    Raises ApiError 503 with Retry-After when MOST_WAITING wait already, and after LONGEST_WAIT_S; like `attended`.
    """
    reason = service.engine.down
    if reason is None:
        return
    if service.num_waiting >= MOST_WAITING:
        raise engine_restarting(f"{reason} (and {service.num_waiting} requests wait for it already)")
    with service.waiting():
        try:
            async with asyncio.timeout(LONGEST_WAIT_S):
                await attended(service.engine.until_settled(), request.receive, service)
        except TimeoutError:
            raise engine_restarting(f"{reason} (and this request has waited for {LONGEST_WAIT_S:g} s)") from None
