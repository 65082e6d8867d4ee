"""Answers: one JSON body, or a stream of server-sent events. Both are cut short when the client leaves."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from phalanx.engine.stream import OutputDelta, PositionLogprobs
from phalanx.server.api_error import as_api_error, json_response
from phalanx.server.attendance import ClientGoneError, attended
from phalanx.server.generation import Generation
from phalanx.server.service import Service

logger = logging.getLogger(__name__)


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, generation: Generation) -> Usage:
        prompt, output = generation.num_prompt_tokens, generation.num_output_tokens
        return cls(prompt, output, prompt + output, PromptTokensDetails(generation.num_cached_tokens))


class AnswerForm(Protocol):
    """How an endpoint writes outputs."""

    def whole(self, outputs: Sequence[OutputDelta], usage: Usage) -> msgspec.Struct:
        """The answer when it is not streamed; one output for each choice."""
        ...

    def opening(self, index: int) -> msgspec.Struct | None:
        """The first event of a choice, before any token."""
        ...

    def event(self, index: int, delta: OutputDelta) -> msgspec.Struct | None:
        """The event for one delta; None if it has nothing to show."""
        ...

    def closing(self, usage: Usage) -> msgspec.Struct:
        """The last event, when the client wants the usage."""
        ...


async def answer_whole(request: Request, service: Service, generation: Generation, form: AnswerForm) -> Response:
    """All outputs in one body. Raises ClientGoneError, or the ApiError to answer with."""
    outputs = await attended(_collect(generation), request.receive, service)
    return json_response(form.whole(outputs, Usage.of(generation)))


async def _collect(generation: Generation) -> list[OutputDelta]:
    deltas_of: list[list[OutputDelta]] = [[] for _ in range(generation.num_outputs)]
    async with aclosing(generation.deltas()) as deltas:
        async for index, delta in deltas:
            deltas_of[index].append(delta)
    return [_join(deltas) for deltas in deltas_of]


def _join(deltas: Sequence[OutputDelta]) -> OutputDelta:
    logprobs: list[PositionLogprobs] = [row for delta in deltas for row in delta.logprobs or ()]
    return OutputDelta(
        text="".join(delta.text for delta in deltas),
        logprobs=tuple(logprobs) if deltas[0].logprobs is not None else None,
        finish_reason=deltas[-1].finish_reason,
        stop_reason=deltas[-1].stop_reason,
    )


class EventStream(Response):
    """The outputs as server-sent events: chunks, the usage if wanted, `[DONE]`. An error is an event too."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, generation: Generation, form: AnswerForm, *, includes_usage: bool) -> None:
        # Proxies such as nginx hold a response back until they have all of it, unless they are told not to.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._service = service
        self._generation = generation
        self._form = form
        self._includes_usage = includes_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await attended(self._send_events(send), receive, self._service)
        except ClientGoneError:
            return
        except Exception as error:
            reported = as_api_error(error)
            if reported.code == "internal_error":
                logger.exception("a stream failed")
            await _send_event(send, reported.body())
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._events()) as events:
            async for event in events:
                await _send_event(send, event)

    async def _events(self) -> AsyncGenerator[msgspec.Struct, None]:
        for index in range(self._generation.num_outputs):
            if (opening := self._form.opening(index)) is not None:
                yield opening
        async with aclosing(self._generation.deltas()) as deltas:
            async for index, delta in deltas:
                if (event := self._form.event(index, delta)) is not None:
                    yield event
        if self._includes_usage:
            yield self._form.closing(Usage.of(self._generation))


async def _send_event(send: Send, event: msgspec.Struct) -> None:
    body = b"data: " + msgspec.json.encode(event) + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})
