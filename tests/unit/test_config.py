"""Settings are checked as a whole, and a mistake names the field, its value and what is allowed."""

from types import SimpleNamespace

import pytest

from phalanx.config import Config, settings_by_name
from phalanx.errors import ConfigError


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


def test_a_placement_group_may_be_given_as_an_object() -> None:
    group = SimpleNamespace(id=bytes.fromhex("c0ffee"))  # Ray's ids have `hex` as bytes do
    config = Config.build(model="m", launcher="ray", placement_group=group, ray_bundle_indices=[1, 0])
    assert config.cluster.placement_group == "c0ffee"
    assert config.cluster.ray_bundle_indices == (1, 0)


def test_no_two_sections_share_a_name() -> None:
    sections = ("model", "parallel", "cache", "scheduler", "executor", "cluster")
    fields = [field for section in sections for field in _fields(section)]
    assert sorted(fields) == sorted(settings_by_name())


def _fields(section: str) -> tuple[str, ...]:
    return tuple(field for field, owner in settings_by_name().items() if owner == section)
