"""`POST /v1/completions`: text goes on."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from phalanx.engine.stream import FinishName, OutputDelta
from phalanx.engine.tokenizer import Tokenizer
from phalanx.protocol.sampling import SamplingParams
from phalanx.server.delivery import deliver
from phalanx.server.generation import Generation
from phalanx.server.logprobs import CompletionLogprobs
from phalanx.server.request_body import read_request
from phalanx.server.requests import CompletionRequest
from phalanx.server.service import Service
from phalanx.server.tokenization import detokenize, tokenize
from phalanx.server.waiting_room import wait_for_engine


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishName | None
    stop_reason: str | int | None


class CompletionForm:
    """A `ChoiceForm`. `echoes` has the text that goes before each choice, empty for none."""

    id_prefix = "cmpl"
    name = event_name = "text_completion"

    def __init__(self, echoes: Sequence[str]) -> None:
        self._echoes = echoes
        self._offsets = [0] * len(echoes)

    def whole(self, index: int, output: OutputDelta) -> CompletionChoice:
        return self._choice(index, self._echoes[index] + output.text, output)

    def opening(self, index: int) -> CompletionChoice | None:
        echo = self._echoes[index]
        return CompletionChoice(index, echo, None, None, None) if echo else None

    def part(self, index: int, delta: OutputDelta) -> CompletionChoice:
        return self._choice(index, delta.text, delta)

    def _choice(self, index: int, text: str, delta: OutputDelta) -> CompletionChoice:
        logprobs = None
        if delta.logprobs is not None:
            logprobs = CompletionLogprobs.of(delta.logprobs, self._offsets[index])
            self._offsets[index] += sum(len(row.chosen.text) for row in delta.logprobs)
        return CompletionChoice(index, text, logprobs, delta.finish_reason, delta.stop_reason)


async def create_completion(request: Request, service: Service) -> Response:
    """Answer the request. Raises what `as_api_error` can tell the client."""
    asked = await read_request(request, CompletionRequest, service)
    service.check_model(asked.model)
    tokenizer, sampling = service.engine.tokenizer, asked.sampling(service.engine.default_sampling)
    prompts = await tokenize(tokenizer, asked.prompts(), add_special_tokens=asked.add_special_tokens)
    if asked.max_tokens is UNSET:  # the default gives way where the model's limit is near; what was asked for does not
        sampling = _fitted(sampling, service.engine.info.max_model_len - max(map(len, prompts)))
    await wait_for_engine(request, service)
    generation = Generation(service, prompts, sampling, asked.n)
    form = CompletionForm(await _echoes(asked, tokenizer))
    return await deliver(request, service, asked, generation, form)


def _fitted(sampling: SamplingParams, room: int) -> SamplingParams:
    assert sampling.max_tokens is not None
    return msgspec.structs.replace(sampling, max_tokens=max(1, min(sampling.max_tokens, room)))


async def _echoes(asked: CompletionRequest, tokenizer: Tokenizer) -> list[str]:
    prompts = asked.prompts()
    if not asked.echo:
        return [""] * (len(prompts) * asked.n)
    of_ids = [prompt for prompt in prompts if not isinstance(prompt, str)]
    decoded = iter(await detokenize(tokenizer, of_ids, skip_special_tokens=True))
    texts = [prompt if isinstance(prompt, str) else next(decoded) for prompt in prompts]
    return [text for text in texts for _ in range(asked.n)]
