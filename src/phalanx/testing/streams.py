"""Requests of different kinds, what their clients see, and whether that is what they would see without a fault."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import NamedTuple

import msgspec

from phalanx.engine.engine import Engine
from phalanx.engine.stream import OutputDelta
from phalanx.errors import PhalanxError
from phalanx.protocol.sampling import SamplingParams

MOST_TOKENS = 48
LEAST_TOKENS = 16
LONGEST_PROMPT = 90
STOP_LETTERS = 3
LOGPROB_TOLERANCE = 1e-3
"""What is computed again after a fault is computed in other batches."""

_NUM_TOKENS_OF_PROMPTS = 200
"""Different ones."""


class Asked(NamedTuple):
    """One request."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    cancelled_after: int | None = None
    """Its client goes away after so many tokens."""


class Seen(msgspec.Struct):
    """What its client has seen of it."""

    tokens: list[int] = []
    text: str = ""
    logprobs: list[float] = []
    reasons: list[str] = []
    """Of its end: one, unless something is wrong."""
    error: str | None = None
    gap_s: float = 0.0
    """The longest between two deltas."""


def requests(seed: int, count: int, vocab_size: int, max_len: int) -> list[Asked]:
    """Greedy, seeded, with penalties, with log-probabilities, with less to choose from, and cancelled, in turn."""
    dice = random.Random(f"{seed} requests")
    return [_request(dice, kind, vocab_size, max_len) for kind in range(count)]


def _request(dice: random.Random, kind: int, vocab_size: int, max_len: int) -> Asked:
    num_prompt = dice.randint(2, min(LONGEST_PROMPT, max_len // 2))
    prompt = tuple(dice.randrange(min(vocab_size, _NUM_TOKENS_OF_PROMPTS)) for _ in range(num_prompt))
    most = min(MOST_TOKENS, max_len - num_prompt)
    num_tokens = dice.randint(min(LEAST_TOKENS, most), most)
    greedy = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    seeded = msgspec.structs.replace(greedy, temperature=1.0, seed=dice.getrandbits(32))
    changes: list[SamplingParams] = [
        greedy,
        seeded,
        msgspec.structs.replace(seeded, frequency_penalty=0.7, presence_penalty=0.3, repetition_penalty=1.2),
        msgspec.structs.replace(seeded, logprobs=2),
        msgspec.structs.replace(seeded, top_p=0.9, top_k=20, min_tokens=num_tokens // 2),
        greedy,
    ]
    is_cancelled = kind % len(changes) == len(changes) - 1
    return Asked(prompt, changes[kind % len(changes)], dice.randint(1, num_tokens - 1) if is_cancelled else None)


def with_stop_strings(asked: Sequence[Asked], seen: Sequence[Seen]) -> list[Asked]:
    """The same, and every fourth one ends where a piece of the text comes that it has been seen to make."""
    return [
        one._replace(sampling=msgspec.structs.replace(one.sampling, stop=(stop,)))
        if number % 4 == 0 and one.cancelled_after is None and (stop := _piece_of(found.text)) is not None
        else one
        for number, (one, found) in enumerate(zip(asked, seen, strict=True))
    ]


def _piece_of(text: str) -> str | None:
    start = 2 * len(text) // 3
    piece = text[start : start + STOP_LETTERS]
    return piece if len(piece) == STOP_LETTERS and "\ufffd" not in piece else None


async def follow(engine: Engine, asked: Asked, on_delta: Callable[[OutputDelta], None] = lambda delta: None) -> Seen:
    """Read a request to its end, whichever way it comes. `on_delta` is told of all that comes, when it does."""
    seen, last = Seen(), 0.0
    try:
        async with aclosing(engine.generate(asked.prompt, asked.sampling)) as deltas:
            async for delta in deltas:
                now = time.monotonic()
                seen.gap_s, last = max(seen.gap_s, now - last if last else 0.0), now
                seen.tokens += delta.token_ids
                seen.text += delta.text
                seen.logprobs += [position.chosen.logprob for position in delta.logprobs or ()]
                on_delta(delta)
                if delta.finish_reason is not None:
                    seen.reasons.append(delta.finish_reason)
                    seen.error = delta.error
                elif asked.cancelled_after is not None and len(seen.tokens) >= asked.cancelled_after:
                    break
    except PhalanxError as error:
        seen.error = str(error)
    return seen


class Came(NamedTuple):
    """Tokens of any stream, when their client had them."""

    at: float
    epoch: int
    """Of the ranks that made the last one of them."""


def again_s(struck_at: float, came: Sequence[Came]) -> float:
    """From a kill to the first token of the line that took over, which is the one that made the last token of all. 0 if
    none took over: that one computed before, or nothing came.

    What the killed line had made may come after the kill, and nobody knows how much later the next wait is its doing.
    """
    first_at = next((one.at for one in came if one.epoch == came[-1].epoch), struck_at)
    return max(first_at - struck_at, 0.0)


def has_ended(asked: Asked, found: Seen) -> bool:
    """Whether it ended exactly once, and not with an error. Who cancels hears of no end, unless it comes before."""
    least = 0 if asked.cancelled_after is not None else 1
    return found.error is None and least <= len(found.reasons) <= 1


def difference(asked: Asked, expected: Seen, found: Seen) -> str | None:
    """In what a stream is not that of a run without faults; None if in nothing."""
    if found.error is not None:
        return f"it failed: {found.error}"
    num_expected = len(expected.tokens)
    if asked.cancelled_after is not None:
        expected = msgspec.structs.replace(
            expected, tokens=expected.tokens[: len(found.tokens)], text=found.text, reasons=found.reasons
        )
    if not has_ended(asked, found):
        return f"it ended {len(found.reasons)} times"
    if found.tokens != expected.tokens:
        pairs = enumerate(zip(found.tokens, expected.tokens, strict=False))
        place = next((i for i, (one, other) in pairs if one != other), min(len(found.tokens), len(expected.tokens)))
        return f"token {place} of {num_expected} differs"
    if (found.text, found.reasons) != (expected.text, expected.reasons):
        return f"its text or end differs: {found.reasons}, {len(found.text)} letters, not {len(expected.text)}"
    if len(found.logprobs) != len(expected.logprobs):
        return f"it has {len(found.logprobs)} log-probabilities, not {len(expected.logprobs)}"
    off = max((abs(one - other) for one, other in zip(found.logprobs, expected.logprobs, strict=True)), default=0.0)
    return f"a log-probability is off by {off:.2g}" if off > LOGPROB_TOLERANCE else None
