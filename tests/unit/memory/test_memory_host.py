"""What is free on this host, and what a family of processes takes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phalanx.memory import host

V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
V2 = ("memory.max", "memory.current", "")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with 1000 KiB free, whose control groups are for the test to make."""
    monkeypatch.setattr(host, "PROC", tmp_path / "proc")
    monkeypatch.setattr(host, "CONTROL_GROUPS", tmp_path / "groups")
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
    assert host.free_host_bytes() == 1000 * 1024
    join_groups(system, "")
    assert host.free_host_bytes() == 1000 * 1024


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
    assert host.free_host_bytes() == 420000
    make_group(system / root / "a/b", version, "300000", 70000)
    assert host.free_host_bytes() == 230000
    make_group(system / root / "a/b", version, "300000", 290000, file_pages=250001)
    assert host.free_host_bytes() == 260001, "file pages, such as a checkpoint's, give way"
    make_group(system / root / "a/b", version, "300000", 310000)
    assert host.free_host_bytes() == 0


def test_a_container_sees_its_group_as_the_root(system: Path) -> None:
    join_groups(system, "0::/of/the/host\n")
    make_group(system / "groups", V2, "500000", 80000)
    assert host.free_host_bytes() == 420000


def test_free_memory_is_found() -> None:
    assert 0 < host.free_host_bytes() < 1 << 50


HOLDS = """
import mmap, os, sys
shared = mmap.mmap(-1, 32 << 20)
shared.write(b"1" * (32 << 20))
if os.fork() == 0:
    own = b"2" * (16 << 20)
    assert shared[1 << 20] == 49
    shared.seek(0); shared.read()
    print("ready", flush=True)
sys.stdin.read()
"""


def test_what_a_family_shares_counts_once() -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        taken = host.bytes_of_family(parent.pid)
        assert 48 << 20 <= taken <= 72 << 20
        assert host.bytes_of_family(os.getpid()) > taken
        parent.communicate()
    assert host.bytes_of_family(parent.pid) == 0


@pytest.mark.parametrize(("told", "expected"), [("0\n", 1), ("0-1", 2), ("0,2-3", 3)])
def test_processors_with_memory_of_their_own_count(
    told: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "MEMORY_NODES", tmp_path / "has_memory")
    assert host.num_memory_nodes() == 1, "a kernel that knows none"
    (tmp_path / "has_memory").write_text(told)
    assert host.num_memory_nodes() == expected
