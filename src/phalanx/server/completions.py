"""`POST /v1/completions`: text goes on."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from phalanx.engine.stream import FinishName, OutputDelta, PositionLogprobs, TokenLogprob
from phalanx.engine.tokenizer import Tokenizer
from phalanx.protocol import SamplingParams
from phalanx.server.answer import EventStream, Usage, answer_whole
from phalanx.server.generation import Generation
from phalanx.server.request_body import read_request
from phalanx.server.requests import CompletionRequest
from phalanx.server.service import Service

INLINE_CHARACTERS = 20_000
"""Tokenizing this much takes about 5 ms; more goes to a thread, so that other streams go on meanwhile."""
LOWEST_LOGPROB = -9999.0
"""JSON has no minus infinity; vLLM writes this for it."""


class CompletionLogprobs(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishName | None
    stop_reason: str | int | None


class CompletionAnswer(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class CompletionForm:
    """Writes one request's answer. `echoes` has the text that goes before each choice, empty for none."""

    def __init__(self, model: str, echoes: Sequence[str], *, includes_usage: bool) -> None:
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._echoes = echoes
        self._offsets = [0] * len(echoes)
        self._no_usage = None if includes_usage else UNSET

    def whole(self, outputs: Sequence[OutputDelta], usage: Usage) -> CompletionAnswer:
        choices = [
            self._choice(index, self._echoes[index] + output.text, output) for index, output in enumerate(outputs)
        ]
        return self._answer(choices, usage)

    def opening(self, index: int) -> CompletionAnswer | None:
        echo = self._echoes[index]
        return self._answer([CompletionChoice(index, echo, None, None, None)], self._no_usage) if echo else None

    def event(self, index: int, delta: OutputDelta) -> CompletionAnswer | None:
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return None
        return self._answer([self._choice(index, delta.text, delta)], self._no_usage)

    def closing(self, usage: Usage) -> CompletionAnswer:
        return self._answer([], usage)

    def _answer(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> CompletionAnswer:
        return CompletionAnswer(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _choice(self, index: int, text: str, delta: OutputDelta) -> CompletionChoice:
        logprobs = None if delta.logprobs is None else self._logprobs(index, delta.logprobs)
        return CompletionChoice(index, text, logprobs, delta.finish_reason, delta.stop_reason)

    def _logprobs(self, index: int, rows: Sequence[PositionLogprobs]) -> CompletionLogprobs:
        offsets = []
        for row in rows:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(row.chosen.text)
        return CompletionLogprobs(
            tokens=[token_name(row.chosen) for row in rows],
            token_logprobs=[finite(row.chosen.logprob) for row in rows],
            # Here the chosen token is always among the others, and may be one more than was asked for.
            top_logprobs=[{token_name(t): finite(t.logprob) for t in (*row.top, row.chosen)} for row in rows],
            text_offset=offsets,
        )


def token_name(token: TokenLogprob) -> str:
    """The token's text. One that is only part of a character is written as its bytes, as the OpenAI API does."""
    try:
        return token.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


async def tokenize(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of `text`, without holding other requests up."""
    if len(text) <= INLINE_CHARACTERS:
        return tokenizer.encode(text, add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)


async def create_completion(request: Request, service: Service) -> Response:
    """Answer the request. Raises what `as_api_error` can tell the client."""
    asked = await read_request(request, CompletionRequest)
    service.check_model(asked.model)
    tokenizer, sampling = service.engine.tokenizer, asked.sampling(service.engine.default_sampling)
    prompts = [
        await tokenize(tokenizer, prompt, add_special_tokens=asked.add_special_tokens)
        if isinstance(prompt, str)
        else prompt
        for prompt in asked.prompts()
    ]
    if asked.max_tokens is UNSET:  # the default gives way where the model's limit is near; what was asked for does not
        sampling = _fitted(sampling, service.engine.info.max_model_len - max(map(len, prompts)))
    generation = Generation(service, prompts, sampling, asked.n)
    form = CompletionForm(service.model_name, _echoes(asked, tokenizer), includes_usage=asked.includes_usage)
    if asked.stream:
        return EventStream(service, generation, form, includes_usage=asked.includes_usage)
    return await answer_whole(request, service, generation, form)


def _fitted(sampling: SamplingParams, room: int) -> SamplingParams:
    assert sampling.max_tokens is not None
    return msgspec.structs.replace(sampling, max_tokens=max(1, min(sampling.max_tokens, room)))


def _echoes(asked: CompletionRequest, tokenizer: Tokenizer) -> list[str]:
    if not asked.echo:
        return [""] * (len(asked.prompts()) * asked.n)
    texts = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in asked.prompts()]
    return [text for text in texts for _ in range(asked.n)]
