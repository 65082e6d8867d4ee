"""/health fails when steps do not progress, and says who keeps them from it."""

import asyncio

from ledger_instances import reported
from server_rig import Rig, in_loop
from starlette.requests import Request

from phalanx.engine.condition import Condition
from phalanx.protocol.client import MaintenanceStats
from phalanx.server.api_error import ApiError, engine_dead
from phalanx.server.doorway import Doorway
from phalanx.server.health import health

WELL, STUCK = Condition(pid=1), Condition(pid=2, trouble=reported(1))
DEAD = Condition(pid=3, dead="rank 1 was killed", trouble=reported(1))


def test_all_is_well() -> None:
    assert health([WELL, WELL], None).status == 200 and health([WELL], None).body.status == "ok"


def test_none_progresses() -> None:
    found = health([STUCK, DEAD], None)
    assert (found.status, found.body.status, found.body.verdict) == (503, "stuck", reported(1))
    assert found.body.error is not None and found.body.error.code == "stuck"
    assert found.body.error.message == "steps do not progress: rank 1 on here does it"


def test_some_progress() -> None:
    for sick in (STUCK, DEAD):
        found = health([WELL, sick], None)
        assert (found.status, found.body.status, found.body.verdict) == (200, "degraded", reported(1))
        assert found.body.error is not None


def test_replicas_that_sleep() -> None:
    asleep = Condition(pid=5, maintenance=MaintenanceStats("asleep", 1))
    assert health([asleep, asleep], None).body.status == "asleep"
    found = health([asleep, WELL], None)
    assert (found.status, found.body.status) == (200, "degraded")
    assert found.body.error is not None
    assert found.body.error.message == "1 of 2 replicas are asleep until POST /wake"


def test_a_dead_engine_says_what_ended_it() -> None:
    found = health([DEAD], engine_dead("rank 1 was killed"))
    assert (found.status, found.body.status, found.body.verdict) == (503, "dead", reported(1))
    assert found.body.error is not None and found.body.error.message == "the engine has stopped: rank 1 was killed"


def test_an_engine_that_is_started_again() -> None:
    down = Condition(pid=4, down="it was killed", phase="loading", trouble=reported(1))
    for others in ([], [DEAD]):
        found = health([*others, down], None)
        assert (found.status, found.body.status, found.body.phase) == (503, "restarting", "loading")
        assert found.body.error is not None and found.body.error.code == "engine_restarting"
        assert found.body.error.message == "the engine is being started again: it was killed"
    assert health([down, STUCK], None).body.status == "stuck"
    assert (health([down, WELL], None).status, health([down, WELL], None).body.status) == (200, "degraded")


def test_a_server_that_stops() -> None:
    found = health([WELL], ApiError(503, "the server is shutting down", code="shutting_down"))
    assert (found.status, found.body.status) == (503, "stopping")


@in_loop
async def test_over_http() -> None:
    rig = Rig()
    rig.engine.trouble = reported(1)
    answer = await rig.client.get("/health")
    assert answer.status_code == 503
    body = answer.json()
    assert (body["status"], body["error"]["type"], body["error"]["code"]) == ("stuck", "server_error", "stuck")
    verdict = body["verdict"]
    assert (verdict["cause"], verdict["culprits"], verdict["nodes"]) == ("late", [1], ["here"])
    assert (verdict["paragraph"], verdict["since"]) == ("rank 1 on here does it", "2030-01-01T12:00:00Z")
    assert (await rig.complete()).status_code == 200  # whoever is late may still come
    rig.engine.trouble = None
    assert (await rig.client.get("/health")).json() == {"status": "ok"}


@in_loop
async def test_it_answers_while_ranks_are_looked_at_in_vain() -> None:
    rig = Rig()
    asked, answered = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def hang() -> tuple[()]:
        loop.call_soon_threadsafe(asked.set)
        asyncio.run_coroutine_threadsafe(answered.wait(), loop).result(10.0)
        return ()

    rig.engine.statuses = hang
    looking = asyncio.create_task(rig.client.get("/status.json"))
    await asked.wait()
    assert (await rig.client.get("/health")).status_code == 200
    answered.set()
    assert (await looking).status_code == 200


@in_loop
async def test_while_the_model_loads() -> None:
    sent: list[dict] = []

    async def take(message: dict) -> None:
        sent.append(message)

    doorway = Doorway()
    doorway.phase = "loading"
    for path, has_phase in (("/health", True), ("/v1/models", False)):
        sent.clear()
        await doorway({"type": "http", "path": path, "method": "GET", "headers": []}, Request.receive, take)
        assert sent[0]["status"] == 503 and (b"retry-after", b"1") in sent[0]["headers"]
        body = sent[1]["body"]
        assert b'"message":"not ready yet: loading"' in body
        assert (b'"status":"starting","phase":"loading"' in body) == has_phase
