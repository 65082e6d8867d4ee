"""Which Ray of this host is joined, told from the command lines of processes that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ray")

from phalanx.errors import ConfigError
from phalanx.executor.ray import discovery
from phalanx.executor.ray.discovery import PRIVATE_NODE, find_ray, running_rays

RAYLET = "/somewhere/ray/core/src/ray/raylet/raylet"


def write_process(proc: Path, pid: int, *command: str) -> None:
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "cmdline").write_bytes(b"".join(argument.encode() + b"\0" for argument in command))


def test_a_private_ray_is_passed_over(tmp_path: Path) -> None:
    write_process(tmp_path, 1, "init")
    write_process(tmp_path, 2)  # one of the kernel's
    write_process(tmp_path, 3, RAYLET, "--gcs-address=10.0.0.1:6379", "--labels=")
    write_process(tmp_path, 4, RAYLET, "--gcs-address=10.0.0.1:7000", f"--node-name={PRIVATE_NODE}17")
    write_process(tmp_path, 5, "python", "--gcs-address=10.0.0.1:8000")
    write_process(tmp_path, 6, RAYLET, "--worker=python --gcs-address=x:1", "--gcs-address=[fd00::1]:6379")
    (tmp_path / "7").mkdir()  # it has ended
    assert running_rays(tmp_path) == {"10.0.0.1:6379", "[fd00::1]:6379"}


@pytest.mark.parametrize(
    ("running", "started_last", "found"),
    [
        (set(), None, None),
        (set(), "a:1", "a:1"),
        ({"a:1"}, None, "a:1"),
        ({"a:1"}, "gone:1", "a:1"),
        ({"a:1", "b:1"}, "b:1", "b:1"),
    ],
)
def test_which_ray_is_meant(
    monkeypatch: pytest.MonkeyPatch, running: set[str], started_last: str | None, found: str | None
) -> None:
    monkeypatch.setattr(discovery, "running_rays", lambda: running)
    monkeypatch.setattr(discovery, "read_ray_address", lambda: started_last)
    assert find_ray() == found


def test_several_that_could_be_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "running_rays", lambda: {"b:1", "a:1"})
    monkeypatch.setattr(discovery, "read_ray_address", lambda: "gone:1")
    with pytest.raises(ConfigError, match=r"ray_address: .* which one is meant: a:1, b:1"):
        find_ray()
