"""`/scale` and `/drain`: what is begun, followed, cancelled and refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from server_rig import Rig, in_loop

from phalanx.engine.engine import ReplicaState, Strength
from phalanx.errors import ConfigError, ResizeError, ResizeRefusedError, ResizeUnderWayError


def two_replicas(rig: Rig) -> None:
    rig.engine.replica_states = (
        ReplicaState(replica=0, state="serving", num_requests=3),
        ReplicaState(replica=4, state="serving", num_requests=0),
        ReplicaState(replica=5, state="joining", num_requests=0, phase="loading", done=1, total=2),
    )


async def report(rig: Rig) -> Any:
    answer = await rig.client.get("/scale")
    assert answer.status_code == 200
    return answer.json()


async def until_over(rig: Rig) -> Any:
    while (found := await report(rig))["resize"]["state"] == "running":
        await asyncio.sleep(0)
    return found["resize"]


@in_loop
async def test_a_resize_is_begun_and_followed() -> None:
    rig = Rig()
    two_replicas(rig)
    assert (await report(rig))["resize"] is None
    answer = await rig.client.post("/scale", json={"data_parallel_size": 3, "drain_timeout_s": 2})
    assert answer.status_code == 202
    assert rig.engine.resizes == [(3, [], 2.0)]
    found = answer.json()
    assert found["data_parallel_size"] == 2, "one joins, and does not serve yet"
    assert found["replicas"][2] == {
        "replica": 5,
        "state": "joining",
        "num_requests": 0,
        "phase": "loading",
        "done": 1,
        "total": 2,
    }
    assert found["resize"].items() >= {"id": 1, "size_before": 2, "data_parallel_size": 3, "state": "running"}.items()
    rig.engine.resized.set()
    assert (await until_over(rig))["state"] == "done"
    metrics = (await rig.client.get("/metrics")).text
    assert 'phalanx_resizes_total{outcome="done"} 1.0' in metrics and "phalanx_resize_last_seconds " in metrics


@in_loop
async def test_only_the_tensor_parallel_size() -> None:
    rig = Rig()
    answer = await rig.client.post("/scale", json={"tensor_parallel_size": 2})
    assert answer.status_code == 202 and rig.engine.resizes == [(None, [], 30.0)]
    assert rig.engine.tensor_parallel_sizes == [2]
    told = answer.json()["resize"]
    assert (told["size_before"], told["data_parallel_size"], told["tensor_parallel_size"]) == (1, 1, 2)
    assert told["tensor_parallel_size_before"] == 1
    rig.engine.resized.set()
    await until_over(rig)


@in_loop
async def test_a_replica_is_drained() -> None:
    rig = Rig()
    two_replicas(rig)
    assert (await rig.client.post("/drain", json={"replica": 4})).status_code == 202
    assert rig.engine.resizes == [(1, [4], 30.0)]
    rig.engine.replica_states = rig.engine.replica_states[:1]
    rig.engine.resized.set()
    await until_over(rig)
    refused = await rig.client.post("/drain", json={"replica": 0})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "replica")


@in_loop
async def test_a_node_is_drained_and_what_is_missing_is_told() -> None:
    rig = Rig()
    two_replicas(rig)
    answer = await rig.client.post("/drain", json={"node": "beta", "drain_timeout_s": 0})
    assert (answer.status_code, answer.json()["resize"]["node"]) == (202, "beta")
    assert (rig.engine.drains, rig.engine.resizes) == ([("beta", 0.0)], [])
    rig.engine.replica_states = rig.engine.replica_states[:1]
    because = "node beta is drained"
    rig.engine.strength = Strength(
        wanted=2, num_missing=1, missing_because=because, num_lost=1, num_grown=3, drained_nodes=("beta",)
    )
    rig.engine.resized.set()
    ended = await until_over(rig)
    assert (ended["state"], ended["size_before"], ended["data_parallel_size"]) == ("done", 2, 1)
    assert (await report(rig))["strength"]["missing_because"] == because
    status = (await rig.client.get("/status.json")).json()
    assert status["strength"]["drained_nodes"] == ["beta"]
    page = (await rig.client.get("/status")).text
    assert "Missing: 1 of 2 replicas, which do not come back by themselves: node beta is drained" in page
    metrics = (await rig.client.get("/metrics")).text
    for line in ("phalanx_replicas_missing 1.0", "phalanx_replicas_lost_total 1.0", "phalanx_replicas_grown_total 3.0"):
        assert line in metrics
    undone = await rig.client.post("/drain", json={"node": "beta", "undo": True})
    assert (undone.status_code, rig.engine.undone_drains) == (202, ["beta"])


@in_loop
async def test_a_failure_is_reported() -> None:
    rig = Rig()
    rig.engine.resize_fails = ResizeError("replica 1 did not start: no memory")
    rig.engine.resized.set()
    await rig.client.post("/scale", json={"data_parallel_size": 2})
    ended = await until_over(rig)
    assert (ended["state"], ended["error"]) == ("failed", "replica 1 did not start: no memory")


@in_loop
async def test_cancelled() -> None:
    rig = Rig()
    assert (await rig.client.delete("/scale")).status_code == 409
    await rig.client.post("/scale", json={"data_parallel_size": 2})
    await asyncio.sleep(0)
    assert (await rig.client.delete("/scale")).status_code == 202
    assert (await until_over(rig))["state"] == "cancelled"
    assert (await rig.client.delete("/scale")).json()["error"]["code"] == "no_resize"


@pytest.mark.parametrize(
    ("error", "status", "word"),
    [
        (ConfigError("data_parallel_size", 2, "there are 2 cores"), 400, "there are 2 cores"),
        (ResizeUnderWayError("1", "2 replicas"), 409, "from 1 to 2 replicas is under way"),
        (ResizeRefusedError("the engine is being started again"), 409, "is being started again"),
    ],
)
def test_what_the_engine_refuses(error: Exception, status: int, word: str) -> None:
    @in_loop
    async def run() -> None:
        rig = Rig()
        rig.engine.refuses_resize = error
        answer = await rig.client.post("/scale", json={"data_parallel_size": 2})
        assert answer.status_code == status
        assert word in answer.json()["error"]["message"]
        assert (await report(rig))["resize"] is None

    run()


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/scale", {}, "data_parallel_size"),
        ("/scale", {"data_parallel_size": 0}, "data_parallel_size"),
        ("/scale", {"data_parallel_size": 2, "pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ("/scale", {"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ("/scale", {"data_parallel_size": 2, "drain_timeout_s": -1}, "drain_timeout_s"),
        ("/scale", {"data_parallel_size": 1, "leaving": [-1]}, "leaving[0]"),
        ("/drain", {"replica": "first"}, "replica"),
        ("/drain", {}, "replica"),
        ("/drain", {"replica": 1, "node": "beta"}, "replica"),
        ("/drain", {"replica": 1, "undo": True}, "undo"),
    ],
)
def test_a_wrong_field_is_named(path: str, body: dict[str, Any], param: str) -> None:
    @in_loop
    async def run() -> None:
        rig = Rig()
        answer = await rig.client.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert rig.engine.resizes == []

    run()


@in_loop
async def test_it_asks_for_a_key_and_counts_replicas() -> None:
    rig = Rig(keys=("secret",))
    for method, path in (("GET", "/scale"), ("POST", "/scale"), ("DELETE", "/scale"), ("POST", "/drain")):
        assert (await rig.client.request(method, path, json={"data_parallel_size": 2})).status_code == 401
    rig = Rig()
    two_replicas(rig)
    text = (await rig.client.get("/metrics")).text
    assert 'phalanx_replicas{state="serving"} 2.0' in text
    assert 'phalanx_replicas{state="joining"} 1.0' in text
    assert 'phalanx_requests_running{replica="4"} 0.0' in text
    document = (await rig.client.get("/openapi.json")).json()
    assert document["paths"]["/scale"]["post"]["requestBody"]["content"]["application/json"]["schema"]
