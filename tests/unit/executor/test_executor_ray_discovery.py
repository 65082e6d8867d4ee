"""Which Ray of this host is joined, told from the command lines of processes that are not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("ray")

from phalanx.errors import ConfigError
from phalanx.executor.ray import discovery
from phalanx.executor.ray.discovery import PRIVATE_NODE, find_ray, other_users_rays, running_rays

RAYLET = "/somewhere/ray/core/src/ray/raylet/raylet"


ANOTHER_USER = os.geteuid() + 1


def write_process(proc: Path, pid: int, *command: str, user: int = 0) -> None:
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "status").write_text(f"Name:\traylet\nUid:\t{user}\t0\t0\t0\nGid:\t0\t0\t0\t0\n")
    (proc / str(pid) / "cmdline").write_bytes(b"".join(argument.encode() + b"\0" for argument in command))


def test_a_private_ray_is_passed_over(tmp_path: Path) -> None:
    write_process(tmp_path, 1, "init")
    write_process(tmp_path, 2)  # one of the kernel's
    write_process(tmp_path, 3, RAYLET, "--gcs-address=10.0.0.1:6379", "--labels=")
    write_process(tmp_path, 4, RAYLET, "--gcs-address=10.0.0.1:7000", f"--node-name={PRIVATE_NODE}17")
    write_process(tmp_path, 5, "python", "--gcs-address=10.0.0.1:8000")
    write_process(tmp_path, 6, RAYLET, "--worker=python --gcs-address=x:1", "--gcs-address=[fd00::1]:6379")
    (tmp_path / "7").mkdir()  # it has ended
    write_process(tmp_path, 8, RAYLET, "--gcs-address=10.6.6.6:6379", user=ANOTHER_USER)
    write_process(tmp_path, 9, RAYLET, "--gcs-address=10.0.0.1:9000", user=os.geteuid())
    write_process(tmp_path, 10, RAYLET, f"--node-name={PRIVATE_NODE}18", "--gcs-address=x:1", user=ANOTHER_USER)
    assert running_rays(tmp_path) == {"10.0.0.1:6379", "[fd00::1]:6379", "10.0.0.1:9000"}
    assert other_users_rays(tmp_path) == {"10.6.6.6:6379"}


@pytest.mark.parametrize("started_last", [None, "10.6.6.6:6379", "gone:1"])
def test_another_users_ray_is_not_joined_unasked(monkeypatch: pytest.MonkeyPatch, started_last: str | None) -> None:
    """Nor if it is where one of ours was."""
    monkeypatch.setattr(discovery, "running_rays", set)
    monkeypatch.setattr(discovery, "other_users_rays", lambda: {"10.6.6.6:6379"})
    monkeypatch.setattr(discovery, "_started_last", lambda: started_last)
    with pytest.raises(ConfigError, match=r"ray_address: .* only if its address is given: 10\.6\.6\.6:6379"):
        find_ray()
    monkeypatch.setattr(discovery, "running_rays", lambda: {"a:1"})
    assert find_ray() == "a:1"


def test_what_another_user_says_was_started_last_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ray_current_cluster"
    monkeypatch.setattr(discovery, "get_ray_address_file", lambda directory: str(file))
    assert discovery._started_last() is None
    file.write_text("10.0.0.1:6379\n")
    assert discovery._started_last() == "10.0.0.1:6379"
    monkeypatch.setattr(discovery, "trusted_users", lambda: {ANOTHER_USER})
    assert discovery._started_last() is None


@pytest.mark.parametrize(
    ("running", "started_last", "found"),
    [
        (set(), None, None),
        (set(), "gone:1", None),
        ({"a:1"}, None, "a:1"),
        ({"a:1"}, "gone:1", "a:1"),
        ({"a:1", "b:1"}, "b:1", "b:1"),
    ],
)
def test_which_ray_is_meant(
    monkeypatch: pytest.MonkeyPatch, running: set[str], started_last: str | None, found: str | None
) -> None:
    monkeypatch.setattr(discovery, "running_rays", lambda: running)
    monkeypatch.setattr(discovery, "other_users_rays", set)
    monkeypatch.setattr(discovery, "_started_last", lambda: started_last)
    assert find_ray() == found


def test_several_that_could_be_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "running_rays", lambda: {"b:1", "a:1"})
    monkeypatch.setattr(discovery, "_started_last", lambda: "gone:1")
    with pytest.raises(ConfigError, match=r"ray_address: .* several Ray clusters run here, give one of: a:1, b:1"):
        find_ray()
