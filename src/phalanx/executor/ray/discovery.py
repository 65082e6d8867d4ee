"""The Ray that runs on this host: found by its raylet's command line, which any user may read.

And may write: whoever can run a process here could name an address, to which our token and code would go. So only the
superuser and the user of this process are believed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ray._private.utils import get_ray_address_file  # type: ignore[attr-defined]  # where all versions have it

from phalanx.errors import ConfigError

PRIVATE_NODE = "phalanx-engine-"
"""How the node's name begins in a Ray that one engine has started for itself: it is there from the raylet's start."""

_PROC = Path("/proc")
_ADDRESS = "--gcs-address="
_NODE_NAME = "--node-name="


class _Process(NamedTuple):
    """One that runs on this host."""

    owner: int
    """The user who has started it."""
    command: Sequence[str]


def find_ray() -> str | None:
    """Host and port of the Ray that a node on this host belongs to; None if there is none.

    A Ray that some engine has started for itself is passed over: it ends with that engine. Raises ConfigError if there
    are several and none of them was started last by `ray start`, or if all are other users'.
    """
    running = running_rays()
    if not running:  # what was started last has ended, and whoever is at its address by now is not what we were told of
        if others := other_users_rays():
            told = ", ".join(sorted(others))
            raise ConfigError("ray_address", None, f"another user's is joined only if its address is given: {told}")
        return None
    if len(running) == 1:
        return running.pop()
    if (started_last := _started_last()) in running:
        return started_last
    raise ConfigError("ray_address", None, f"several Ray clusters run here, give one of: {', '.join(sorted(running))}")


def running_rays(proc: Path = _PROC) -> set[str]:
    """The addresses of all but the private ones and other users'."""
    return {_value(raylet.command, _ADDRESS) for raylet in _raylets(proc) if raylet.owner in trusted_users()}


def other_users_rays(proc: Path = _PROC) -> set[str]:
    """The same of users who are not believed."""
    return {_value(raylet.command, _ADDRESS) for raylet in _raylets(proc) if raylet.owner not in trusted_users()}


def trusted_users() -> frozenset[int]:
    """The superuser, and the user of this process."""
    return frozenset((0, os.geteuid()))


def _started_last() -> str | None:
    """The address that the last `ray start` has left, if a user did who is believed."""
    try:
        with open(get_ray_address_file(None)) as file:
            is_trusted = os.fstat(file.fileno()).st_uid in trusted_users()
            return file.read().strip() or None if is_trusted else None
    except (FileNotFoundError, PermissionError):
        return None


def _raylets(proc: Path) -> Iterator[_Process]:
    """All but the private ones."""
    for process in _processes(proc):
        is_raylet = "raylet" in process.command[0].rpartition("/")[2] and _value(process.command, _ADDRESS)
        if is_raylet and not _value(process.command, _NODE_NAME).startswith(PRIVATE_NODE):
            yield process


def _processes(proc: Path) -> Iterator[_Process]:
    """Without those that have ended, and the kernel's own, which have no command line.

    Not whose the directory is: a process can have the kernel give it to the superuser.
    """
    for process in proc.glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            status = (process / "status").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if command:
            owner = next(int(line.split()[1]) for line in status.splitlines() if line.startswith(b"Uid:"))
            yield _Process(owner, command.decode(errors="replace").split("\0"))


def _value(command: Sequence[str], flag: str) -> str:
    return next((argument.removeprefix(flag) for argument in command if argument.startswith(flag)), "")
