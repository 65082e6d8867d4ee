"""What is missing for ranks of another size is said before any is started."""

from __future__ import annotations

from typing import Any

import pytest

import phalanx.membership.room as room
from phalanx.config import Config
from phalanx.errors import ConfigError
from phalanx.membership.resize import Size


def config(device: str, dp: int, tp: int = 1, **settings: Any) -> Config:
    sizes = {"data_parallel_size": dp, "tensor_parallel_size": tp, "enable_expert_parallel": True}
    return Config.build(model="m", device=device, **sizes, **settings)


def test_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "num_cores", lambda: 4)
    room.check_devices(config("cpu", 4), Size(2, 1))
    with pytest.raises(ConfigError, match=r"data_parallel_size: 4 .*4 cores, too few for 4 ranks of 2 threads"):
        room.check_devices(config("cpu", 4, threads_per_rank=2), Size(2, 1))
    with pytest.raises(ConfigError, match=r"tensor_parallel_size: 4 .*4 cores, too few for 8 ranks"):
        room.check_devices(config("cpu", 2, 4), Size(2, 1))


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "visible_gpus", lambda: ["0", "1"])
    with pytest.raises(ConfigError, match=r"data_parallel_size: 4 .*4 GPUs are needed and 2 can be used"):
        room.check_devices(config("cuda", 4), Size(2, 1))
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization \(0.9\) of a GPU: start with 0.5 or less"):
        room.check_devices(config("cuda", 2, gpu_memory_utilization=0.9), Size(1, 1))
    room.check_devices(config("cuda", 2, gpu_memory_utilization=0.5), Size(1, 1))
    room.check_devices(config("cuda", 2, kv_cache_memory=1 << 30), Size(1, 1))


@pytest.mark.parametrize(("dp", "needed"), [(1, "2.00"), (2, "2.00"), (3, "3.00")])
def test_memory(dp: int, needed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of a GiB each serve, as two replicas."""
    monkeypatch.setattr(room, "bytes_of_family", lambda pid: 1 << 30)
    monkeypatch.setattr(room, "free_host_bytes", lambda: 3 << 30)
    room.check_memory(config("cpu", dp), Size(2, 1), [1, 2])
    monkeypatch.setattr(room, "free_host_bytes", lambda: (2 << 30) - 1)
    with pytest.raises(ConfigError, match=f"take {needed} GiB more memory, and 2.00 GiB are free"):
        room.check_memory(config("cpu", dp), Size(2, 1), [1, 2])
