"""Models, health, metrics, version, tokens, the API's own description."""

import threading
from collections.abc import Callable

from server_rig import Rig, in_loop

from phalanx import __version__
from phalanx.protocol.client import BalanceStats, EngineStats, ReplicaStats


@in_loop
async def test_models() -> None:
    rig = Rig()
    (model,) = (await rig.client.get("/v1/models")).json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", 200)
    assert (await rig.client.get("/v1/models/tiny")).json() == model
    assert (await rig.client.get("/v1/models/org/other")).status_code == 404


@in_loop
async def test_health_and_version() -> None:
    rig = Rig()
    health = await rig.client.get("/health")
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    assert (await rig.client.get("/version")).json() == {"version": __version__}


@in_loop
async def test_metrics() -> None:
    rig = Rig("Hello")
    rig.engine.stats = EngineStats((ReplicaStats(3, 4, 25, 100, 7, 1, 50, 20, 60),))
    await rig.complete()
    await rig.complete(temperature=-1)
    lines = (await rig.client.get("/metrics")).text.splitlines()
    for line in (
        "phalanx_engine_up 1.0",
        'phalanx_requests_running{replica="0"} 3.0',
        'phalanx_requests_waiting{replica="0"} 4.0',
        'phalanx_kv_cache_used_ratio{replica="0"} 0.25',
        'phalanx_prompt_tokens_total{replica="0"} 50.0',
        'phalanx_prompt_tokens_cached_total{replica="0"} 20.0',
        'phalanx_generated_tokens_total{replica="0"} 60.0',
        'phalanx_requests_total{outcome="stop"} 1.0',
        'phalanx_requests_refused_total{status="400"} 1.0',
        "phalanx_time_to_first_token_seconds_count 1.0",
        "phalanx_inter_token_latency_seconds_count 4.0",
        "phalanx_request_seconds_count 1.0",
        'phalanx_engine_healthy{engine="0"} 1.0',
        'phalanx_engine_seconds_since_step{engine="0"} 2.5',
        'phalanx_ledger_ranks_watched{engine="0"} 2.0',
        'phalanx_ledger_verdicts_total{cause="late"} 3.0',
        'phalanx_ledger_verdicts_total{cause="gone"} 0.0',
    ):
        assert line in lines
    rig.engine.die("gone")
    after = (await rig.client.get("/metrics")).text
    assert "phalanx_engine_up 0.0" in after and 'phalanx_engine_healthy{engine="0"} 0.0' in after


@in_loop
async def test_metrics_of_experts_that_move() -> None:
    rig = Rig()
    assert "phalanx_expert" not in (await rig.client.get("/metrics")).text
    rig.engine.stats = EngineStats((ReplicaStats(0, 0, 0, 1, 0, 0, 0, 0, 0),), BalanceStats(2.5, 1.25, 3))
    lines = (await rig.client.get("/metrics")).text.splitlines()
    assert 'phalanx_expert_load_ratio{kind="measured"} 2.5' in lines
    assert 'phalanx_expert_load_ratio{kind="expected"} 1.25' in lines
    assert "phalanx_expert_moves_total 3.0" in lines


@in_loop
async def test_two_servers_in_a_process_count_apart() -> None:
    one, other = Rig(), Rig()
    await one.complete()
    assert "phalanx_request_seconds_count 0.0" in (await other.client.get("/metrics")).text


@in_loop
async def test_tokens_and_back() -> None:
    rig = Rig()
    answer = (await rig.client.post("/tokenize", json={"prompt": "ab"})).json()
    assert answer == {"count": 3, "max_model_len": 200, "tokens": [1, 97, 98]}
    chat = {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": False}
    assert (await rig.client.post("/tokenize", json=chat)).json()["count"] == len("user:a")
    both = await rig.client.post("/tokenize", json={"prompt": "a", **chat})
    assert both.status_code == 400
    assert (await rig.client.post("/detokenize", json={"tokens": [1, 97]})).json() == {"prompt": "<s>a"}
    assert (await rig.client.post("/detokenize", json={"tokens": [-1]})).json()["error"]["param"] == "tokens"


@in_loop
async def test_what_takes_long_holds_nobody_up() -> None:
    rig = Rig()
    encode, decode = rig.engine.tokenizer.encode, rig.engine.tokenizer.decode
    threads: list[threading.Thread] = []

    def noting_threads(function: Callable[..., object]) -> Callable[..., object]:
        return lambda *args, **settings: threads.append(threading.current_thread()) or function(*args, **settings)

    rig.engine.tokenizer.encode, rig.engine.tokenizer.decode = noting_threads(encode), noting_threads(decode)
    for path, body in (
        ("/v1/completions", {"prompt": ["a" * 11_000] * 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 11_000}] * 2}),
        ("/detokenize", {"tokens": [97] * 22_000}),
    ):
        threads.clear()
        await rig.client.post(path, json=body)
        assert threads
        assert threading.main_thread() not in threads


@in_loop
async def test_a_long_prompt_is_tokenized_the_same() -> None:
    rig = Rig()
    answer = (await rig.client.post("/tokenize", json={"prompt": "a" * 50_000})).json()
    assert answer["count"] == 50_001


@in_loop
async def test_the_description_has_the_bodies() -> None:
    document = (await Rig().client.get("/openapi.json")).json()
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = document["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    assert {"prompt", "temperature", "stream_options"} <= set(schema["properties"])
