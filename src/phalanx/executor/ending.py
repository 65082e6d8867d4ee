"""Processes of this host that are ended by force, and none that has their pid by then."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress

from phalanx.errors import PeerDiedError
from phalanx.transport.liveness import Party


def living(pids: Iterable[int], name: str) -> list[Party]:
    """Those of the processes that still run, to be told from later ones with the same pid."""
    found: list[Party] = []
    for pid in pids:
        with suppress(PeerDiedError):
            found.append(Party.of(name, pid))
    return found


def kill(party: Party) -> None:
    """Kill it if it lives. Returns at once. Raises OSError if no descriptor is left to do so."""
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(party.pid)
        try:
            if party.is_alive():  # only now can the pid no longer change its meaning
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)
