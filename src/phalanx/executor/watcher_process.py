"""The process of a node's watcher: how it is started, heard and reaped, and what it runs."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import msgspec

from phalanx.executor.beats import Beating
from phalanx.executor.log_stream import log_to_stderr
from phalanx.executor.output import output_until_end
from phalanx.executor.shared_fate import describe_exit, die_with_parent
from phalanx.ledger.reporting import ReportOrder, report
from phalanx.ledger.watch_order import WatchOrder
from phalanx.ledger.watcher import watch

END_DEADLINE_S = 5.0


def spawn_watcher(order: WatchOrder | ReportOrder, stop: int, beats: int) -> subprocess.Popen[bytes]:
    """Raises OSError; nothing is left of it then."""
    command = [sys.executable, "-m", "phalanx.executor.watcher_process", *map(str, (os.getpid(), stop, beats))]
    others = order.other_nodes if isinstance(order, WatchOrder) else None
    passed = (stop, beats) if others is None else (stop, beats, others.listener)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=passed)
    assert process.stdin is not None
    try:
        with process.stdin as stdin:
            stdin.write(msgspec.msgpack.encode(order))
    except OSError as error:  # it has ended before it had read what to do
        process.kill()
        code = reap(process)
        raise OSError(f"it ended at once, {describe_exit(code)}") from error
    return process


def lines_of(process: subprocess.Popen[bytes], every_s: float, look_after: Callable[[], None]) -> Iterator[bytes]:
    """What a process writes, until it ends, whoever else has inherited its output. It is looked after meanwhile."""
    assert process.stdout is not None
    unread, pidfd = b"", os.pidfd_open(process.pid)
    try:
        for data in output_until_end(process.stdout.fileno(), pidfd, every_s, look_after):
            *lines, unread = (unread + data).split(b"\n")
            yield from lines
    finally:
        os.close(pidfd)


def reap(process: subprocess.Popen[bytes]) -> int:
    """Its exit code. It has closed its output, so it is about to end; killed if it does not."""
    assert process.stdout is not None
    process.stdout.close()
    try:
        return process.wait(END_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def main() -> None:
    """Usage: python -m phalanx.executor.watcher_process PARENT_PID STOP_FD BEATS_FD < ORDER > VERDICTS"""
    parent_pid, stop, beats = map(int, sys.argv[1:])
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the engine that decides when it ends
    log_to_stderr("%(levelname)s watcher: %(message)s", level=logging.INFO)
    order = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=WatchOrder | ReportOrder)
    beat = Beating(beats).beat
    if isinstance(order, WatchOrder):
        watch(order, stop, sys.stdout.fileno(), beat)
    else:
        report(order, stop, beat)


if __name__ == "__main__":
    main()
