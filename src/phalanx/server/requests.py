"""What clients may ask for: OpenAI's parameters and vLLM's additions to them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from phalanx.errors import RequestError
from phalanx.protocol.sampling import MAX_LOGPROBS, SamplingParams
from phalanx.server.request_body import build

MAX_CHOICES = 128
MAX_PROMPTS = 1024
DEFAULT_MAX_TOKENS = 16
"""Of a completion, in OpenAI's API as well."""


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool = False


class GenerationRequest(msgspec.Struct, kw_only=True):
    """The fields of both endpoints. Sampling parameters that are unset follow the model's own defaults."""

    model: str | None = None
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] = msgspec.field(default_factory=list)
    temperature: float | UnsetType = UNSET
    top_p: float | UnsetType = UNSET
    top_k: int | UnsetType = UNSET
    min_p: float | UnsetType = UNSET
    presence_penalty: float | UnsetType = UNSET
    frequency_penalty: float | UnsetType = UNSET
    repetition_penalty: float | UnsetType = UNSET
    seed: int | UnsetType = UNSET
    max_tokens: int | UnsetType = UNSET
    min_tokens: int | UnsetType = UNSET
    stop_token_ids: list[int] | UnsetType = UNSET
    ignore_eos: bool | UnsetType = UNSET

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


def _checked_sampling(
    asked: GenerationRequest, defaults: SamplingParams, *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """Checked parameters: these two, then the request's own, then `defaults`. Raises RequestError."""
    if not 1 <= asked.n <= MAX_CHOICES:
        raise RequestError("n", asked.n, f"it must be from 1 to {MAX_CHOICES}")
    if asked.stream_options is not None and not asked.stream:
        raise RequestError("stream_options", {"include_usage": asked.stream_options.include_usage}, "set stream: true")
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name in SamplingParams.__struct_fields__
        if (value := getattr(asked, name, UNSET)) is not UNSET
    }
    given["stop"] = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
    sampling = msgspec.structs.replace(defaults, **{**given, "max_tokens": max_tokens, "logprobs": logprobs})
    sampling.check()
    return sampling


class CompletionRequest(GenerationRequest, kw_only=True):
    """`POST /v1/completions`"""

    prompt: str | list[str | int | list[int]]
    echo: bool = False
    logprobs: int | UnsetType = UNSET
    add_special_tokens: bool = True

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """Checked parameters: the request's own, then `defaults`. Raises RequestError."""
        if self.echo and self.logprobs is not UNSET:
            raise RequestError("echo", True, "log-probabilities of the prompt are not supported: echo or logprobs")
        return _checked_sampling(
            self,
            defaults,
            max_tokens=DEFAULT_MAX_TOKENS if self.max_tokens is UNSET else self.max_tokens,
            logprobs=None if self.logprobs is UNSET else self.logprobs,
        )

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or token ids. Raises RequestError if the list mixes kinds."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and all(isinstance(item, int) for item in prompt):
            return [prompt]  # type: ignore[list-item]  # one prompt of token ids
        if len(prompt) > MAX_PROMPTS:
            raise RequestError("prompt", f"{len(prompt)} prompts", f"one request has at most {MAX_PROMPTS}")
        if prompt and (all(isinstance(p, str) for p in prompt) or all(isinstance(p, list) for p in prompt)):
            return prompt  # type: ignore[return-value]
        raise RequestError("prompt", prompt, "it must be a string, token ids, or a list of strings or of token ids")


class TextPart(msgspec.Struct, kw_only=True):
    type: str
    text: str


class ChatMessage(msgspec.Struct, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]]
    name: str | None = None

    def for_template(self, at: str) -> dict[str, Any]:
        """The message as a chat template takes it. `at` is where it stands in the body. Raises RequestError."""
        # Templates of the supported models know no developer; it is the later name of the same role.
        message = {"role": "system" if self.role == "developer" else self.role, "content": self._text(at)}
        return message if self.name is None else {**message, "name": self.name}

    def _text(self, at: str) -> str:
        if isinstance(self.content, str):
            return self.content
        texts = []
        for i, part in enumerate(self.content):
            where = f"{at}.content[{i}]"
            if part.get("type") != "text":
                raise RequestError(f"{where}.type", part.get("type"), "only parts of type 'text' are supported")
            texts.append(build(part, TextPart, where).text)
        return "\n".join(texts)


class ChatRequest(GenerationRequest, kw_only=True):
    """`POST /v1/chat/completions`"""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | UnsetType = UNSET
    logprobs: bool = False
    top_logprobs: int | UnsetType = UNSET
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """Checked parameters: the request's own, then `defaults`. Raises RequestError."""
        if self.add_generation_prompt and self.continue_final_message:
            raise RequestError("continue_final_message", True, "add_generation_prompt must be false then")
        return _checked_sampling(self, defaults, max_tokens=self._limit(), logprobs=self._num_logprobs())

    def _limit(self) -> int | None:
        """None is the model's own."""
        if self.max_completion_tokens is UNSET:
            return None if self.max_tokens is UNSET else self.max_tokens
        if self.max_tokens not in (UNSET, self.max_completion_tokens):
            raise RequestError("max_completion_tokens", self.max_completion_tokens, "max_tokens says otherwise")
        return self.max_completion_tokens

    def _num_logprobs(self) -> int | None:
        if self.top_logprobs is UNSET:
            return 0 if self.logprobs else None
        if not self.logprobs:
            raise RequestError("top_logprobs", self.top_logprobs, "set logprobs too")
        if not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise RequestError("top_logprobs", self.top_logprobs, f"it must be from 0 to {MAX_LOGPROBS}")
        return self.top_logprobs


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """`POST /tokenize`: text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """`POST /detokenize`"""

    model: str | None = None
    tokens: list[int]
