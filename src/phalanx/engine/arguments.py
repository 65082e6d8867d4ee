"""Prompts, conversations and sampling as a caller in Python may write them: one, or a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias, cast

from phalanx.engine.admission import typed
from phalanx.errors import RequestError
from phalanx.protocol.sampling import SamplingParams

Prompt: TypeAlias = str | Sequence[int]
"""Text, or token ids."""

Turn: TypeAlias = Mapping[str, Any]
"""One turn of a conversation: `{"role": "user", "content": "..."}`."""


def listed_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of token ids is one prompt. Raises RequestError."""
    if isinstance(prompts, str):
        return [prompts]
    if not is_list(prompts):
        raise RequestError("prompts", prompts, "it must be text, a list of token ids, or a list of such prompts")
    if len(prompts) > 0 and isinstance(prompts[0], Integral):
        return [cast(Sequence[int], prompts)]
    return list(cast(Sequence[Prompt], prompts))


def listed_conversations(
    messages: Sequence[Turn] | Sequence[Sequence[Turn]],
) -> list[Sequence[Turn]]:
    """One conversation is a list of messages. Raises RequestError."""
    is_one = is_list(messages) and len(messages) > 0 and isinstance(messages[0], Mapping)
    conversations = [messages] if is_one else messages
    if not is_list(conversations) or not all(map(_is_conversation, conversations)):
        raise RequestError("messages", messages, "it must be a list of messages, or a list of such lists")
    return list(cast(Sequence[Sequence[Turn]], conversations))


def listed_samplings(sampling: SamplingParams | Sequence[SamplingParams], num_prompts: int) -> list[SamplingParams]:
    """One for each prompt. Raises RequestError."""
    if isinstance(sampling, SamplingParams):
        return [typed(sampling)] * num_prompts
    if not is_list(sampling):
        raise RequestError("sampling", sampling, "it must be SamplingParams, or a list with one for each prompt")
    if len(sampling) != num_prompts:
        raise RequestError(
            "sampling", f"{len(sampling)} of them", f"it must be one for all, or {num_prompts}: one for each"
        )
    return list(map(typed, sampling))


def _is_conversation(found: object) -> bool:
    return is_list(found) and all(isinstance(message, Mapping) for message in cast(Sequence[Any], found))


def is_list(found: object) -> bool:
    return isinstance(found, Sequence) and not isinstance(found, str | bytes | bytearray)
