"""Shared fate of an actor: it ends with the process that its work comes from, and with its node's Ray."""

from __future__ import annotations

import os
from collections.abc import Callable

from phalanx.transport.liveness import Party
from phalanx.transport.readiness import Poller

_EXIT_CODE = 1


def end_with(party: Party) -> None:
    """End this process, without another word, within milliseconds of the death of `party`; at once if it is dead."""
    on_end_of(party, lambda: os._exit(_EXIT_CODE))


def on_end_of(party: Party, callback: Callable[[], None]) -> Callable[[], None]:
    """Call `callback` within milliseconds of the death of `party`, at once if it is dead; what is returned stops that.

    It is called in the process's Poller's thread: it must be short and must not raise.
    """
    try:
        pidfd = os.pidfd_open(party.pid)
    except ProcessLookupError:
        callback()
        return lambda: None
    poller = Poller.of_process()
    poller.add(pidfd, callback)
    if not party.is_alive():  # only now, with the pidfd in hand, can the pid no longer change its meaning
        callback()

    def stop() -> None:
        poller.remove(pidfd)
        os.close(pidfd)

    return stop


def end_with_raylet() -> None:
    """End this process with its node's raylet. Ray itself notices after up to a second, and then says farewell."""
    end_with(Party.of("raylet", raylet_pid()))


def raylet_pid() -> int:
    """Of the node that the calling actor is on."""
    return int(os.environ["RAY_RAYLET_PID"])
