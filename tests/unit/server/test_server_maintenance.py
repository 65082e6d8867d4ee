"""/reload, /sleep, /wake and /maintenance, and what other requests see of them."""

from __future__ import annotations

import asyncio

import pytest
from server_rig import Rig, in_loop

from phalanx.errors import CheckpointError, MaintenanceError, NotNowError
from phalanx.protocol.client import Reload, Sleep, Wake
from phalanx.server import waiting_room


@in_loop
async def test_a_reload_answers_when_it_is_done_and_shows_until_then() -> None:
    rig = Rig()
    asking = asyncio.create_task(rig.client.post("/reload", json={"model": "/new", "when": "idle", "timeout_s": 5}))
    while not rig.engine.orders:
        await asyncio.sleep(0)
    running = (await rig.client.get("/maintenance")).json()
    assert running["last"]["order"] == "reload" and running["last"]["state"] == "running"
    second = await rig.client.post("/sleep", json={})
    assert (second.status_code, second.json()["error"]["code"]) == (409, "not_now")
    rig.engine.maintained.set()
    answer = await asking
    assert (answer.status_code, answer.json()["last"]["state"]) == (200, "done")
    assert answer.json()["engines"] == [{"engine": 0, "weights_version": 2, "epoch": 1, "state": "serving"}]
    assert rig.engine.orders == [Reload("/new", "idle", 5.0)]
    metrics = (await rig.client.get("/metrics")).text
    assert 'phalanx_maintenance_total{order="reload",outcome="done"} 1.0' in metrics
    assert 'phalanx_weights_version{engine="0"} 2.0' in metrics


@in_loop
async def test_nothing_is_done_to_an_engine_that_is_started_again() -> None:
    rig = Rig()
    rig.engine.asleep, rig.engine.down = 2, "killed"
    (engine,) = (await rig.client.get("/maintenance")).json()["engines"]
    assert (engine["state"], engine["level"]) == ("restarting", 2)
    rig.engine.down, rig.engine.dead = None, "killed"
    (engine,) = (await rig.client.get("/maintenance")).json()["engines"]
    assert engine["state"] == "restarting", "a replica whose engine is replaced by another one"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (CheckpointError("hidden_size differs"), 400, None),
        (NotNowError("it is asleep"), 409, "not_now"),
        (MaintenanceError("a rank died"), 500, "maintenance_failed"),
    ],
)
@in_loop
async def test_what_goes_wrong_is_told(error: Exception, status: int, code: str | None) -> None:
    rig = Rig()
    rig.engine.order_fails = error
    rig.engine.maintained.set()
    answer = await rig.client.post("/reload", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["error"]["message"] == str(error)
    last = (await rig.client.get("/maintenance")).json()["last"]
    assert (last["state"], last["error"]) == ("failed", str(error))


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/reload", {"when": "later"}, "when"),
        ("/reload", {"timeout_s": 0}, "timeout_s"),
        ("/sleep", {"level": 3}, "level"),
        ("/wake", {"model": ""}, "model"),
    ],
)
@in_loop
async def test_a_wrong_order(path: str, body: dict[str, object], param: str) -> None:
    rig = Rig()
    answer = await rig.client.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"], rig.engine.orders) == (400, param, [])


@in_loop
async def test_keys_are_asked_for() -> None:
    rig = Rig(keys=("secret",))
    for path in ("/reload", "/sleep", "/wake"):
        assert (await rig.client.post(path, json={})).status_code == 401
    assert (await rig.client.get("/maintenance")).status_code == 401


@in_loop
async def test_requests_wait_for_the_end_of_a_sleep() -> None:
    rig = Rig()
    rig.engine.maintained.set()
    assert (await rig.client.post("/sleep", json={"level": 2})).json()["engines"][0]["level"] == 2
    health = await rig.client.get("/health")
    assert (health.status_code, health.json()) == (200, {"status": "asleep"})
    asking = asyncio.create_task(rig.complete())
    while rig.service.num_waiting != 1:
        await asyncio.sleep(0)
    assert (await rig.client.post("/wake", json={"model": "/new"})).status_code == 200
    answer = await asking
    assert (answer.status_code, answer.headers["x-phalanx-weights-version"]) == (200, "1")
    assert rig.engine.orders == [Sleep(2), Wake("/new")]


@in_loop
async def test_a_request_does_not_wait_for_ever() -> None:
    rig = Rig()
    rig.engine.asleep = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waiting_room, "LONGEST_WAIT_S", 0.01)
        answer = await rig.complete()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_asleep")
    assert answer.headers["retry-after"] == "5"


@in_loop
async def test_headers_tell_which_weights_have_made_an_answer() -> None:
    rig = Rig("Hello")
    rig.engine.pauses = True
    asking = asyncio.create_task(rig.complete())
    await rig.engine.first_token_out.wait()
    rig.engine.weights_version = 2
    rig.engine.go.set()
    assert (await asking).headers["x-phalanx-weights-version"] == "1, 2"
    streamed = await rig.complete(stream=True)
    assert (streamed.headers["x-phalanx-weights-version"], streamed.headers["x-phalanx-epoch"]) == ("2", "1")
