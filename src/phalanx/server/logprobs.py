"""Log-probabilities as the two endpoints write them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from phalanx.engine.stream import PositionLogprobs, TokenLogprob

LOWEST_LOGPROB = -9999.0
"""JSON has no minus infinity; vLLM writes this for it."""


class CompletionLogprobs(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]

    @classmethod
    def of(cls, rows: Sequence[PositionLogprobs], start: int) -> CompletionLogprobs:
        """`start` is how many characters the tokens before these have."""
        offsets = []
        for row in rows:
            offsets.append(start)
            start += len(row.chosen.text)
        return cls(
            tokens=[token_name(row.chosen) for row in rows],
            token_logprobs=[_finite(row.chosen.logprob) for row in rows],
            top_logprobs=[_by_name(row) for row in rows],
            text_offset=offsets,
        )


class ChatTopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]

    @classmethod
    def of(cls, token: TokenLogprob) -> ChatTopLogprob:
        return cls(token.text, _finite(token.logprob), list(token.bytes))


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTopLogprob]

    @classmethod
    def of(cls, row: PositionLogprobs) -> ChatTokenLogprob:
        chosen = row.chosen
        top = [ChatTopLogprob.of(token) for token in row.top]
        return cls(chosen.text, _finite(chosen.logprob), list(chosen.bytes), top)


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatTokenLogprob]
    refusal: None = None

    @classmethod
    def of(cls, rows: Sequence[PositionLogprobs] | None) -> ChatLogprobs | None:
        return None if rows is None else cls([ChatTokenLogprob.of(row) for row in rows])


def token_name(token: TokenLogprob) -> str:
    """The token's text. One that is only part of a character is written as its bytes, as the OpenAI API does."""
    try:
        return token.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)


def _by_name(row: PositionLogprobs) -> dict[str, float]:
    """The chosen token is always among them, and may be one more than was asked for."""
    names: dict[str, float] = {}
    for token in (*row.top, row.chosen):
        names.setdefault(token_name(token), _finite(token.logprob))  # of several with one text the most likely counts
    return names


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
