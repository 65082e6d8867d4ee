"""Requests end with their clients, and with the server in good order."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest
from server_rig import Caller, Rig, in_loop

from phalanx.server import request_body
from phalanx.server.api_error import ApiError


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@in_loop
async def test_a_client_that_leaves_cancels_its_request(stream: bool, n: int) -> None:
    rig = Rig("Hello")
    rig.engine.pauses = True
    caller = Caller(rig, "/v1/completions", {"prompt": "x", "stream": stream, "n": n})
    call = asyncio.create_task(caller.call())
    await rig.engine.first_token_out.wait()
    assert rig.service.num_in_flight == 1
    caller.leave()
    await call
    assert rig.engine.num_running == 0
    assert rig.engine.num_cancelled == n
    assert rig.service.num_in_flight == 0
    assert 'phalanx_requests_total{outcome="cancelled"}' in (await rig.client.get("/metrics")).text


@in_loop
async def test_one_failed_choice_ends_the_others() -> None:
    rig = Rig("ab")
    rig.engine.last = {"finish_reason": "error", "error": "no"}
    assert (await rig.complete(n=4)).status_code == 500
    assert rig.engine.num_running == 0


@in_loop
async def test_a_closing_server_finishes_what_runs_and_takes_nothing_new() -> None:
    rig = Rig("Hello")
    rig.engine.pauses = True
    call = asyncio.create_task(rig.complete())
    await rig.engine.first_token_out.wait()
    rig.service.close()
    refused = await rig.complete()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "shutting_down"
    assert (await rig.client.get("/health")).status_code == 503
    assert not await rig.service.drain(0.01)
    rig.engine.go.set()
    assert (await call).json()["choices"][0]["text"] == "Hello"
    assert await rig.service.drain(0.01)


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_what_does_not_finish_in_time_is_cut_off_with_an_error(stream: bool) -> None:
    rig = Rig("Hello")
    rig.engine.pauses = True
    caller = Caller(rig, "/v1/completions", {"prompt": "x", "stream": stream})
    call = asyncio.create_task(caller.call())
    await rig.engine.first_token_out.wait()
    rig.service.cut(ApiError(503, "too late", code="shutting_down"))
    await call
    assert "too late" in caller.text
    assert caller.sent[0]["status"] == (200 if stream else 503)
    if stream:
        assert caller.text.endswith("data: [DONE]\n\n")
    else:
        assert json.loads(caller.text)["error"]["code"] == "shutting_down"
    assert rig.engine.num_cancelled == 1


async def stall(rig: Rig) -> httpx.Response:
    """The answer to a request whose body never becomes complete."""

    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"prompt"'
        await asyncio.Event().wait()

    return await rig.client.post("/v1/completions", content=pieces(), headers={"content-type": "application/json"})


@in_loop
async def test_an_upload_that_stalls_is_cut_off_with_the_others() -> None:
    rig = Rig()
    stalled = asyncio.create_task(stall(rig))
    while not rig.service.num_in_flight:
        await asyncio.sleep(0)
    rig.service.cut(ApiError(503, "no more", code="shutting_down"))
    assert (await stalled).json()["error"]["message"] == "no more"
    assert await rig.service.drain(1.0)


@in_loop
async def test_an_upload_that_stalls_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "MAX_SILENCE_S", 0.05)
    response = await stall(Rig())
    assert response.status_code == 408
    assert response.json()["error"]["message"] == "9 bytes of the body came, and then nothing for 0.05 s"
