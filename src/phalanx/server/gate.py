"""The first to see a request: who asks, and whether requests are taken now. Counts those that are in flight."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from phalanx.server.api_error import ApiError
from phalanx.server.api_keys import ApiKeys
from phalanx.server.service import Service

OPEN_PATHS = frozenset({"/health"})
"""Supervisors and load balancers ask here, and have no key."""
BROWSER_PATHS = frozenset({"/status", "/status.json"})
"""A browser cannot send a Bearer key, but it can ask its user for a password: here that is the key."""


class Gate:
    """ASGI middleware. It is not Starlette's own kind, which puts a task and two queues between app and client."""

    def __init__(self, app: ASGIApp, service: Service, keys: ApiKeys) -> None:
        self._app = app
        self._service = service
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ValueError(f"{scope['type']} connections are not served")
        try:
            if scope["path"] not in OPEN_PATHS:
                authorization = Headers(scope=scope).get("authorization")
                self._keys.check(authorization, takes_password=scope["path"] in BROWSER_PATHS)
            if scope["method"] != "POST":
                await self._app(scope, receive, send)
                return
            with self._service.in_flight():
                await self._app(scope, receive, send)
        except ApiError as error:  # only the gate's own: the app answers for those raised inside it
            self._service.metrics.count_refused(error.status)
            await error.response()(scope, receive, send)
