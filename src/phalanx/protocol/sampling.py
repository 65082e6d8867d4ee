"""How a request's tokens are chosen, and when and why they end."""

from __future__ import annotations

import enum

import msgspec

from phalanx.errors import RequestError


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are chosen and when to stop. Immutable; `check()` is called on every request that comes in."""

    temperature: float = 1.0
    """0 is greedy. Above 0, logits are divided by it."""
    top_p: float = 1.0
    """Keep the most likely tokens whose probabilities add up to this."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that the output already has."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time that the output already has the token."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output."""
    seed: int | None = None
    """Makes sampling reproducible, whatever else is in the batch."""
    max_tokens: int | None = 16
    """Most tokens to generate; None goes on to the model's length limit."""
    min_tokens: int = 0
    """No end-of-sequence or stop token before this many tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end the output; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the output, besides the model's end-of-sequence tokens."""
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence tokens."""
    logprobs: int | None = None
    """Log-probabilities of each chosen token and of this many of the most likely ones; None for none."""

    def check(self) -> None:
        """Raises RequestError for the first value out of range."""
        for field, is_right, allowed in (
            ("temperature", 0.0 <= self.temperature <= 100.0, "from 0 to 100"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0, at most 1"),
            ("top_k", -1 <= self.top_k < 2**31, "from 1 to 2**31 - 1, or 0 (or -1) for all tokens"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "from 0 to 1"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "from -2 to 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "from -2 to 2"),
            ("repetition_penalty", 0.0 < self.repetition_penalty <= 100.0, "above 0, at most 100"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "an integer of 64 bits"),
            ("max_tokens", self.max_tokens is None or 1 <= self.max_tokens < 2**31, "from 1 to 2**31 - 1"),
            (
                "min_tokens",
                0 <= self.min_tokens <= (2**31 if self.max_tokens is None else self.max_tokens),
                "from 0 to max_tokens",
            ),
            ("stop", len(self.stop) <= 16 and all(self.stop), "at most 16 strings, none empty"),
            (
                "stop_token_ids",
                len(self.stop_token_ids) <= 64 and all(0 <= token < 2**31 for token in self.stop_token_ids),
                "at most 64 ids, each from 0 to 2**31 - 1",
            ),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                f"from 0 to {MAX_LOGPROBS}",
            ),
        ):
            if not is_right:
                raise RequestError(field, getattr(self, field), f"it must be {allowed}")


MAX_LOGPROBS = 20


class FinishReason(enum.IntEnum):
    """Why a request ended. A stop string is found by the client, which then cancels: it is `STOP` to the user."""

    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    ERROR = 4
