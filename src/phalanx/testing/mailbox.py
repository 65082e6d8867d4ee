"""How a fault gets into a rank that is running, from another process of the same user: a memfd and a signal.

A rank that allows chaos has memory with a known name. Whoever may open it writes a fault there and sends the signal;
the rank arms it, and appends what it does, before it does it. Memory that is open stays readable when the rank is gone.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress

import msgspec

from phalanx.errors import UserError
from phalanx.testing import memory_limit
from phalanx.testing.faults import Fault, Injected
from phalanx.transport.beacon import descriptors_of

NAME = "chaos"
SIGNAL = signal.SIGRTMAX - 4
"""Of the real-time ones, which nobody is known to use."""

_MOST_BYTES = 1 << 16


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank says of a fault that cannot happen to it."""

    why: str


_REFUSED = b'{"why"'
_injected = msgspec.json.Decoder(Injected)
_refused = msgspec.json.Decoder(Refused)
_fault = msgspec.json.Decoder(Fault)


def receive_faults(arm: Callable[[Fault, str], object]) -> None:
    """From now on, have `arm` called with every fault that is sent, and where to report it. In the main thread."""
    fd = os.memfd_create(f"phalanx:{NAME}", os.MFD_CLOEXEC)

    def take(*_: object) -> None:
        lines = os.pread(fd, _MOST_BYTES, 0).splitlines()
        if lines:
            try:
                arm(_fault.decode(lines[0]), f"/proc/self/fd/{fd}")
            except UserError as error:  # it cannot happen here
                os.pwrite(fd, msgspec.json.encode(Refused(why=str(error))) + b"\n", os.fstat(fd).st_size)

    signal.signal(SIGNAL, take)


class Mailbox:
    """That of one rank, as another process has it. Close it when the fault is over."""

    def __init__(self, pid: int) -> None:
        """Raises UserError if the process has none."""
        self._pid = pid
        for descriptor in descriptors_of(pid, NAME):
            with suppress(OSError):
                self._fd = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
                return
        raise UserError(f"process {pid} takes no faults: its engine was not started with --allow-chaos")

    def send(self, fault: Fault) -> None:
        """Have the rank arm it. What came before is forgotten. Raises ProcessLookupError if the rank is gone."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, msgspec.json.encode(fault) + b"\n", 0)
        os.kill(self._pid, SIGNAL)

    def injected(self) -> list[Injected]:
        """What the rank has reported of it so far. Never blocks."""
        return [one for one in self._said() if isinstance(one, Injected)]

    def refusal(self) -> str | None:
        """Why the rank does not do it, if it has said so."""
        return next((one.why for one in self._said() if isinstance(one, Refused)), None)

    def _said(self) -> list[Injected | Refused]:
        lines = os.pread(self._fd, _MOST_BYTES, 0).splitlines()[1:]
        return [(_refused if line.startswith(_REFUSED) else _injected).decode(line) for line in lines]

    def close(self) -> None:
        os.close(self._fd)
        memory_limit.remove_groups()

    def __enter__(self) -> Mailbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
