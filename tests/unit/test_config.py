"""Settings are checked as a whole, and a mistake names the field, its value and what is allowed."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from phalanx.config import Config, ServerConfig, _warn_once, convert, settings_by_name
from phalanx.errors import ConfigError
from phalanx.executor.start import settle


def test_flat_names_reach_their_sections() -> None:
    config = Config.build(model="m", tensor_parallel_size=2, block_size=8, dtype="float32")
    assert config.parallel.tensor_parallel_size == 2
    assert config.parallel.pipeline_parallel_size == 1
    assert config.cache.block_size == 8
    assert config.model.dtype == "float32"


@pytest.mark.parametrize(
    ("settings", "field", "allowed"),
    [
        ({}, "model", "required"),
        ({"model": "m", "tensor_parallel_size": 0}, "tensor_parallel_size", ">= 1"),
        ({"model": "m", "dtype": "int8"}, "dtype", "one of auto, float32, bfloat16, float16"),
        ({"model": "m", "max_num_seqs": "many"}, "max_num_seqs", "int"),
        ({"model": "m", "gpu_memory_utilization": 1.5}, "gpu_memory_utilization", "<= 1"),
        ({"model": "m", "step_timeout_s": float("inf")}, "step_timeout_s", "<= 1000000"),
        ({"model": "m", "wings": 2}, "wings", "no such setting"),
        ({"model": "m", "launcher": "inline", "tensor_parallel_size": 2}, "launcher", "use local"),
        ({"model": "m", "max_num_batched_tokens": 8}, "max_num_batched_tokens", "at least max_num_seqs"),
        ({"model": "m", "device": "cpu", "collective_backend": "nccl"}, "collective_backend", "shm or gloo"),
        ({"model": "m", "device": "cuda", "collective_backend": "shm"}, "collective_backend", "nccl"),
        ({"model": "m", "ray_address": "10.0.0.1:6379"}, "ray_address", "only with launcher ray"),
        ({"model": "m", "launcher": "local", "node_timeout_s": 3.0}, "node_timeout_s", "only with launcher ray"),
        (
            {"model": "m", "data_parallel_size": 2, "data_parallel_size_local": 1},
            "data_parallel_size_local",
            "(2) are on",
        ),
        (
            {"model": "m", "launcher": "ray", "data_parallel_size": 2, "data_parallel_size_local": 3},
            "data_parallel_size_local",
            "at most data_parallel_size (2)",
        ),
        ({"model": "m", "launcher": "ray", "ray_bundle_indices": [0, -1]}, "ray_bundle_indices", ">= 0"),
        ({"model": "m", "launcher": "ray", "ray_runtime_env": "x"}, "ray_runtime_env", "object"),
        ({"model": "m", "launcher": "ray", "ray_per_worker_gpus": 0}, "ray_per_worker_gpus", "> 0"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, object], field: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.build(**settings)
    assert caught.value.field == field
    assert allowed in caught.value.allowed
    assert field in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_wrong_key_is_the_fault_of_the_setting_that_it_is_in() -> None:
    with pytest.raises(ConfigError, match="of each key: Expected `str`, got `int`") as caught:
        Config.build(model="m", launcher="ray", ray_runtime_env={1: "x"})
    assert (caught.value.field, caught.value.value) == ("ray_runtime_env", {1: "x"})


SECRET = {"env_vars": {"TOKEN": "a secret"}}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"launcher": "local", "ray_runtime_env": SECRET}, "{'env_vars': '...'}"),
        ({"launcher": "ray", "ray_runtime_env": "TOKEN=a secret"}, "'...'"),
        ({"launcher": "ray", "ray_runtime_env": {1: "a secret"}}, "{1: '...'}"),
    ],
)
def test_an_error_tells_no_secret(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.build(model="m", **settings)
    assert str(caught.value).startswith(f"ray_runtime_env: {told} is not possible: ")
    assert "secret" not in str(caught.value)


def test_neither_does_what_dumps_and_warnings_say(caplog: pytest.LogCaptureFixture) -> None:
    config = Config.build(model="m", launcher="ray", ray_runtime_env=SECRET)
    assert config.cluster.ray_runtime_env == SECRET
    assert config.changed()["ray_runtime_env"] == "{'env_vars': '...'}"
    _warn_once.cache_clear()
    config.warn_without_effect("ray_runtime_env", "of a test")
    assert "ray_runtime_env = {'env_vars': '...'} has no effect: of a test" in caplog.text
    assert "secret" not in caplog.text


def test_a_wrong_key_at_the_top_is_the_fault_of_the_whole() -> None:
    unnamed: dict[object, object] = {1: 2}
    with pytest.raises(ConfigError, match=r"ServerConfig: .*of each key: Expected `str`"):
        convert(unnamed, ServerConfig)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "warnings"),
    [
        ({"device": "cpu"}, []),
        ({"device": "cpu", "gpu_memory_utilization": 0.1}, ["gpu_memory_utilization = 0.1 has no effect: .* the CPU"]),
        ({"device": "cuda", "gpu_memory_utilization": 0.1}, []),
        (
            {"device": "cuda", "gpu_memory_utilization": 0.1, "kv_cache_memory": 1 << 30},
            ["gpu_memory_utilization = 0.1 has no effect: kv_cache_memory"],
        ),
        ({"device": "cpu", "collective_backend": "shm"}, ["collective_backend = 'shm' has no effect: one rank"]),
        ({"device": "cpu", "collective_backend": "gloo", "pipeline_parallel_size": 2}, []),
        ({"device": "cpu", "collective_guard": "strict"}, ["collective_guard = 'strict' has no effect: one rank"]),
        ({"device": "cpu", "collective_guard": "off", "tensor_parallel_size": 2}, []),
        ({"device": "cpu", "pack_weights": False}, []),
        ({"device": "cuda", "pack_weights": False}, ["pack_weights = False has no effect: .* on a CPU only"]),
        ({"device": "cpu", "dtype": "float16", "pack_weights": False}, ["pack_weights = False .* float16"]),
        ({"device": "cuda", "dequantise_weights": True}, []),
        (
            {"device": "cpu", "share_weights": "always", "heal": False},
            ["share_weights = 'always' has no effect: .* heal"],
        ),
        ({"device": "cuda", "share_weights": "always"}, ["share_weights = 'always' has no effect: .* on a CPU only"]),
        ({"device": "cpu", "dequantise_weights": True}, ["dequantise_weights = True has no effect: on a CPU all"]),
        (
            {"device": "cpu", "launcher": "ray", "pipeline_parallel_size": 2, "allow_split_tensor_parallel": True},
            ["allow_split_tensor_parallel = True has no effect: there is one rank"],
        ),
        ({"device": "auto", "gpu_memory_utilization": 0.1, "pack_weights": False}, []),
        (
            {"device": "cpu", "gpu_memory_utilization": 0.1, "collective_backend": "gloo"},
            ["gpu_memory_utilization", "collective_backend"],
        ),
    ],
)
def test_settings_without_effect_are_named_once(
    settings: dict[str, object], warnings: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    _warn_once.cache_clear()
    config = Config.build(model="m", **settings)
    assert not caplog.messages, "before it is known where the ranks compute"
    config.check()
    config.check()
    assert len(caplog.messages) == len(warnings)
    for message, expected in zip(caplog.messages, warnings, strict=True):
        assert re.match(expected, message), message


def test_a_start_warns(caplog: pytest.LogCaptureFixture) -> None:
    _warn_once.cache_clear()
    checkpoint: Any = SimpleNamespace(max_model_len=512, num_layers=3, dtype="float16")
    settle(Config.build(model="m", device="cpu", pack_weights=False, collective_backend="gloo"), checkpoint)
    assert [message.split()[0] for message in caplog.messages] == ["collective_backend", "pack_weights"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("has_experts", [False, True])
def test_dequantising_without_experts_in_four_bits(
    device: str, has_experts: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _warn_once.cache_clear()
    monkeypatch.setattr("phalanx.executor.start.pick_device", lambda config: device)
    checkpoint: Any = SimpleNamespace(
        name="m", max_model_len=512, num_layers=3, dtype="float16", has_experts_in_four_bits=has_experts
    )
    settle(Config.build(model="m", dequantise_weights=True), checkpoint)
    expected = "on a CPU all weights" if device == "cpu" else "m has no experts in AWQ or compressed-tensors"
    assert [expected in message for message in caplog.messages] == [True] * (device == "cpu" or not has_experts)


def test_a_placement_group_may_be_given_as_an_object() -> None:
    group = SimpleNamespace(id=bytes.fromhex("c0ffee"))  # Ray's ids have `hex` as bytes do
    config = Config.build(model="m", launcher="ray", placement_group=group, ray_bundle_indices=[1, 0])
    assert config.cluster.placement_group == "c0ffee"
    assert config.cluster.ray_bundle_indices == (1, 0)


def test_no_two_sections_share_a_name() -> None:
    sections = ("model", "parallel", "cache", "scheduler", "executor", "cluster", "healing")
    fields = [field for section in sections for field in _fields(section)]
    assert sorted(fields) == sorted(settings_by_name())


def _fields(section: str) -> tuple[str, ...]:
    return tuple(field for field, owner in settings_by_name().items() if owner == section)
