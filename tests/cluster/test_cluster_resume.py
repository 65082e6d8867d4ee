"""Outputs that go on in another engine, over a real model: whatever was asked for, they are those of one engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import msgspec
import pytest

from phalanx.engine.stream import OutputDelta, RequestStream, Streams
from phalanx.llm import LLM
from phalanx.protocol.sampling import SamplingParams
from phalanx.testing.checkpoints import write_checkpoint

PROMPTS = ["the quick brown fox jumps over the dog", "die flinke Füchsin 🦊 springt", "once upon a time there was"]
STRIDES = (1, 4, 2, 7)
"""Tokens that one engine after the other makes."""
SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=16, logprobs=3),
    SamplingParams(temperature=1.0, max_tokens=16),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=40, min_p=0.01, seed=5, max_tokens=16, logprobs=0),
    SamplingParams(
        temperature=0.9, presence_penalty=1.5, frequency_penalty=1.0, repetition_penalty=1.3, max_tokens=16, logprobs=2
    ),
    SamplingParams(temperature=1.0, seed=9, min_tokens=8, stop_token_ids=tuple(range(128)), max_tokens=16),
    SamplingParams(temperature=1.0, seed=3, repetition_penalty=0.7, max_tokens=18),
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = write_checkpoint(tmp_path_factory.mktemp("llama"))
    with LLM(str(path), max_model_len=64, kv_cache_memory=2**24, max_num_seqs=32, device="cpu") as llm:
        yield llm


def test_everything_goes_on_exactly(llm: LLM) -> None:
    seeded = [stream_of(llm, prompt, sampling).submit(0).sampling for prompt in PROMPTS for sampling in SAMPLINGS]
    expected = outputs_in_one(llm, seeded)
    check(outputs_in_parts(llm, seeded), expected)
    # Again with stop strings, which are met in the middle of something.
    stops = [delta.text[len(delta.text) // 2 :][:3] for delta in expected]
    stopping = [
        msgspec.structs.replace(sampling, stop=(stop,), stop_token_ids=(), min_tokens=0)
        for sampling, stop in zip(seeded, stops, strict=True)
    ]
    expected = outputs_in_one(llm, stopping)
    assert {delta.stop_reason for delta in expected} > set(stops[:3])
    check(outputs_in_parts(llm, stopping), expected)


def stream_of(llm: LLM, prompt: str, sampling: SamplingParams) -> RequestStream:
    return RequestStream(llm.tokenizer, llm.tokenizer.encode(prompt), sampling)


def streams_of(llm: LLM, samplings: Sequence[SamplingParams]) -> list[RequestStream]:
    prompts = [prompt for prompt in PROMPTS for _ in SAMPLINGS]
    return [stream_of(llm, prompt, sampling) for prompt, sampling in zip(prompts, samplings, strict=True)]


def outputs_in_one(llm: LLM, samplings: Sequence[SamplingParams]) -> list[OutputDelta]:
    streams = streams_of(llm, samplings)
    run(llm, streams, None)
    deltas = [stream.take() for stream in streams]
    return [delta for delta in deltas if delta is not None]


def outputs_in_parts(llm: LLM, samplings: Sequence[SamplingParams]) -> list[OutputDelta]:
    """Each part is made by a brain that knows nothing of the parts before but what it is told."""
    streams = streams_of(llm, samplings)
    taken: list[list[OutputDelta]] = [[] for _ in streams]
    strides = itertools.cycle(STRIDES)
    while not all(stream.is_finished for stream in streams):
        run(llm, streams, next(strides))
        for stream, deltas in zip(streams, taken, strict=True):
            delta = stream.take()
            if delta is not None:
                deltas.append(delta)
    for deltas in taken:
        assert [delta.num_cached_tokens is not None for delta in deltas] == [True, *[False] * (len(deltas) - 1)]
    return list(map(joined, taken))


def run(llm: LLM, streams: Sequence[RequestStream], num_tokens: int | None) -> None:
    """Have so many tokens made for each stream, or all that are left; after that the brain knows no request."""
    brain, running = llm._core.brain, Streams()
    left: dict[int, int | None] = {}
    for stream in streams:
        if not stream.is_finished:
            request_id = next(llm._request_ids)
            running.add(request_id, stream)
            left[request_id] = num_tokens
            brain.submit(stream.submit(request_id))
    while brain.has_work():
        batch = brain.step()
        if batch is not None:
            touched, stopped = running.apply(batch)
            for request_id in touched:
                if (count := left[request_id]) is not None:
                    left[request_id] = count - 1
            enough = [request_id for request_id in touched if left[request_id] == 0 and running.drop(request_id)]
            brain.cancel([*stopped, *enough])


def joined(deltas: Sequence[OutputDelta]) -> OutputDelta:
    logprobs = tuple(row for delta in deltas for row in delta.logprobs or ())
    return OutputDelta(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=logprobs or None,
        finish_reason=deltas[-1].finish_reason,
        stop_reason=deltas[-1].stop_reason,
    )


def check(found: Sequence[OutputDelta], expected: Sequence[OutputDelta]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert (one.text, one.finish_reason, one.stop_reason) == (other.text, other.finish_reason, other.stop_reason)
        assert (one.logprobs is None) == (other.logprobs is None)
        for row, same in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert row.chosen.token_id == same.chosen.token_id
            assert row.chosen.logprob == pytest.approx(same.chosen.logprob, abs=1e-4)
            assert [token.token_id for token in row.top] == [token.token_id for token in same.top]
