"""Errors: OpenAI's form, the right status, and a server that goes on."""

import asyncio
import json

import pytest
from server_rig import Caller, Rig, events, in_loop

from phalanx.server import request_body


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"prompt": None}, "prompt", "required"),
        ({"prompt": []}, "prompt", "must be a string"),
        ({"prompt": [1, "a"]}, "prompt", "must be a string"),
        ({"prompt": [[]]}, "prompt", "at least one token"),
        ({"prompt": [-1]}, "prompt", "token id -1"),
        ({"prompt": "x" * 500}, "prompt", "at most 199"),
        ({"temperature": "hot"}, "temperature", "expected float, got str"),
        ({"temperature": -1}, "temperature", "from 0 to 100"),
        ({"max_tokens": 0}, "max_tokens", "from 1 to"),
        ({"n": 0}, "n", "from 1 to 128"),
        ({"stop": [1]}, "stop[0]", "expected str"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream: true"),
        ({"stream": True, "stream_options": {"continuous": True}}, "stream_options", "unknown field"),
        ({"echo": True, "logprobs": 1}, "echo", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "penalties, top_k, top_p and min_p are"),
        ({"best_of": 2}, "best_of", "take n"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"temprature": 1}, "temprature", "known are"),
        ({"use_beam_search": 0}, "use_beam_search", "beam"),
    ],
)
@in_loop
async def test_a_wrong_parameter_is_named(body: dict[str, object], param: str, says: str) -> None:
    rig = Rig()
    response = await rig.complete(**body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert says in error["message"]
    assert (await rig.complete()).status_code == 200


@in_loop
async def test_what_asks_for_nothing_is_accepted() -> None:
    rig = Rig()
    harmless = {
        "user": "me", "metadata": {"a": "b"}, "store": False, "n": 1, "best_of": 1, "logit_bias": {}, "suffix": None,
        "tools": [], "response_format": {"type": "text"}, "service_tier": "auto", "seed": None,
    }  # fmt: skip
    response = await rig.complete(**harmless)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'"text"', b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b'{"a": ' + b"[" * 9999]
)
@in_loop
async def test_what_is_not_json(body: bytes) -> None:
    response = await Rig().client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


@in_loop
async def test_another_content_type_is_refused() -> None:
    response = await Rig().client.post("/v1/completions", content=b'{"prompt": "a"}')
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]


@in_loop
async def test_a_body_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "MAX_BODY_BYTES", 100)
    response = await Rig().complete(prompt="x" * 100)
    assert response.status_code == 413
    assert "100 bytes" in response.json()["error"]["message"]


@in_loop
async def test_a_long_value_is_not_sent_back_whole() -> None:
    response = await Rig().complete(tools=[{"name": "x" * 10_000}])
    assert len(response.text) < 500


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@in_loop
async def test_an_unknown_model(path: str) -> None:
    body = {"model": "other", "prompt": "x"} if path == "/v1/completions" else {"model": "other", "messages": []}
    response = await Rig().client.post(path, json=body)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "'tiny'" in response.json()["error"]["message"]


@in_loop
async def test_unknown_paths_and_methods() -> None:
    rig = Rig()
    for response, status in (
        (await rig.client.get("/v2"), 404),
        (await rig.client.get("/v1/completions"), 405),
        (await rig.client.delete("/v1/models"), 405),
    ):
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@in_loop
async def test_keys() -> None:
    rig = Rig(keys=("one", "zwölf"))
    for header in (None, "Bearer two", "Basic one", "Bearer", "one", "Bearer on", "Bearer onee"):
        response = await rig.client.get("/v1/models", headers={"authorization": header} if header else {})
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    assert (await rig.complete()).status_code == 401
    assert (await rig.client.get("/metrics")).status_code == 401
    assert (await rig.client.get("/v1/models", headers={"authorization": "Bearer one"})).status_code == 200
    in_bytes = {b"authorization": "Bearer zwölf".encode()}
    assert (await rig.client.get("/v1/models", headers=in_bytes)).status_code == 200
    assert (await rig.client.get("/health")).status_code == 200


@in_loop
async def test_an_engine_that_dies_answers_who_waits_and_refuses_who_comes() -> None:
    rig = Rig("Hello")
    rig.engine.pauses = True
    caller = Caller(rig, "/v1/completions", {"prompt": "x"})
    streaming = Caller(rig, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stream": True})
    calls = [asyncio.create_task(caller.call()), asyncio.create_task(streaming.call())]
    while rig.engine.num_running < 2:
        await rig.engine.first_token_out.wait()
        await asyncio.sleep(0)
    rig.engine.die("rank 1 was killed")
    await asyncio.gather(*calls)
    assert caller.sent[0]["status"] == 503
    assert "rank 1 was killed" in json.loads(caller.text)["error"]["message"]
    last, done = streaming.text.removesuffix("\n\n").split("\n\n")[-2:]
    assert "rank 1 was killed" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert done == "data: [DONE]"
    for response in (await rig.complete(), await rig.complete(stream=True), await rig.client.get("/health")):
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_dead"
        assert "rank 1 was killed" in response.json()["error"]["message"]


@in_loop
async def test_a_request_that_the_engine_fails() -> None:
    rig = Rig("ab")
    rig.engine.last = {"finish_reason": "error", "error": "out of blocks"}
    response = await rig.complete()
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "out of blocks", "type": "server_error", "param": None, "code": "engine_error"
    }  # fmt: skip
    assert events(await rig.complete(stream=True))[-1]["error"]["message"] == "out of blocks"


@in_loop
async def test_our_own_mistake_is_not_told_in_detail() -> None:
    rig = Rig()
    rig.engine.tokenizer.encode = None
    response = await rig.complete()
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "NoneType" not in response.text
