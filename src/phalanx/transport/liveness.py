"""Who takes part, and whether they still live: for any process of this machine, parent, child or neither."""

from __future__ import annotations

import os
from functools import partial

import msgspec

from phalanx.errors import PeerDiedError
from phalanx.transport.futex import Doorbell
from phalanx.transport.readiness import Poller


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

    `dead` grows before the bell rings, in the thread of the process's Poller; reading it needs no lock.
    """

    def __init__(self, bell: Doorbell) -> None:
        self._bell = bell
        self._pidfds: dict[Party, int] = {}
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

    def close(self) -> None:
        """Watch nobody any more. May be called more than once."""
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


def state_of(pid: int, start_time: int) -> str | None:
    """The kernel's letter for what a process does, such as "R", "S" or "T" (stopped); None if it is gone."""
    found = _state_and_start_time(pid)
    return None if found is None or found[0] in "ZX" or found[1] != start_time else found[0]


def _start_time_of_running(pid: int) -> int | None:
    found = _state_and_start_time(pid)
    return None if found is None or found[0] in "ZX" else found[1]


def _state_and_start_time(pid: int) -> tuple[str, int] | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command's name in parentheses, and may itself hold spaces and parentheses.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return fields[0].decode(), int(fields[19])
