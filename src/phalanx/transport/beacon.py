"""How a running process is found by others of its user: a memfd with a known name, which says what it is.

It has no path and holds no port: it is there exactly as long as the process. Reading it needs nothing of the process,
which may be stopped or hang.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress

from phalanx.transport.liveness import is_running

_PREFIX = "phalanx:"
_MOST_BYTES = 16 * 1024 * 1024
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class Beacon:
    """What this process shows under a name, until `close`. It never changes."""

    def __init__(self, name: str, content: bytes) -> None:
        with ExitStack() as undo:
            self._fd = os.memfd_create(_PREFIX + name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            undo.callback(os.close, self._fd)
            left = memoryview(content)
            while left:
                left = left[os.write(self._fd, left) :]
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)  # half a beacon is none: readers look for the seals
            undo.pop_all()

    def close(self) -> None:
        """May be called more than once."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Beacon:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def beacons(name: str) -> Iterator[tuple[int, bytes]]:
    """Who shows something under this name, and what: processes of this user, and with root's rights of all users."""
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            yield from ((int(entry), content) for content in beacons_of(int(entry), name))


def beacons_of(pid: int, name: str) -> list[bytes]:
    """What one process shows under a name. Empty if it is gone, or may not be looked at."""
    found: list[bytes] = []
    for descriptor in descriptors_of(pid, name):
        with suppress(OSError):  # it closed it, or has ended
            content = _read_sealed(f"/proc/{pid}/fd/{descriptor}")
            if content is not None and is_running(pid):
                found.append(content)
    return found


def descriptors_of(pid: int, name: str) -> list[int]:
    """Those of a process's descriptors that are memory with this name."""
    folder, found = f"/proc/{pid}/fd", []
    try:
        descriptors = os.listdir(folder)
    except OSError:  # it is gone, or another user's
        return []
    for descriptor in descriptors:
        with suppress(OSError):
            if os.readlink(f"{folder}/{descriptor}") == f"/memfd:{_PREFIX}{name} (deleted)":
                found.append(int(descriptor))
    return sorted(found)


def _read_sealed(path: str) -> bytes | None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            return None
        return os.pread(fd, min(os.fstat(fd).st_size, _MOST_BYTES), 0)
    finally:
        os.close(fd)
