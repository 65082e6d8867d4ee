"""How much a rank may take for its KV cache."""

from __future__ import annotations

import pytest
import torch

from phalanx.config import CacheConfig
from phalanx.errors import ConfigError
from phalanx.memory import sizing

CPU = torch.device("cpu")


def ask(cache: CacheConfig, useful_bytes: int, ranks_on_host: int = 1) -> int:
    return sizing.cache_bytes(
        cache, CPU, useful_bytes=useful_bytes, peak_activation_bytes=0, ranks_on_host=ranks_on_host
    )


def test_what_is_asked_for_is_given() -> None:
    assert ask(CacheConfig(kv_cache_memory=12345), useful_bytes=10) == 12345


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_cache_memory: 1125899906842624 is not possible: each rank has"):
        ask(CacheConfig(kv_cache_memory=1 << 50), useful_bytes=10)


def test_never_more_than_can_be_used() -> None:
    assert ask(CacheConfig(), useful_bytes=1000) == 1000


def test_ranks_of_one_host_share_a_part_of_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "free_host_bytes", lambda: 8000)
    assert ask(CacheConfig(), useful_bytes=10**9, ranks_on_host=2) == 1000


@pytest.mark.parametrize(("asked", "given"), [(None, 590), (640, 640), (641, None)])
def test_on_a_gpu_a_step_keeps_its_room(monkeypatch: pytest.MonkeyPatch, asked: int | None, given: int | None) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 1000))
    cache = CacheConfig(kv_cache_memory=asked, gpu_memory_utilization=0.95)
    gpu = torch.device("cuda", 0)

    def ask() -> int:
        return sizing.cache_bytes(cache, gpu, useful_bytes=1, peak_activation_bytes=60, ranks_on_host=1)

    if given is not None:
        assert ask() == given
        return
    with pytest.raises(ConfigError, match="each rank has 640 bytes free"):
        ask()
