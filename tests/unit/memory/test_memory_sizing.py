"""How much a rank may take for its KV cache."""

from __future__ import annotations

from pathlib import Path

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


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
V2 = ("memory.max", "memory.current", "")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with 1000 KiB free, whose control groups are for the test to make."""
    monkeypatch.setattr(sizing, "PROC", tmp_path / "proc")
    monkeypatch.setattr(sizing, "CONTROL_GROUPS", tmp_path / "groups")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:  1000 kB\n")
    return tmp_path


def make_group(directory: Path, version: tuple[str, str, str], limit: str, used: int, file_pages: int = 0) -> None:
    limit_file, used_file, prefix = version
    directory.mkdir(parents=True, exist_ok=True)
    (directory / limit_file).write_text(f"{limit}\n")
    (directory / used_file).write_text(f"{used}\n")
    pages = f"{prefix}inactive_file {file_pages // 2}\n{prefix}active_file {file_pages - file_pages // 2}\n"
    (directory / "memory.stat").write_text(f"anon 5\nfile 7\n{pages}")


def join_groups(system: Path, membership: str) -> None:
    (system / "proc/self/cgroup").write_text(membership)


def test_without_control_groups_the_systems_memory_counts(system: Path) -> None:
    assert sizing.free_host_bytes() == 1000 * 1024
    join_groups(system, "")
    assert sizing.free_host_bytes() == 1000 * 1024


@pytest.mark.parametrize(
    ("version", "membership", "root"), [(V1, "9:cpu:/x\n4:memory:/a/b\n", "groups/memory"), (V2, "0::/a/b\n", "groups")]
)
def test_the_narrowest_control_group_counts(
    system: Path, version: tuple[str, str, str], membership: str, root: str
) -> None:
    join_groups(system, membership)
    make_group(system / root, version, "900000", 100000)
    make_group(system / root / "a", version, "500000", 80000)
    make_group(system / root / "a/b", version, "max", 70000)
    assert sizing.free_host_bytes() == 420000
    make_group(system / root / "a/b", version, "300000", 70000)
    assert sizing.free_host_bytes() == 230000
    make_group(system / root / "a/b", version, "300000", 290000, file_pages=250001)
    assert sizing.free_host_bytes() == 260001, "file pages, such as a checkpoint's, give way"
    make_group(system / root / "a/b", version, "300000", 310000)
    assert sizing.free_host_bytes() == 0


def test_a_container_sees_its_group_as_the_root(system: Path) -> None:
    join_groups(system, "0::/of/the/host\n")
    make_group(system / "groups", V2, "500000", 80000)
    assert sizing.free_host_bytes() == 420000


def test_free_memory_is_found() -> None:
    assert 0 < sizing.free_host_bytes() < 1 << 50
