from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import engine_tiny_tokenizers as tiny
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from phalanx.engine.stream import OutputDelta, RequestStream, StopStrings, Streams
from phalanx.engine.tokenizer import Tokenizer
from phalanx.protocol.client import TokenBatch
from phalanx.protocol.columns import LogprobColumns, ints
from phalanx.protocol.sampling import FinishReason, SamplingParams

KINDS = {"byte_level": tiny.byte_level, "sentencepiece": tiny.sentencepiece, "wordpiece": tiny.wordpiece}


@cache
def load(kind: str) -> Tokenizer:
    with TemporaryDirectory() as directory:
        return Tokenizer.load(tiny.save(KINDS[kind](), Path(directory)))


SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")


def deltas(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> Iterator[str]:
    detokenizer = tokenizer.detokenizer(prompt or [])
    for token_id in ids:
        yield detokenizer.feed(token_id)
    yield detokenizer.flush()


def finished_text(deltas: list[OutputDelta]) -> str:
    return "".join(delta.text for delta in deltas)


# ------------------------------------------------------------------------------------- text


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_text_comes_out_whole_and_without_broken_characters(kind: str, text: str) -> None:
    assume(not any(special in text for special in SPECIAL_TOKENS))  # these have no text
    tokenizer = load(kind)
    pieces = list(deltas(tokenizer, tokenizer.encode(text)))
    assert "".join(pieces) == text
    assert "�" in text or not any("�" in piece for piece in pieces)


@given(st.lists(st.integers(0, 318)))
@settings(max_examples=200, deadline=None)
def test_any_tokens_of_a_byte_level_vocabulary_read_as_the_full_decode(ids: list[int]) -> None:
    tokenizer = load("byte_level")
    assert "".join(deltas(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.lists(st.integers(259, 290)))
@settings(max_examples=200, deadline=None)
def test_any_pieces_of_a_sentencepiece_vocabulary_read_as_the_full_decode(ids: list[int]) -> None:
    tokenizer = load("sentencepiece")
    assert "".join(deltas(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.lists(st.integers(1, 7)))
@settings(max_examples=200, deadline=None)
def test_any_pieces_of_another_vocabulary_read_as_the_full_decode(ids: list[int]) -> None:
    tokenizer = load("wordpiece")
    assert "".join(deltas(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_text_cut_anywhere_goes_on_from_its_prompt(kind: str) -> None:
    tokenizer = load(kind)
    ids = tokenizer.encode("the fox is lo the end")
    for cut in range(1, len(ids)):
        whole, prompt = tokenizer.decode(ids), tokenizer.decode(ids[:cut])
        assert prompt + "".join(deltas(tokenizer, ids[cut:], ids[:cut])) == whole


def test_a_space_at_the_very_beginning_is_sentencepieces_own() -> None:
    tokenizer = load("sentencepiece")
    the = tokenizer.encode("the")
    bos, other = [1], tokenizer.encode("x")
    assert "".join(deltas(tokenizer, the, bos)) == "the"
    assert "".join(deltas(tokenizer, the, other)) == " the"


def test_half_a_character_is_held_back_until_it_is_whole_or_broken_off() -> None:
    tokenizer = load("byte_level")
    first, *rest = tokenizer.encode("🦊")
    assert rest, "the fox must take several tokens"
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.feed(first) == ""
    assert "".join(map(detokenizer.feed, rest)) == "🦊"
    assert detokenizer.feed(first) == ""
    assert detokenizer.flush() == "�"


def test_an_id_without_a_token_has_no_text() -> None:
    assert "".join(deltas(load("byte_level"), [load("byte_level").vocab_size + 3])) == ""


# ------------------------------------------------------------------------------------- stop strings


def first_stop(text: str, stops: list[str], num_early: int = 0) -> tuple[str, str | None]:
    """The specification: read letter by letter, end at the first stop string that is complete (the longest of two).

    The first `num_early` letters may begin one but not complete it.
    """
    for end in range(num_early + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(
    st.lists(st.text("ab.", max_size=5), max_size=12),
    st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_are_found_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown = ""
    for piece in pieces:
        text, stop = matcher.feed(piece)
        shown += text
        if stop is not None:
            break
    else:
        stop = None
        shown += matcher.flush()
    assert (shown, stop) == first_stop("".join(pieces), stops)


@given(
    st.lists(st.text("ab.", max_size=5), max_size=12),
    st.integers(0, 12),
    st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_may_begin_before_they_count(pieces: list[str], num_early: int, stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown, stop = "", None
    for number, piece in enumerate(pieces):
        text, stop = matcher.feed(piece, may_stop=number >= num_early)
        shown += text
        if stop is not None:
            break
    shown += matcher.flush()
    assert (shown, stop) == first_stop("".join(pieces), stops, len("".join(pieces[:num_early])))


def test_a_long_stop_string_takes_memory_once() -> None:
    stop = "ab" * 10_000
    tracemalloc.start()
    try:
        matcher = StopStrings([stop])
        assert matcher.feed(stop[:-1]) == ("", None)
        assert tracemalloc.get_traced_memory()[1] < 10 * len(stop)
    finally:
        tracemalloc.stop()
    assert matcher.feed("b") == ("", stop)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["\n\nQ:"])
    assert matcher.feed("A dog.\n") == ("A dog.", None)
    assert matcher.feed("\nQ") == ("", None)
    assert matcher.feed("uite") == ("\n\nQuite", None)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_stop_string_ends_the_stream_and_is_not_shown(kind: str) -> None:
    tokenizer = load(kind)
    stream = RequestStream(tokenizer, [], SamplingParams(stop=("fox",), max_tokens=None))
    seen = []
    for token_id in tokenizer.encode("the quick brown fox jumps"):
        stream.push(token_id)
        if (delta := stream.take()) is not None:
            seen.append(delta)
        if stream.is_finished:
            break
    assert finished_text(seen) == "the quick brown "
    assert (seen[-1].finish_reason, seen[-1].stop_reason) == ("stop", "fox")
    assert stream.take() is None


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    tokenizer = load("sentencepiece")
    ids = tokenizer.encode("x x x x")
    stream = RequestStream(tokenizer, [], SamplingParams(stop=("x",), min_tokens=4))
    for token_id in ids:
        if not stream.is_finished:
            stream.push(token_id)
    delta = stream.take()
    assert delta is not None
    assert delta.text == "x x "


def test_a_stop_string_may_begin_before_min_tokens() -> None:
    stream, ids = stream_of("xyz", stop=("xy",), min_tokens=1)
    assert len(ids) == 3
    stream.push(ids[0])
    stream.push(ids[1])
    delta = stream.take()
    assert delta is not None
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("", "stop", "xy")


# ------------------------------------------------------------------------------------- ends


def stream_of(text: str, **sampling: object) -> tuple[RequestStream, list[int]]:
    tokenizer = load("byte_level")
    return RequestStream(tokenizer, [], SamplingParams(**sampling)), tokenizer.encode(text)  # type: ignore[arg-type]


def test_the_token_that_ends_the_output_has_no_text() -> None:
    stream, (token_id, *_) = stream_of("x")
    stream.push(token_id)
    stream.push(token_id, FinishReason.STOP)
    delta = stream.take()
    assert delta is not None
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("x", (token_id, token_id), "stop")
    assert delta.stop_reason is None


def test_a_stop_token_that_was_asked_for_is_named() -> None:
    (token_id,) = load("byte_level").encode("x")
    stream, _ = stream_of("x", stop_token_ids=(token_id,))
    stream.push(token_id, FinishReason.STOP)
    delta = stream.take()
    assert delta is not None
    assert (delta.text, delta.stop_reason) == ("", token_id)


def test_the_last_token_at_the_length_limit_has_text_and_held_text_is_let_go() -> None:
    stream, ids = stream_of("end", stop=("ending",))
    for token_id in ids[:-1]:
        stream.push(token_id)
    stream.push(ids[-1], FinishReason.LENGTH)
    delta = stream.take()
    assert delta is not None
    assert (delta.text, delta.finish_reason) == ("end", "length")


def test_a_stop_string_in_the_last_token_counts_as_stop() -> None:
    stream, ids = stream_of("x", stop=("x",))
    stream.push(ids[0], FinishReason.LENGTH)
    delta = stream.take()
    assert delta is not None
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("", "stop", "x")


def test_deltas_merge_while_nobody_reads() -> None:
    stream, ids = stream_of("the quick brown fox")
    assert stream.take() is None
    stream.push_num_cached(32)
    for token_id in ids:
        stream.push(token_id)
    delta = stream.take()
    assert delta is not None
    assert (delta.text, delta.token_ids, delta.num_cached_tokens) == ("the quick brown fox", tuple(ids), 32)
    assert stream.take() is None


def test_an_error_says_why() -> None:
    stream, _ = stream_of("")
    stream.finish(FinishReason.ERROR, "the cache is too small")
    assert stream.take() == OutputDelta(finish_reason="error", error="the cache is too small")


# ------------------------------------------------------------------------------------- batches


def batch(
    tokens: dict[int, int],
    finished: dict[int, FinishReason] | None = None,
    errors: dict[int, str] | None = None,
    logprobs: LogprobColumns | None = None,
) -> TokenBatch:
    return TokenBatch(
        request_ids=np.array(list(tokens), dtype=np.int64).tobytes(),
        tokens=ints(list(tokens.values())),
        finished=tuple((finished or {}).items()),
        errors=tuple((errors or {}).items()),
        logprobs=logprobs,
    )


def test_a_batch_is_handed_out_and_ended_requests_leave() -> None:
    streams = Streams()
    (x,), (y,) = load("byte_level").encode("x"), load("byte_level").encode("y")
    plain, stopping, failing = stream_of("")[0], stream_of("", stop=("y",))[0], stream_of("")[0]
    for request_id, stream in ((2**40, plain), (2, stopping), (3, failing)):
        streams.add(request_id, stream)
    assert streams.apply(batch({2**40: x, 2: y, 99: x})) == ([2**40, 2], [2])
    touched, stopped = streams.apply(batch({2**40: x}, {2**40: FinishReason.LENGTH, 3: FinishReason.ERROR}, {3: "why"}))
    assert (touched, stopped) == ([2**40, 3], [])
    assert len(streams) == 0
    last = plain.take()
    assert last is not None
    assert (last.text, last.finish_reason) == ("xx", "length")
    assert failing.take() == OutputDelta(finish_reason="error", error="why")


def test_logprobs_carry_text_and_exact_bytes() -> None:
    tokenizer = load("byte_level")
    first, *_ = tokenizer.encode("🦊")
    (x,) = tokenizer.encode("x")
    streams = Streams()
    stream, silent = stream_of("", logprobs=1)[0], stream_of("")[0]
    streams.add(1, silent)
    streams.add(2, stream)
    columns = LogprobColumns(
        entries=ints([1]),
        chosen=np.float32([-0.5]).tobytes(),
        width=2,
        top_ids=ints([x, first]),
        top_logprobs=np.float32([-0.25, -0.5]).tobytes(),
    )
    streams.apply(batch({1: x, 2: first}, logprobs=columns))
    delta = stream.take()
    assert delta is not None
    assert delta.logprobs is not None
    (position,) = delta.logprobs
    assert (position.chosen.token_id, position.chosen.logprob) == (first, -0.5)
    assert position.chosen.bytes == "🦊".encode()[: len(position.chosen.bytes)]
    assert [(top.text, top.bytes, top.logprob) for top in position.top] == [("x", b"x", -0.25)]
    quiet = silent.take()
    assert quiet is not None
    assert quiet.logprobs is None


def test_logprobs_of_the_chosen_token_alone() -> None:
    (x,) = load("byte_level").encode("x")
    streams = Streams()
    stream, _ = stream_of("", logprobs=0)
    streams.add(1, stream)
    columns = LogprobColumns(ints([0]), np.float32([-math.log(2)]).tobytes(), 0, b"", b"")
    streams.apply(batch({1: x}, logprobs=columns))
    delta = stream.take()
    assert delta is not None
    assert delta.logprobs is not None
    assert delta.logprobs[0].top == ()
