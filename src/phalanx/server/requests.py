"""What clients may ask for: OpenAI's parameters and vLLM's additions to them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from phalanx.errors import RequestError
from phalanx.protocol import MAX_LOGPROBS, SamplingParams

MAX_CHOICES = 128
MAX_PROMPTS = 1024


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool = False


class GenerationRequest(msgspec.Struct, kw_only=True):
    """What both endpoints take. Of the sampling parameters, those that are unset follow the model's own defaults."""

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

    def num_logprobs(self) -> int | None:
        """SamplingParams.logprobs for this request."""
        raise NotImplementedError

    def default_max_tokens(self) -> int | None:
        """The limit when the request sets none; None is the model's own."""
        raise NotImplementedError

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """Checked parameters: the request's own, then `defaults`. Raises RequestError."""
        if not 1 <= self.n <= MAX_CHOICES:
            raise RequestError("n", self.n, f"it must be from 1 to {MAX_CHOICES}")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options", {"include_usage": self.stream_options.include_usage}, "set stream")
        given = {
            name: tuple(value) if isinstance(value, list) else value
            for name in SamplingParams.__struct_fields__
            if (value := getattr(self, name, UNSET)) is not UNSET
        }
        given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        given["logprobs"] = self.num_logprobs()
        given.setdefault("max_tokens", self.default_max_tokens())
        sampling = msgspec.structs.replace(defaults, **given)
        sampling.check()
        return sampling

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest, kw_only=True):
    """`POST /v1/completions`"""

    prompt: str | list[str | int | list[int]]
    echo: bool = False
    logprobs: int | UnsetType = UNSET
    add_special_tokens: bool = True

    def num_logprobs(self) -> int | None:
        if self.logprobs is UNSET:
            return None
        if self.echo:
            raise RequestError("echo", True, "log-probabilities of the prompt are not supported: echo or logprobs")
        return self.logprobs

    def default_max_tokens(self) -> int | None:
        return 16

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


class ContentPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart]
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
            if part.type != "text":
                raise RequestError(f"{at}.content[{i}].type", part.type, "only parts of type 'text' are supported")
            if part.text is None:
                raise RequestError(f"{at}.content[{i}].text", None, "it is required")
            texts.append(part.text)
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

    def num_logprobs(self) -> int | None:
        if self.top_logprobs is UNSET:
            return 0 if self.logprobs else None
        if not self.logprobs:
            raise RequestError("top_logprobs", self.top_logprobs, "set logprobs too")
        if not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise RequestError("top_logprobs", self.top_logprobs, f"it must be from 0 to {MAX_LOGPROBS}")
        return self.top_logprobs

    def default_max_tokens(self) -> int | None:
        return None if self.max_completion_tokens is UNSET else self.max_completion_tokens

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        if UNSET not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("max_completion_tokens", self.max_completion_tokens, "max_tokens says otherwise")
        if self.add_generation_prompt and self.continue_final_message:
            raise RequestError("continue_final_message", True, "add_generation_prompt must be false then")
        return super().sampling(defaults)


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
