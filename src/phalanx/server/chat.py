"""`POST /v1/chat/completions`: the model answers in a conversation."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from phalanx.engine.stream import FinishName, OutputDelta, PositionLogprobs, TokenLogprob
from phalanx.engine.tokenizer import Tokenizer
from phalanx.errors import RequestError
from phalanx.server.answer import EventStream, Usage, answer_whole
from phalanx.server.completions import INLINE_CHARACTERS, finite
from phalanx.server.generation import Generation
from phalanx.server.request_body import build, read_request
from phalanx.server.requests import ChatMessage, ChatRequest
from phalanx.server.service import Service

RESERVED_VARIABLES = frozenset({"messages", "conversation", "tools", "documents", "chat_template", "tokenize"})
"""The template itself, and what has a parameter of its own, is not for chat_template_kwargs to change."""


class ChatTopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]

    @classmethod
    def of(cls, token: TokenLogprob) -> ChatTopLogprob:
        return cls(token.text, finite(token.logprob), list(token.bytes))


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatTokenLogprob]
    refusal: None = None

    @classmethod
    def of(cls, rows: Sequence[PositionLogprobs] | None) -> ChatLogprobs | None:
        if rows is None:
            return None
        return cls(
            [
                ChatTokenLogprob(
                    row.chosen.text,
                    finite(row.chosen.logprob),
                    list(row.chosen.bytes),
                    [ChatTopLogprob.of(token) for token in row.top],
                )
                for row in rows
            ]
        )


class AnswerMessage(msgspec.Struct, frozen=True):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishName | None
    stop_reason: str | int | None


class ChatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class MessageDelta(msgspec.Struct, frozen=True, kw_only=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatEventChoice(msgspec.Struct, frozen=True):
    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishName | None = None
    stop_reason: str | int | UnsetType | None = UNSET


class ChatEvent(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatEventChoice]
    usage: Usage | UnsetType | None = UNSET


class ChatForm:
    """Writes one request's answer."""

    def __init__(self, model: str, *, includes_usage: bool) -> None:
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._no_usage = None if includes_usage else UNSET

    def whole(self, outputs: Sequence[OutputDelta], usage: Usage) -> ChatAnswer:
        choices = [
            ChatChoice(
                index, AnswerMessage(out.text), ChatLogprobs.of(out.logprobs), out.finish_reason, out.stop_reason
            )
            for index, out in enumerate(outputs)
        ]
        return ChatAnswer(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def opening(self, index: int) -> ChatEvent:
        return self._event([ChatEventChoice(index, MessageDelta(role="assistant", content=""))], self._no_usage)

    def event(self, index: int, delta: OutputDelta) -> ChatEvent | None:
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return None
        choice = ChatEventChoice(
            index,
            MessageDelta(content=delta.text or UNSET),
            ChatLogprobs.of(delta.logprobs),
            delta.finish_reason,
            delta.stop_reason if delta.finish_reason else UNSET,
        )
        return self._event([choice], self._no_usage)

    def closing(self, usage: Usage) -> ChatEvent:
        return self._event([], usage)

    def _event(self, choices: list[ChatEventChoice], usage: Usage | UnsetType | None) -> ChatEvent:
        return ChatEvent(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)


async def tokenize_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
    template_variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation in the body's form. Raises RequestError."""
    if not messages:
        raise RequestError("messages", [], "it must have at least one message")
    plain = [build(m, ChatMessage, f"messages[{i}]").for_template(f"messages[{i}]") for i, m in enumerate(messages)]
    apply = partial(
        tokenizer.apply_chat,
        plain,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        template_variables=template_variables,
    )
    if sum(len(message["content"]) for message in plain) <= INLINE_CHARACTERS:
        return apply()
    return await asyncio.to_thread(apply)


async def create_chat_completion(request: Request, service: Service) -> Response:
    """Answer the request. Raises what `as_api_error` can tell the client."""
    asked = await read_request(request, ChatRequest)
    service.check_model(asked.model)
    sampling = asked.sampling(service.engine.default_sampling)
    if reserved := RESERVED_VARIABLES & asked.chat_template_kwargs.keys():
        raise RequestError("chat_template_kwargs", sorted(reserved), "these are not for a request to set")
    prompt = await tokenize_chat(
        service.engine.tokenizer,
        asked.messages,
        add_generation_prompt=asked.add_generation_prompt,
        continue_final_message=asked.continue_final_message,
        template_variables=asked.chat_template_kwargs,
    )
    generation = Generation(service, [prompt], sampling, asked.n)
    form = ChatForm(service.model_name, includes_usage=asked.includes_usage)
    if asked.stream:
        return EventStream(service, generation, form, includes_usage=asked.includes_usage)
    return await answer_whole(request, service, generation, form)
