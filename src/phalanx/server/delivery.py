"""Answers on their way: one JSON body, or a stream of server-sent events. Both are cut short when the client leaves."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from phalanx.engine.stream import Origin, OutputDelta, PositionLogprobs
from phalanx.server.answer import Answer, AnswerWriter, ChoiceForm, Usage
from phalanx.server.api_error import as_api_error, json_response
from phalanx.server.attendance import ClientGoneError, attended
from phalanx.server.generation import Generation
from phalanx.server.origin_headers import headers_of
from phalanx.server.requests import GenerationRequest
from phalanx.server.service import Service

logger = logging.getLogger(__name__)


async def deliver(
    request: Request, service: Service, asked: GenerationRequest, generation: Generation, form: ChoiceForm
) -> Response:
    """The response, as a stream if the request wants one. Raises ClientGoneError, or the ApiError to answer with."""
    writer = AnswerWriter(form, service.model_name, includes_usage=asked.includes_usage)
    if asked.stream:
        return EventStream(service, generation, writer)
    outputs = await attended(_collect(generation), request.receive, service)
    headers = headers_of([origin for output in outputs for origin in output.origins])
    return json_response(writer.whole(outputs, Usage.of(generation)), headers=headers)


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
        origins=tuple(origin for delta in deltas for origin in delta.origins),
    )


class EventStream(Response):
    """The outputs as server-sent events: chunks, the usage if wanted, `[DONE]`. An error is an event too."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, generation: Generation, writer: AnswerWriter) -> None:
        # Proxies such as nginx hold a response back until they have all of it, unless they are told not to.
        headers = headers_of([Origin(one.weights_version, one.epoch) for one in service.engine.conditions()])
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._service = service
        self._generation = generation
        self._writer = writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await attended(self._send_events(send), receive, self._service)
        except ClientGoneError:
            return
        except Exception as error:  # the status is sent: whatever it is, this is the one place that can still tell
            reported = as_api_error(error)
            if reported.code == "internal_error":
                logger.exception("a stream failed")
            await _send_event(send, reported.body())
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._events()) as events:
            async for event in events:
                if event is not None:
                    await _send_event(send, event)

    async def _events(self) -> AsyncGenerator[Answer | None, None]:
        for index in range(self._generation.num_outputs):
            yield self._writer.opening(index)
        async with aclosing(self._generation.deltas()) as deltas:
            async for index, delta in deltas:
                yield self._writer.event(index, delta)
        yield self._writer.closing(Usage.of(self._generation))


async def _send_event(send: Send, event: msgspec.Struct) -> None:
    body = b"data: " + msgspec.json.encode(event) + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})
