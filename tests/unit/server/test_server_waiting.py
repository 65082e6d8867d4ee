"""Requests that come while the engine is being started again."""

from __future__ import annotations

import asyncio

import pytest
from server_rig import Caller, Rig, in_loop

from phalanx.server import waiting_room
from phalanx.server.api_error import ApiError


def down() -> Rig:
    rig = Rig()
    rig.engine.down = "it was killed"
    return rig


async def until_waiting(rig: Rig, num: int) -> None:
    while rig.service.num_waiting != num:
        await asyncio.sleep(0)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@in_loop
async def test_they_wait_and_are_answered(path: str) -> None:
    rig = down()
    asked = rig.complete() if "chat" not in path else rig.chat()
    waiting = asyncio.create_task(asked)
    await until_waiting(rig, 1)
    assert not rig.engine.asked
    rig.engine.down = None
    assert (await waiting).status_code == 200
    assert rig.service.num_waiting == 0


@in_loop
async def test_what_needs_no_engine_is_answered_at_once() -> None:
    rig = down()
    assert (await rig.client.post("/tokenize", json={"prompt": "Hi"})).status_code == 200
    assert (await rig.complete(max_tokens=-1)).status_code == 400


@in_loop
async def test_a_client_that_leaves_waits_no_more() -> None:
    rig = down()
    caller = Caller(rig, "/v1/completions", {"prompt": "Hi"})
    calling = asyncio.create_task(caller.call())
    await until_waiting(rig, 1)
    caller.leave()
    await calling
    assert (rig.service.num_waiting, rig.service.num_in_flight, rig.engine.asked) == (0, 0, [])


@in_loop
async def test_a_server_that_stops_lets_nobody_wait() -> None:
    rig = down()
    waiting = asyncio.create_task(rig.complete(stream=True))
    await until_waiting(rig, 1)
    rig.service.cut(ApiError(503, "the server has shut down", code="shutting_down"))
    answer = await waiting
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")


@in_loop
async def test_an_engine_that_is_dead_after_all() -> None:
    rig = down()
    waiting = asyncio.create_task(rig.complete())
    await until_waiting(rig, 1)
    rig.engine.die("it did not start again")
    rig.engine.down = None
    answer = await waiting
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")


@pytest.mark.parametrize(
    ("limit", "value", "says"),
    [("MOST_WAITING", 0, "0 requests wait for it already"), ("LONGEST_WAIT_S", 0.01, "has waited for 0.01 s")],
)
@in_loop
async def test_there_are_limits(limit: str, value: float, says: str) -> None:
    rig = down()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waiting_room, limit, value)
        answer = await rig.complete(stream=True)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    error = answer.json()["error"]
    assert error["code"] == "engine_restarting"
    assert error["message"].startswith("the engine is being started again: it was killed")
    assert says in error["message"]
