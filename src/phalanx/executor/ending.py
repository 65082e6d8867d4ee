"""Processes of this host that are ended by force, and none that has their pid by then."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterable
from contextlib import suppress

from phalanx.errors import PeerDiedError
from phalanx.transport.liveness import Party, is_running


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


def await_ends(parties: Iterable[Party], timeout_s: float) -> list[Party]:
    """Wait until they are gone, with all that they had; those that are not after `timeout_s`."""
    expires_at = time.monotonic() + timeout_s
    return [party for party in parties if not _await_end(party, expires_at)]


def _await_end(party: Party, expires_at: float) -> bool:
    try:
        pidfd = os.pidfd_open(party.pid)
    except ProcessLookupError:
        return True
    try:
        if is_running(party.pid) and not party.is_alive():  # another process has its pid
            return True
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(max(expires_at - time.monotonic(), 0.0) * 1000))
    finally:
        os.close(pidfd)
