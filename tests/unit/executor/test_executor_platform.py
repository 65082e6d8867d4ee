"""What the host offers, without importing torch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from phalanx.config import Config
from phalanx.errors import ConfigError
from phalanx.executor import platform


def config(**settings: object) -> Config:
    return Config.build(model="m", **settings)


@pytest.mark.parametrize(
    ("gpus", "ranks", "wanted", "device"),
    [
        (0, 1, "auto", "cpu"),
        (1, 1, "auto", "cuda"),
        (1, 2, "auto", "cpu"),
        (2, 2, "cuda", "cuda"),
        (4, 1, "cpu", "cpu"),
    ],
)
def test_device(monkeypatch: pytest.MonkeyPatch, gpus: int, ranks: int, wanted: str, device: str) -> None:
    monkeypatch.setattr(platform, "visible_gpus", lambda: [str(gpu) for gpu in range(gpus)])
    monkeypatch.setattr(platform, "torch_has_cuda", lambda: True)
    assert platform.pick_device(config(tensor_parallel_size=ranks, device=wanted)) == device


@pytest.mark.parametrize(
    ("gpus", "sizes", "complaint"),
    [
        (1, {"tensor": 2}, "2 GPUs are needed and 1 can be used; use cpu, or lower tensor_parallel_size (2)"),
        (1, {"data": 3}, "3 GPUs are needed and 1 can be used; use cpu, or lower data_parallel_size (3)"),
        (
            5,
            {"tensor": 4, "pipeline": 3, "data": 2},
            "24 GPUs are needed and 5 can be used; use cpu, or lower tensor_parallel_size (4) or "
            "pipeline_parallel_size (3) or data_parallel_size (2)",
        ),
        (0, {}, "1 GPUs are needed and 0 can be used; use cpu"),
    ],
)
def test_too_few_gpus_is_the_users_to_solve(
    monkeypatch: pytest.MonkeyPatch, gpus: int, sizes: dict[str, int], complaint: str
) -> None:
    monkeypatch.setattr(platform, "visible_gpus", lambda: [str(gpu) for gpu in range(gpus)])
    monkeypatch.setattr(platform, "torch_has_cuda", lambda: True)
    with pytest.raises(ConfigError) as failed:
        platform.pick_device(config(**{f"{kind}_parallel_size": n for kind, n in sizes.items()}, device="cuda"))
    assert failed.value.allowed == complaint


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("0", 1), ("0,3", 2), ("-1", 0), ("GPU-1a,GPU-2b", 2)])
def test_visible_devices_are_respected(monkeypatch: pytest.MonkeyPatch, visible: str, count: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(platform.visible_gpus()) == count


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(8, 1, 8), (8, 3, 2), (2, 4, 1)])
def test_threads_share_the_cores(monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, threads: int) -> None:
    monkeypatch.setattr(platform, "num_cores", lambda: cores)
    assert platform.pick_threads(config(tensor_parallel_size=ranks)) == threads


def test_never_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "num_cores", lambda: 2)
    with pytest.raises(ConfigError, match="there are 2 cores"):
        platform.pick_threads(config(threads_per_rank=3))


def test_the_brain_side_of_the_executor_needs_no_torch() -> None:
    code = "import sys, phalanx.executor.start; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_ray_the_launcher_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"launcher: 'ray' .* pip install 'phalanx\[ray\]'"):
        platform.require_ray()
