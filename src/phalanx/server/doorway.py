"""What answers while the model loads: the port is open from the start, and tells who asks how far it is."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from phalanx.server.api_error import ApiError, json_response
from phalanx.server.health import while_starting


class Doorway:
    """ASGI application that passes everything on to another, once there is one."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None
        self.phase = "starting"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
            return
        error = ApiError(503, f"not ready yet: {self.phase}", code="starting", headers={"Retry-After": "1"})
        if scope["type"] == "http" and scope["path"] == "/health":
            response = json_response(while_starting(error, self.phase), error.status, error.headers)
        else:
            response = error.response()
        await response(scope, receive, send)
