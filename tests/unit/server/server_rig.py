"""A server in front of a fake engine, reached without sockets."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec

import httpx
from server_fake_engine import FakeEngine

from phalanx.server.api_keys import ApiKeys
from phalanx.server.app import create_app
from phalanx.server.service import Service

P = ParamSpec("P")
TEST_TIMEOUT_S = 20.0


def in_loop(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """A coroutine as a test."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def limited() -> None:
            async with asyncio.timeout(TEST_TIMEOUT_S):
                await test(*args, **kwargs)

        asyncio.run(limited())

    return run


class Rig:
    """Engine, service, application and a client of it. Made inside the running loop."""

    def __init__(self, reply: str = "Hello", *, keys: tuple[str, ...] = ()) -> None:
        self.engine = FakeEngine(reply)
        self.service = Service(self.engine, "tiny")
        self.app = create_app(self.service, ApiKeys(keys))
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://server")

    async def complete(self, **body: object) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"prompt": "Hi", **body})

    async def chat(self, **body: object) -> httpx.Response:
        messages = [{"role": "user", "content": "Hi"}]
        return await self.client.post("/v1/chat/completions", json={"messages": messages, **body})


def events(response: httpx.Response) -> list[Any]:
    """The data of a stream's events, with the framing checked and the final [DONE] taken off."""
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in response.headers
    assert response.text.endswith("data: [DONE]\n\n")
    frames = response.text.removesuffix("\n\n").split("\n\n")
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]


class Caller:
    """A client at the level of ASGI, which sees each message as it is sent and can leave at any moment."""

    def __init__(self, rig: Rig, path: str, body: dict[str, Any]) -> None:
        self._rig = rig
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        self.sent: list[dict[str, Any]] = []
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }

    async def call(self) -> None:
        """Send the request and take the answer, until the application returns."""
        await self._rig.app(self._scope, self._incoming.get, self._take)

    def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    async def _take(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
