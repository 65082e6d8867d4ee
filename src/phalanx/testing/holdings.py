"""What an engine has: processes, descriptors, memory. Whether it has more after a fault than before."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from phalanx.errors import UserError
from phalanx.executor.platform import visible_gpus
from phalanx.transport.liveness import group_members

LINES_TO_COLLECT = 3
"""Lines that have ended, of which Python's collector may yet have to find what they had: it comes by now and then. What
each leaves behind for good shows soon after."""
DESCRIPTORS_OF_A_RANK = 4
"""Of its line, in the engine's process: segments of memory, pipes, sockets, a pidfd."""
MEMORY_SLACK_BYTES = 64 << 20
GPU_SLACK_BYTES = 256 << 20
"""Less than a process takes of a GPU for its context alone: what one that does not end keeps is seen."""

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_SHARED = Path("/dev/shm")
_TCP_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
_LISTENS = "0A"
_USED_OF_GPUS = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i")
"""In MiB, a line for each GPU. What CUDA says needs a context, which takes memory itself."""
_TELLS_WITHIN_S = 10.0


class Holdings(NamedTuple):
    """Of one engine's process, and of what it has started."""

    num_processes: int
    num_descriptors: int
    num_segments: int
    """Of those: memory without a name (memfd)."""
    num_files: int
    """In /dev/shm, of whomever."""
    num_ports: int
    """TCP ports that they listen on."""
    rss_bytes: int
    """Of the engine's process itself."""
    gpu_bytes: int = 0
    """Of the memory of the GPUs that the engine may see, by whomever."""

    @classmethod
    def of(cls, pid: int, *, gpus: bool = False) -> Holdings:
        """At this moment. Takes milliseconds; with GPUs, some hundred. Raises UserError, as `used_of_gpus` does."""
        targets, members = _targets(pid), group_members(pid)
        return cls(
            num_processes=len(members),
            num_descriptors=len(targets),
            num_segments=sum(target.startswith("/memfd:") for target in targets),
            num_files=len(shared_files()),
            num_ports=_num_ports({target for member in {pid, *members} for target in _targets(member)}),
            rss_bytes=_rss_bytes(pid),
            gpu_bytes=used_of_gpus() if gpus else 0,
        )

    def beyond(self, before: Holdings, num_ranks: int) -> list[str]:
        """What there is more of than there was, in words, in an engine with lines of so many ranks."""
        found = []
        of_lines = LINES_TO_COLLECT * (num_ranks + 1)
        for name, one, other, slack in (
            ("processes", self.num_processes, before.num_processes, 0),
            ("descriptors", self.num_descriptors, before.num_descriptors, DESCRIPTORS_OF_A_RANK * of_lines),
            ("segments of memory", self.num_segments, before.num_segments, of_lines),
            ("files in /dev/shm", self.num_files, before.num_files, 0),
            ("ports", self.num_ports, before.num_ports, 0),
            ("bytes of memory", self.rss_bytes, before.rss_bytes, MEMORY_SLACK_BYTES),
            ("bytes of GPUs", self.gpu_bytes, before.gpu_bytes, GPU_SLACK_BYTES),
        ):
            if one > other + slack:
                found.append(f"{one} {name}, {other} before")
        return found


def shared_files() -> set[str]:
    """Names in /dev/shm, of whomever."""
    return set(os.listdir(_SHARED)) if _SHARED.is_dir() else set()


def used_of_gpus() -> int:
    """Bytes in use, by whomever, of the GPUs that this process may see. Raises UserError if they do not tell."""
    command = (*_USED_OF_GPUS, ",".join(visible_gpus()))
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TELLS_WITHIN_S)
        return sum(map(int, ran.stdout.split())) << 20
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise UserError(
            f"whether memory of GPUs is left over cannot be told: {error}; nvidia-smi, of the driver's tools, has to "
            "tell what whole GPUs have in use (MIG's parts do not)"
        ) from error


def children_of(pid: int) -> list[int]:
    """The processes that one has started and that are there; those of all its threads."""
    found: list[int] = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found


def parent_of(pid: int) -> int | None:
    """None if the process is gone."""
    with suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text()
        return int(stat.rpartition(")")[2].split()[1])
    return None


def command_of(pid: int) -> bytes:
    """Its command line; empty if the process is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _targets(pid: int) -> list[str]:
    found = []
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def listening_ports() -> dict[int, str]:
    """TCP ports of this host that somebody listens on, and the inode of each one's socket."""
    found = {}
    for table in _TCP_TABLES:
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENS:
                    found[int(fields[1].rpartition(":")[2], 16)] = fields[9]
    return found


def _num_ports(targets: set[str]) -> int:
    """How many of these open files are sockets that listen."""
    return sum(f"socket:[{inode}]" in targets for inode in listening_ports().values())


def _rss_bytes(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    return 0
