"""What a process writes, though its end is not that of its pipe."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

import pytest

from phalanx.executor.fork_server import Forked, frame
from phalanx.executor.fork_server_process import ForkServerProcess
from phalanx.executor.output import output_until_end


@pytest.mark.parametrize("is_inherited", [False, True])
def test_all_that_was_written_and_then_the_end(is_inherited: bool) -> None:
    """Whether somebody else has the pipe's end or not."""
    read, write = os.pipe()
    inherited = [os.dup(write)] if is_inherited else []
    process = subprocess.Popen(["sh", "-c", "printf written"], stdout=write)
    os.close(write)
    pidfd = os.pidfd_open(process.pid)
    assert b"".join(output_until_end(read, pidfd)) == b"written"
    assert process.wait() == 0
    for descriptor in (read, pidfd, *inherited):
        os.close(descriptor)


def test_the_end_of_a_fork_server_is_known_though_a_child_has_its_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was stopped between its fork and its first line."""
    inherited: list[int] = []
    told = frame(Forked(0, 0, 1, 1))
    popen: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen

    def pretend(command: list[str], **settings: object) -> subprocess.Popen[bytes]:
        inherited.append(os.dup(int(command[-1])))
        os.write(inherited[-1], told)
        return popen(["sh", "-c", "exit 3"])

    monkeypatch.setattr(subprocess, "Popen", pretend)
    monkeypatch.setattr(ForkServerProcess, "_take", lambda self, event: taken.append(event))
    taken: list[object] = []
    server = ForkServerProcess({})
    server._thread.join(30.0)
    assert server.ended == "exit code 3" and taken == [Forked(0, 0, 1, 1)]
    server.close(0.0)
    os.close(inherited[0])
