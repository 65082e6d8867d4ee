"""Text to token ids and back without holding other requests up: what takes long is done in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from phalanx.engine.tokenizer import Tokenizer
from phalanx.errors import RequestError
from phalanx.server.request_body import build
from phalanx.server.requests import ChatMessage

INLINE_SIZE = 20_000
"""Characters or token ids. So many take about 5 ms; more go to a thread."""

T = TypeVar("T")


async def tokenize(
    tokenizer: Tokenizer, prompts: Sequence[str | list[int]], *, add_special_tokens: bool
) -> list[list[int]]:
    """Token ids of each prompt; some may be token ids already."""

    def encode() -> list[list[int]]:
        return [
            tokenizer.encode(prompt, add_special_tokens) if isinstance(prompt, str) else prompt for prompt in prompts
        ]

    return await _aside(encode, sum(len(prompt) for prompt in prompts if isinstance(prompt, str)))


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

    def apply() -> list[int]:
        return tokenizer.apply_chat(
            plain,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_variables=template_variables,
        )

    return await _aside(apply, sum(len(message["content"]) for message in plain))


async def detokenize(tokenizer: Tokenizer, outputs: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]:
    """The text of each."""

    def decode() -> list[str]:
        return [tokenizer.decode(token_ids, skip_special_tokens) for token_ids in outputs]

    return await _aside(decode, sum(map(len, outputs)))


async def _aside(work: Callable[[], T], size: int) -> T:
    return work() if size <= INLINE_SIZE else await asyncio.to_thread(work)
