"""`POST /v1/chat/completions`: the model answers in a conversation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from phalanx.engine.stream import FinishName, OutputDelta
from phalanx.errors import RequestError
from phalanx.server.delivery import deliver
from phalanx.server.generation import Generation
from phalanx.server.logprobs import ChatLogprobs
from phalanx.server.request_body import read_request
from phalanx.server.requests import ChatRequest
from phalanx.server.service import Service
from phalanx.server.tokenization import tokenize_chat
from phalanx.server.waiting_room import wait_for_engine

RESERVED_VARIABLES = frozenset(
    {
        *("messages", "conversation", "tools", "documents", "chat_template", "tokenize"),
        *("add_generation_prompt", "continue_final_message"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("tokenizer_kwargs", "sanitize_control_tokens"),
    }
)
"""Not for chat_template_kwargs to change: the template itself, what has a parameter of its own, and what transformers
takes for itself and no template sees."""


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


class MessageDelta(msgspec.Struct, frozen=True, kw_only=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatEventChoice(msgspec.Struct, frozen=True):
    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishName | None = None
    stop_reason: str | int | UnsetType | None = UNSET


class ChatForm:
    """A `ChoiceForm`."""

    id_prefix = "chatcmpl"
    name = "chat.completion"
    event_name = "chat.completion.chunk"

    def whole(self, index: int, output: OutputDelta) -> ChatChoice:
        return ChatChoice(
            index,
            AnswerMessage(output.text),
            ChatLogprobs.of(output.logprobs),
            output.finish_reason,
            output.stop_reason,
        )

    def opening(self, index: int) -> ChatEventChoice:
        return ChatEventChoice(index, MessageDelta(role="assistant", content=""))

    def part(self, index: int, delta: OutputDelta) -> ChatEventChoice:
        return ChatEventChoice(
            index,
            MessageDelta(content=delta.text or UNSET),
            ChatLogprobs.of(delta.logprobs),
            delta.finish_reason,
            delta.stop_reason if delta.finish_reason else UNSET,
        )


async def create_chat_completion(request: Request, service: Service) -> Response:
    """Answer the request. Raises what `as_api_error` can tell the client."""
    asked = await read_request(request, ChatRequest, service)
    service.check_model(asked.model)
    with _limit_named_as_in(asked):
        sampling = asked.sampling(service.engine.default_sampling)
        if reserved := RESERVED_VARIABLES & asked.chat_template_kwargs.keys():
            raise RequestError("chat_template_kwargs", sorted(reserved), "these are parameters of their own, or none")
        prompt = await tokenize_chat(
            service.engine.tokenizer,
            asked.messages,
            add_generation_prompt=asked.add_generation_prompt,
            continue_final_message=asked.continue_final_message,
            template_variables=asked.chat_template_kwargs,
        )
        await wait_for_engine(request, service)
        generation = Generation(service, [prompt], sampling, asked.n)
    return await deliver(request, service, asked, generation, ChatForm())


@contextmanager
def _limit_named_as_in(asked: ChatRequest) -> Iterator[None]:
    """An error of `max_tokens` under the name that the request has for it."""
    try:
        yield
    except RequestError as error:
        if error.field != "max_tokens" or asked.max_tokens is not UNSET:
            raise
        raise RequestError("max_completion_tokens", error.value, error.allowed) from None
