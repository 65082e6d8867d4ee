"""Who takes part, and whether they still live: for any process of this machine, parent, child or neither."""

from __future__ import annotations

import os
import threading
from functools import partial
from typing import NamedTuple

import msgspec

from phalanx.errors import PeerDiedError
from phalanx.transport.futex import Doorbell
from phalanx.transport.readiness import Poller

_EXITING = 0x4
"""PF_EXITING of the kernel's task flags: it has begun to end the process. What it gives back first may take long: a
GPU's memory a tenth of a second, in which the process is no zombie yet."""


class Party(msgspec.Struct, frozen=True):
    """A process and its name. A pid is used again after a while; with its start time it is not."""

    name: str
    pid: int
    start_time: int  # clock ticks since boot, field 22 of /proc/PID/stat

    @classmethod
    def me(cls, name: str) -> Party:
        """The calling process."""
        return cls.of(name, os.getpid())

    @classmethod
    def of(cls, name: str, pid: int) -> Party:
        """The process that has `pid` now. Raises PeerDiedError if none has, or it is a zombie."""
        start_time = _start_time_of_running(pid)
        if start_time is None:
            raise PeerDiedError(name, pid)
        return cls(name, pid, start_time)

    def is_alive(self) -> bool:
        """False once it exited, also while it is a zombie."""
        return _start_time_of_running(self.pid) == self.start_time

    def died(self, detail: str = "") -> PeerDiedError:
        """The error that says so."""
        return PeerDiedError(self.name, self.pid, detail)

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


class Watch:
    """The parties that one end of a queue depends on. Rings `bell` within milliseconds of the death of one.

    `dead` grows before the bell rings, in the thread of the process's Poller or of `give_up`; reading it needs no lock.
    """

    def __init__(self, bell: Doorbell) -> None:
        self._bell = bell
        self._pidfds: dict[Party, int] = {}
        self._closing = threading.Lock()
        self._poller = Poller.of_process()
        self.dead: list[Party] = []

    def add(self, party: Party) -> None:
        """Watch `party`; one that is dead already is reported like one that dies later. A second time does nothing."""
        if party in self._pidfds or party in self.dead:
            return
        try:
            pidfd = os.pidfd_open(party.pid)
        except ProcessLookupError:
            self._report(party)
            return
        # Only now, with the pidfd in hand, can the pid no longer change its meaning.
        if not party.is_alive():
            os.close(pidfd)
            self._report(party)
            return
        self._pidfds[party] = pidfd
        self._poller.add(pidfd, partial(self._exited, party))

    def give_up(self) -> None:
        """All parties are being ended: they count as dead from now on, however long their ends take. For any thread."""
        with self._closing:  # the bell's memory goes after `close`
            for party in list(self._pidfds):
                self._exited(party)

    def close(self) -> None:
        """Watch nobody any more. May be called more than once."""
        with self._closing:
            for party in list(self._pidfds):
                self._drop(party)

    def _exited(self, party: Party) -> None:
        self._drop(party)
        self._report(party)

    def _drop(self, party: Party) -> None:
        pidfd = self._pidfds.pop(party, None)
        if pidfd is not None:
            self._poller.remove(pidfd)
            os.close(pidfd)

    def _report(self, party: Party) -> None:
        self.dead.append(party)
        self._bell.ring()


def is_running(pid: int) -> bool:
    """Whether a process, which is not a zombie, has this pid."""
    return _start_time_of_running(pid) is not None


def start_time_of(pid: int) -> int | None:
    """When the process that has this pid was started, as `Party` has it, also of a zombie; None if none has."""
    found = _read_stat(pid)
    return found.start_time if found is not None else None


def state_of(pid: int, start_time: int) -> str | None:
    """The kernel's letter for what a process does, such as "R", "S" or "T" (stopped); None if it is gone.

    That is from the beginning of its exit: who waits for its end, and for its memory, asks `is_running`.
    """
    found = _read_stat(pid)
    if found is None or not found.is_running or found.is_exiting or found.start_time != start_time:
        return None
    return found.state


def ending_of(pid: int, start_time: int) -> int | None:
    """How a process ends that has begun to, before it is gone: its exit code, or less the number of a signal.

    None if it has not begun, is gone, or nobody is told, such as who has no descriptor left to look. A code of 0 is
    told when it is gone: the kernel shows others than a process's owner a 0 for any.
    """
    try:
        found = _read_stat(pid)
    except OSError:
        return None
    if found is None or not found.is_exiting or found.start_time != start_time or not found.exit_status:
        return None
    return os.waitstatus_to_exitcode(found.exit_status)


def holds_memory(pid: int, start_time: int) -> bool:
    """Whether a process is there that may still hold memory: it has not begun to exit, or not come to the end of it."""
    found = _read_stat(pid)
    return found is not None and found.state not in "ZX" and found.start_time == start_time


def group_members(group: int) -> list[int]:
    """The processes of a process group that may still hold memory. Takes a look at every process there is."""
    found = ((int(name), _read_stat(int(name))) for name in os.listdir("/proc") if name.isdigit())
    return [pid for pid, stat in found if stat is not None and stat.group == group and stat.is_running]


class _Stat(NamedTuple):
    """A process in /proc."""

    state: str
    group: int
    is_exiting: bool
    start_time: int
    exit_status: int
    """As `wait` tells it; 0 as long as it has not begun to exit."""

    @property
    def is_running(self) -> bool:
        return self.state not in "ZX"


def _parse_stat(stat: bytes) -> _Stat:
    """What is told in /proc/PID/stat."""
    # The second field is the command's name in parentheses, and may itself hold spaces and parentheses.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return _Stat(
        state=fields[0].decode(),
        group=int(fields[2]),
        is_exiting=bool(int(fields[6]) & _EXITING),
        start_time=int(fields[19]),
        exit_status=int(fields[49]),
    )


def _start_time_of_running(pid: int) -> int | None:
    found = _read_stat(pid)
    return found.start_time if found is not None and found.is_running else None


def _read_stat(pid: int) -> _Stat | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return _parse_stat(file.read())
    except (FileNotFoundError, ProcessLookupError):
        return None
