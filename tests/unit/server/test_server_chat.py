"""/v1/chat/completions: messages, streams, log-probabilities, usage."""

import inspect

import pytest
from server_rig import Rig, events, in_loop
from transformers import PreTrainedTokenizerBase

from phalanx.server.chat import RESERVED_VARIABLES


def prompt_of(rig: Rig) -> str:
    return rig.engine.tokenizer.decode(rig.engine.asked[-1][0])


@in_loop
async def test_a_whole_answer() -> None:
    rig = Rig("Hello")
    answer = (await rig.chat(max_completion_tokens=9)).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"content": "Hello", "role": "assistant", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert answer["usage"]["completion_tokens"] == 5
    assert prompt_of(rig) == "user:Hi\nassistant:"
    assert rig.engine.asked[0][1].max_tokens == 9


@in_loop
async def test_without_a_limit_the_models_own_counts() -> None:
    rig = Rig()
    await rig.chat()
    await rig.chat(max_tokens=3)
    assert [sampling.max_tokens for _, sampling in rig.engine.asked] == [None, 3]


@in_loop
async def test_a_stream_starts_with_the_role() -> None:
    rig = Rig("Hey")
    streamed = events(await rig.chat(stream=True, stream_options={"include_usage": True}))
    assert [event["choices"][0]["delta"] for event in streamed[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "H"},
        {"content": "e"},
        {"content": "y"},
    ]
    assert [event["choices"][0]["finish_reason"] for event in streamed[:-1]] == [None, None, None, "stop"]
    assert {event["object"] for event in streamed} == {"chat.completion.chunk"}
    assert streamed[-1]["choices"] == []
    assert streamed[-1]["usage"]["total_tokens"] == len("user:Hi\nassistant:") + 3


@in_loop
async def test_parts_of_text_and_roles() -> None:
    rig = Rig()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "assistant", "content": "yes", "tool_calls": None, "refusal": None, "annotations": []},
        {"role": "user", "content": parts},
    ]
    response = await rig.chat(messages=messages)
    assert response.status_code == 200, response.text
    assert prompt_of(rig) == "system:be brief\nassistant:yes\nuser:a\nb\nassistant:"


@in_loop
async def test_the_template_can_be_steered() -> None:
    rig = Rig()
    await rig.chat(add_generation_prompt=False, continue_final_message=True)
    assert prompt_of(rig) == "user:Hi"
    refused = await rig.chat(chat_template_kwargs={"refuse": True})
    assert "template says: no" in refused.json()["error"]["message"]


def test_no_variable_of_a_template_is_one_that_transformers_would_take_for_itself() -> None:
    names = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    assert set(names) - {"self", "kwargs"} <= RESERVED_VARIABLES


@in_loop
async def test_logprobs() -> None:
    rig = Rig("a")
    content = (await rig.chat(logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]["content"]
    assert content == [
        {
            "token": "a",
            "logprob": -0.25,
            "bytes": [97],
            "top_logprobs": [
                {"token": "a", "logprob": -0.25, "bytes": [97]},
                {"token": "\ufffd", "logprob": -9999.0, "bytes": [0xE2, 0x82]},
            ],
        }
    ]
    assert (await rig.chat(logprobs=True)).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert events(await rig.chat(logprobs=True, stream=True))[-1]["choices"][0]["logprobs"]["content"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]}]},
            "messages[0].content[0].cache_control",
        ),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": "hello"}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1000}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 1000}, "max_completion_tokens"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
@in_loop
async def test_what_is_wrong_is_named(body: dict[str, object], param: str) -> None:
    rig = Rig()
    response = await rig.chat(**body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert rig.engine.asked == []
