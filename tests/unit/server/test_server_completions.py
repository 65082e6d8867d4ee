"""/v1/completions: forms of prompts, choices, echo, log-probabilities, streams and usage."""

import msgspec
import pytest
from server_rig import Rig, events, in_loop

from phalanx.engine.stream import PositionLogprobs, TokenLogprob
from phalanx.server.logprobs import CompletionLogprobs


@in_loop
async def test_a_whole_answer() -> None:
    rig = Rig("Hello")
    rig.engine.num_cached_tokens = 2
    answer = (await rig.complete(model="tiny")).json()
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("ab", [[1, 97, 98]]),
        (["a", "b"], [[1, 97], [1, 98]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
@in_loop
async def test_forms_of_prompts(prompt: object, tokens: list[list[int]]) -> None:
    rig = Rig("x")
    answer = (await rig.complete(prompt=prompt)).json()
    assert [asked for asked, _ in rig.engine.asked] == tokens
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(tokens)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, tokens))


@in_loop
async def test_special_tokens_can_be_left_out() -> None:
    rig = Rig()
    await rig.complete(prompt="a", add_special_tokens=False)
    assert rig.engine.asked[0][0] == [97]


@in_loop
async def test_unset_parameters_follow_the_model_and_set_ones_the_request() -> None:
    rig = Rig()
    await rig.complete()
    await rig.complete(temperature=0, top_k=3, stop="end", max_tokens=7, stop_token_ids=[5], seed=None)
    default, chosen = (sampling for _, sampling in rig.engine.asked)
    assert (default.temperature, default.top_k, default.max_tokens, default.logprobs) == (0.6, 50, 16, None)
    assert (chosen.temperature, chosen.top_k, chosen.max_tokens, chosen.stop) == (0.0, 3, 7, ("end",))
    assert (chosen.stop_token_ids, chosen.seed) == ((5,), None)


@in_loop
async def test_every_sampling_parameter_arrives() -> None:
    rig = Rig()
    given = {
        "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.5, "presence_penalty": 0.5, "frequency_penalty": 0.5,
        "repetition_penalty": 1.5, "seed": 5, "max_tokens": 5, "min_tokens": 5, "stop": ["five"],
        "stop_token_ids": [5], "ignore_eos": True, "logprobs": 5,
    }  # fmt: skip
    assert (await rig.complete(**given)).status_code == 200
    arrived = msgspec.to_builtins(rig.engine.asked[0][1])
    assert {name: list(v) if isinstance(v, tuple) else v for name, v in arrived.items()} == given


@in_loop
async def test_the_default_limit_gives_way_to_the_models() -> None:
    rig = Rig()
    long = [97] * (rig.engine.info.max_model_len - 4)
    assert (await rig.complete(prompt=long)).status_code == 200
    assert rig.engine.asked[0][1].max_tokens == 4
    refused = await rig.complete(prompt=long, max_tokens=5)
    assert refused.json()["error"]["param"] == "max_tokens"


@in_loop
async def test_choices_differ_in_their_seed_and_share_the_prompts_count() -> None:
    rig = Rig("ab")
    rig.engine.num_cached_tokens = 1
    answer = (await rig.complete(prompt=["x", "y"], n=3, seed=40)).json()
    assert sorted(sampling.seed for _, sampling in rig.engine.asked) == [40, 40, 41, 41, 42, 42]
    assert [choice["text"] for choice in answer["choices"]] == ["ab"] * 6
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 2


@pytest.mark.parametrize("prompt", ["Hi", [72, 105]])
@in_loop
async def test_echo(prompt: object) -> None:
    rig = Rig("!?")
    assert (await rig.complete(prompt=prompt, echo=True)).json()["choices"][0]["text"] == "Hi!?"
    streamed = events(await rig.complete(prompt=prompt, echo=True, stream=True))
    assert [event["choices"][0]["text"] for event in streamed] == ["Hi", "!", "?"]


@in_loop
async def test_logprobs() -> None:
    rig = Rig("ab")
    logprobs = (await rig.complete(logprobs=2)).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.25, -0.25],
        "top_logprobs": [{"a": -0.25, "bytes:\\xe2\\x82": -9999.0}, {"b": -0.25, "bytes:\\xe2\\x82": -9999.0}],
        "text_offset": [0, 1],
    }
    streamed = events(await rig.complete(logprobs=0, stream=True))
    assert [event["choices"][0]["logprobs"]["text_offset"] for event in streamed] == [[0], [1]]
    assert streamed[1]["choices"][0]["logprobs"]["top_logprobs"] == [{"b": -0.25}]


def test_of_several_tokens_with_one_text_the_most_likely_counts() -> None:
    likely, unlikely = (TokenLogprob(token_id, -token_id, "a", b"a") for token_id in (1, 5))
    other = TokenLogprob(2, -2.0, "b", b"b")
    for chosen in (likely, unlikely):
        logprobs = CompletionLogprobs.of([PositionLogprobs(chosen, (likely, other, unlikely))], 0)
        assert logprobs.top_logprobs == [{"a": -1.0, "b": -2.0}]
        assert logprobs.token_logprobs == [chosen.logprob]


@in_loop
async def test_a_stop_string_is_named() -> None:
    rig = Rig("ab")
    rig.engine.last = {"finish_reason": "stop", "stop_reason": "END"}
    assert (await rig.complete(stop=["END"])).json()["choices"][0]["stop_reason"] == "END"
    assert events(await rig.complete(stop=["END"], stream=True))[-1]["choices"][0]["stop_reason"] == "END"


@in_loop
async def test_a_stream() -> None:
    rig = Rig("Hey")
    streamed = events(await rig.complete(stream=True))
    assert [event["choices"][0]["text"] for event in streamed] == ["H", "e", "y"]
    assert [event["choices"][0]["finish_reason"] for event in streamed] == [None, None, "stop"]
    assert len({event["id"] for event in streamed}) == 1
    assert all("usage" not in event for event in streamed)


@in_loop
async def test_a_stream_of_choices_with_usage() -> None:
    rig = Rig("Hey")
    streamed = events(await rig.complete(stream=True, n=2, stream_options={"include_usage": True}))
    texts = {0: "", 1: ""}
    for event in streamed[:-1]:
        assert event["usage"] is None
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == {0: "Hey", 1: "Hey"}
    assert streamed[-1]["choices"] == []
    assert streamed[-1]["usage"]["completion_tokens"] == 6
