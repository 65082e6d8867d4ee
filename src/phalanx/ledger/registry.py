"""Where processes make themselves known to whoever watches them, in any order, and without a port.

The watcher holds a file in memory (a memfd), whose place it tells in an environment variable; each process opens it
through /proc and appends lines. The kernel appends one line after the other, whoever writes. Nothing has a name, so
nothing is left behind. Only processes of the same user on the same host can write there.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping

import msgspec

from phalanx.errors import FrameError, PeerDiedError
from phalanx.transport.liveness import is_running
from phalanx.transport.shared_memory import SegmentHandle

VARIABLE = "PHALANX_WATCH"
"""Set for processes that are to make themselves known: PID:DESCRIPTOR:NONCE of the watcher's registry."""

_NAME = "phalanx:registry"


class RankNotice(msgspec.Struct, frozen=True, kw_only=True, tag="rank"):
    """A process has become a rank."""

    world: str
    """The same for all ranks that were started together."""
    rank: int
    node: str
    journal: SegmentHandle
    here: tuple[int, ...] = ()
    """The ranks of this host, if that is known."""


class NewcomerNotice(msgspec.Struct, frozen=True, kw_only=True, tag="newcomer"):
    """A process is to become a rank, as whoever has started it says."""

    world: str
    rank: int
    node: str
    pid: int
    start_time: int
    stacks: int
    """The descriptor that its stacks are read from; 0 if there is none."""


class LaneNotice(msgspec.Struct, frozen=True, kw_only=True, tag="lane"):
    """A rank's journal has collectives of one more lane.

    A lane is what members go through in one order: a process group has one for each kind of device that it works on,
    and one for each direction in which two of its ranks send and receive.
    """

    pid: int
    index: int
    """In the records of this process's journal."""
    name: str
    ranks: tuple[int, ...]


Notice = RankNotice | NewcomerNotice | LaneNotice


class Registry:
    """The end that reads. A context manager; for the use of one thread."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        nonce = secrets.token_hex(8)
        os.write(self._descriptor, f"{nonce}\n".encode())
        self._read = os.fstat(self._descriptor).st_size
        self._partial = b""
        self._place = f"{os.getpid()}:{self._descriptor}:{nonce}"

    @property
    def place(self) -> str:
        """What VARIABLE is to be set to."""
        return self._place

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def news(self) -> list[Notice]:
        """What has been written since the last call. Raises FrameError if it is no notice."""
        found = os.pread(self._descriptor, os.fstat(self._descriptor).st_size - self._read, self._read)
        self._read += len(found)
        *lines, self._partial = (self._partial + found).split(b"\n")
        try:
            return [msgspec.json.decode(line, type=Notice) for line in lines]
        except msgspec.MsgspecError as error:
            raise FrameError(f"the registry of process {os.getpid()} has a line that is no notice: {error}") from error


class RegistryEntry:
    """The end that writes."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Raises PeerDiedError if the watcher is gone, FrameError if it is not of this host, user or container."""
        pid, descriptor, nonce = environment[VARIABLE].split(":")
        path = f"/proc/{pid}/fd/{descriptor}"
        try:
            if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
                raise FrameError(f"descriptor {descriptor} of process {pid} is no registry")
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            if not is_running(int(pid)):
                raise PeerDiedError("the watcher, on this host,", int(pid)) from error
            raise FrameError(f"the registry of process {pid} cannot be opened: {error}") from error
        if os.pread(self._descriptor, len(nonce), 0) != nonce.encode():
            os.close(self._descriptor)
            raise FrameError(f"the registry of process {pid} is another one")

    def announce(self, notice: Notice) -> None:
        """Never blocks."""
        os.write(self._descriptor, msgspec.json.encode(notice) + b"\n")
