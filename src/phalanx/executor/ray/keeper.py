"""Ends a Ray that was started for one engine when the engine's process ends, killed or not.

Ray's own processes notice the end of those that started them too, but some only after seconds, or never where nobody
collects the dead. Usage: python -m phalanx.executor.ray.keeper DRIVER_PID SOCKETS_FOLDER PID...
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
from contextlib import suppress


def main() -> None:
    driver, folder, *pids = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    kept = [pidfd for pid in pids if (pidfd := _open(int(pid))) is not None]
    watched = _open(int(driver))
    poll = select.poll()
    if watched is not None:
        poll.register(watched, select.POLLIN)
        poll.poll()
    for pidfd in kept:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _open(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


if __name__ == "__main__":
    main()
