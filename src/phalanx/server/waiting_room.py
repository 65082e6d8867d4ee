"""Where requests wait that come while the engine is started again or asleep, before anything is answered."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from phalanx.server.api_error import ApiError, engine_asleep, engine_restarting
from phalanx.server.attendance import attended
from phalanx.server.service import Service

MOST_WAITING = 1024
LONGEST_WAIT_S = 60.0


async def wait_for_engine(request: Request, service: Service) -> None:
    """Return at once unless the engine is being started again or asleep: then when it serves, or is dead.

    Raises ApiError 503 with Retry-After when MOST_WAITING wait already, and after LONGEST_WAIT_S; like `attended`.
    """
    if service.engine.down is None and not service.engine.asleep:
        return
    if service.num_waiting >= MOST_WAITING:
        raise _refusal(service, f"{service.num_waiting} requests wait for it already")
    with service.waiting():
        try:
            async with asyncio.timeout(LONGEST_WAIT_S):
                await attended(service.engine.until_settled(), request.receive, service)
        except TimeoutError:
            raise _refusal(service, f"this request has waited for {LONGEST_WAIT_S:g} s") from None


def _refusal(service: Service, why_now: str) -> ApiError:
    """Why it waits, and why it waits no longer."""
    if service.engine.down is None and service.engine.asleep:
        return engine_asleep(service.engine.asleep, why_now)
    return engine_restarting(f"{service.engine.down or 'it has just come back'} (and {why_now})")
