"""What a process is doing, in Python's lines: from outside, and without its GIL.

A process that offers its stacks has Python's faulthandler write them, at a signal, into memory that has a descriptor
but no name. The handler needs neither the interpreter nor the GIL, so it answers from within a call into C, from an
endless loop, and while it waits for a peer. One that is stopped cannot answer.

Those who ask take turns, and each clears away first what was told before: so the memory stays small.

The signal is a real-time one that nobody is known to use. A program that has a handler for it keeps it: it is not sent
to a process that does not handle it, or whose Python has another handler than ours.
"""

from __future__ import annotations

import errno
import faulthandler
import fcntl
import functools
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO

STACKS = "stacks"
"""The name of the memory, as descriptors show it."""

STACKS_SIGNAL = signal.SIGRTMAX - 3
_ANSWER_S = 0.5
_LOOK_S = 0.005
_FRAME = re.compile(r'^  File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<function>.*)$', re.MULTILINE)


@functools.cache
def offer_stacks() -> int:
    """Let whoever asks have this process's stacks, from now on; returns the descriptor that they are read from.

    0, and nothing is changed, if the program uses the signal itself. To be called in the main thread, by as many as
    like.
    """
    if not may_offer():
        return 0
    descriptor = os.memfd_create(f"phalanx:{STACKS}", os.MFD_CLOEXEC)
    if not descriptor:  # the program has closed its standard input; 0 says that there is none
        descriptor = os.dup(0)
        os.close(0)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)  # what is told after it was cleared is told from its start on
    faulthandler.register(STACKS_SIGNAL, file=descriptor, all_threads=False, chain=False)
    return descriptor


def may_offer() -> bool:
    """Whether no handler of the program's own is there for the signal. For any thread; faulthandler's does not show."""
    return signal.getsignal(STACKS_SIGNAL) is signal.SIG_DFL


def stack_of(pid: int, descriptor: int, timeout_s: float = _ANSWER_S) -> tuple[str, ...]:
    """Where a process is that offers its stacks at `descriptor`: the main thread's lines, innermost first.

    Blocks for `timeout_s` at most. Empty if it does not answer, or is gone.
    """
    expires_at = time.monotonic() + timeout_s
    try:
        with _process(pid) as process, _memory(pid, descriptor) as file:
            if not _has_signal_in(pid, b"SigCgt:"):  # it would be killed by it
                return ()
            if _is_our_turn(file.fileno(), expires_at - timeout_s / 2):
                os.ftruncate(file.fileno(), 0)
            told = file.seek(0, os.SEEK_END)
            signal.pidfd_send_signal(process, STACKS_SIGNAL)
            return _frames(_await(pid, file.fileno(), told, expires_at))
    except OSError:  # it is gone, or may not be looked at
        return ()


@contextmanager
def _process(pid: int) -> Iterator[int]:
    """A descriptor of the process: its pid may be another's by the time that it is signalled. Raises OSError."""
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def _memory(pid: int, descriptor: int) -> FileIO:
    """What a process has told of its stacks. Raises OSError, also if the program has another file there by now.

    Such a file is not even opened: it would be cleared, and written to by the process's handler.
    """
    place = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_PATH)
    try:
        path = f"/proc/self/fd/{place}"
        if (found := os.readlink(path)) != f"/memfd:phalanx:{STACKS} (deleted)":
            raise FileNotFoundError(errno.ENOENT, f"no {STACKS}", found)
        return FileIO(path, "r+")
    finally:
        os.close(place)


def _is_our_turn(descriptor: int, expires_at: float) -> bool:
    """Whether nobody else reads until the file is closed. If somebody does for so long, both may read what comes."""
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() > expires_at:
            return False
        time.sleep(_LOOK_S)


def _has_signal_in(pid: int, *sets: bytes) -> bool:
    """Whether one of these sets of signals, by the kernel's names for them, has ours. Of the main thread."""
    with open(f"/proc/{pid}/status", "rb") as file:
        found = [int(line.split()[1], 16) for line in file if line.startswith(sets)]
    return any(one >> STACKS_SIGNAL - 1 & 1 for one in found)


def _await(pid: int, descriptor: int, told: int, expires_at: float) -> str:
    """What is written from `told` on, once nothing more comes: while the handler runs, its signal is blocked."""
    size = told
    while time.monotonic() < expires_at:
        time.sleep(_LOOK_S)
        before, size = size, os.fstat(descriptor).st_size
        if size < told:  # somebody whose turn it was has cleared it
            told = 0
        if size == before > told and not _has_signal_in(pid, b"SigPnd:", b"ShdPnd:", b"SigBlk:"):
            break
    return os.pread(descriptor, size - told, told).decode(errors="replace")


def _frames(text: str) -> tuple[str, ...]:
    return tuple(f"{found['file']}:{found['line']} in {found['function']}" for found in _FRAME.finditer(text))
