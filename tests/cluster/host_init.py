"""The first process of a test's host: prepares its own file systems, then waits until the test ends, however it ends.

When it leaves, the kernel ends every process of the host; and the host's files, addresses and links go with its
namespaces.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

STAGE = Path("/mnt")


def main() -> None:
    name, known_hosts, *visible = sys.argv[1:]
    socket.sethostname(name)
    _mount("-t", "tmpfs", "-o", "size=1g", "tmpfs", "/dev/shm")
    _cover_etc_hosts(known_hosts)
    _cover_tmp([Path(path) for path in visible])
    Path("/proc/sys/net/ipv6/conf/all/keep_addr_on_down").write_text("1")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whom nobody else waits for, the kernel reaps
    os.write(1, b"ready\n")
    while os.read(0, 1):  # nobody writes: it ends when the test's end of the pipe is closed
        pass


def _cover_etc_hosts(content: str) -> None:
    own = Path("/dev/shm/hosts")
    own.write_text(content)
    _mount("--bind", str(own), "/etc/hosts")
    own.unlink()


def _cover_tmp(visible: list[Path]) -> None:
    """An empty /tmp of the host's own, in which only the `visible` folders of the outer one are seen."""
    _mount("-t", "tmpfs", "-o", "size=2g,mode=1777", "tmpfs", str(STAGE))
    for path in visible:
        if path.is_relative_to("/tmp"):
            inner = STAGE / path.relative_to("/tmp")
            inner.mkdir(parents=True, exist_ok=True)
            _mount("--rbind", str(path), str(inner))
    _mount("--move", str(STAGE), "/tmp")


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


if __name__ == "__main__":
    main()
