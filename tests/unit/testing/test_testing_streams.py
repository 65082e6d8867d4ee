"""Streams of different kinds, and what sets one apart from that of a run without faults."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, cast

import msgspec
import pytest

from phalanx.engine.stream import OutputDelta
from phalanx.errors import EngineDeadError
from phalanx.protocol.sampling import SamplingParams
from phalanx.testing.streams import Asked, Came, Seen, again_s, difference, follow, requests, with_stop_strings

ASKED = Asked((1, 2), SamplingParams(max_tokens=4))
EXPECTED = Seen(tokens=[5, 6, 7, 8], text="abcd", logprobs=[-1.0], reasons=["length"])


def changed(**fields: Any) -> Seen:
    return msgspec.structs.replace(EXPECTED, **fields)


def test_requests_are_of_all_kinds_and_fit() -> None:
    found = requests(1, 12, vocab_size=150, max_len=128)
    assert found == requests(1, 12, vocab_size=150, max_len=128) != requests(2, 12, vocab_size=150, max_len=128)
    samplings = [one.sampling for one in found]
    for sampling in samplings:
        sampling.check()
    assert any(one.temperature == 0 for one in samplings) and any(one.seed is not None for one in samplings)
    assert any(one.frequency_penalty for one in samplings) and any(one.logprobs for one in samplings)
    assert sum(one.cancelled_after is not None for one in found) == 2
    assert all(len(one.prompt) + (one.sampling.max_tokens or 0) <= 128 and max(one.prompt) < 150 for one in found)


@pytest.mark.parametrize(
    ("came", "expected_s"),
    [
        ([(9.9, 1), (10.1, 1), (12.0, 2), (17.0, 2)], 2.0),
        ([(9.0, 1), (10.1, 2), (13.0, 3), (13.1, 3)], 3.0),
        ([(9.0, 1), (9.9, 2), (10.2, 2), (14.0, 2)], 0.0),
        ([(9.0, 1), (10.1, 1)], 0.0),
        ([(10.3, 2)], 0.3),
        ([], 0.0),
    ],
    ids=["old ones on their way", "of a second line", "it computed before", "none took over", "only the next", "none"],
)
def test_when_the_line_that_takes_over_makes_its_first_token(came: list[tuple[float, int]], expected_s: float) -> None:
    assert again_s(10.0, [Came(*one) for one in came]) == pytest.approx(expected_s)


def test_some_end_at_a_piece_of_their_own_text() -> None:
    asked = [ASKED] * 9
    stopped = with_stop_strings(asked, [changed(text="abcdefghi")] * 8 + [changed(text="a\ufffd\ufffd\ufffd")])
    assert [one.sampling.stop for one in stopped] == [("ghi",), (), (), (), ("ghi",), (), (), (), ()]


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        (EXPECTED, None),
        (changed(error="the engine has stopped"), "it failed: the engine has stopped"),
        (changed(reasons=[]), "it ended 0 times"),
        (changed(reasons=["length", "length"]), "it ended 2 times"),
        (changed(tokens=[5, 6, 9, 8]), "token 2 of 4 differs"),
        (changed(tokens=[5, 6, 7]), "token 3 of 4 differs"),
        (changed(tokens=[5, 6, 7, 8, 8]), "token 4 of 4 differs"),
        (changed(text="abc"), "its text or end differs: ['length'], 3 letters, not 4"),
        (changed(logprobs=[-1.1]), "a log-probability is off by 0.1"),
        (changed(logprobs=[]), "it has 0 log-probabilities, not 1"),
    ],
)
def test_what_is_different(found: Seen, complaint: str | None) -> None:
    assert difference(ASKED, EXPECTED, found) == complaint


def test_of_a_stream_that_is_cancelled_what_came_counts() -> None:
    cancelled = ASKED._replace(cancelled_after=2)
    assert difference(cancelled, EXPECTED, changed(tokens=[5, 6, 7], text="abc", reasons=[])) is None
    assert difference(cancelled, EXPECTED, changed(tokens=[5, 7], text="ab", reasons=[])) == "token 1 of 4 differs"
    assert difference(cancelled, EXPECTED, EXPECTED) is None, "all of it may have come at once"


class FakeEngine:
    def __init__(self, deltas: Sequence[OutputDelta], error: Exception | None = None) -> None:
        self._deltas, self._error = deltas, error
        self.is_closed = False

    async def generate(self, prompt: Sequence[int], sampling: SamplingParams) -> AsyncGenerator[OutputDelta, None]:
        try:
            for delta in self._deltas:
                yield delta
            if self._error is not None:
                raise self._error
        finally:
            self.is_closed = True


def test_all_that_comes_is_seen() -> None:
    told: list[OutputDelta] = []
    engine = FakeEngine([OutputDelta(text="ab", token_ids=(5, 6)), OutputDelta(token_ids=(7,), finish_reason="length")])
    seen = asyncio.run(follow(cast(Any, engine), ASKED, told.append))
    assert (seen.tokens, seen.text, seen.reasons, seen.error) == ([5, 6, 7], "ab", ["length"], None)
    assert [one.token_ids for one in told] == [(5, 6), (7,)]
    engine = FakeEngine([OutputDelta(token_ids=(5,)), OutputDelta(token_ids=(6,)), OutputDelta(token_ids=(7,))])
    seen = asyncio.run(follow(cast(Any, engine), ASKED._replace(cancelled_after=2)))
    assert seen.tokens == [5, 6] and engine.is_closed
    seen = asyncio.run(follow(cast(Any, FakeEngine([], EngineDeadError("killed"))), ASKED))
    assert seen.error == "killed"
