"""The Ray that runs on this host: found by its raylet's command line, which any user may read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ray._private.utils import read_ray_address

from phalanx.errors import ConfigError

PRIVATE_NODE = "phalanx-engine-"
"""How the node's name begins in a Ray that one engine has started for itself: it is there from the raylet's start."""

_PROC = Path("/proc")
_ADDRESS = "--gcs-address="
_NODE_NAME = "--node-name="


def find_ray() -> str | None:
    """Host and port of the Ray that a node on this host belongs to; None if there is none.

    A Ray that some engine has started for itself is passed over: it ends with that engine. Raises ConfigError if there
    are several and none of them was started last by `ray start`.
    """
    running, started_last = running_rays(), read_ray_address()
    if not running:
        return started_last  # whoever it is may have ended since
    if len(running) == 1:
        return running.pop()
    if started_last in running:
        return started_last
    raise ConfigError("ray_address", None, f"which one is meant: {', '.join(sorted(running))}")


def running_rays(proc: Path = _PROC) -> set[str]:
    """The addresses of all but the private ones."""
    raylets = [command for command in _commands(proc) if "raylet" in command[0].rpartition("/")[2]]
    shared = (command for command in raylets if not _value(command, _NODE_NAME).startswith(PRIVATE_NODE))
    return {address for command in shared if (address := _value(command, _ADDRESS))}


def _commands(proc: Path) -> Iterator[Sequence[str]]:
    """The command line of each process; of those that have ended, and of the kernel's own, there is none."""
    for process in proc.glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if command:
            yield command.decode(errors="replace").split("\0")


def _value(command: Sequence[str], flag: str) -> str:
    return next((argument.removeprefix(flag) for argument in command if argument.startswith(flag)), "")
