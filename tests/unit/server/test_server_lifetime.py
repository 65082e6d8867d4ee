"""Requests end with their clients, and with the server in good order."""

import asyncio
import json

import pytest
from server_rig import Caller, Rig, in_loop

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
