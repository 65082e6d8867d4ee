"""What a process is doing, in Python's lines: from outside, and without its GIL.

A process that offers its stacks has Python's faulthandler write them, at a signal, into memory that has a descriptor
but no name. The handler needs neither the interpreter nor the GIL, so it answers from within a call into C, from an
endless loop, and while it waits for a peer. One that is stopped cannot answer.
"""

from __future__ import annotations

import faulthandler
import functools
import os
import re
import signal
import time

STACKS = "stacks"
"""The name of the memory, as descriptors show it."""

_SIGNAL = signal.SIGUSR2
_ANSWER_S = 0.5
_LOOK_S = 0.005
_FRAME = re.compile(r'^  File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<function>.*)$', re.MULTILINE)


@functools.cache
def offer_stacks() -> int:
    """Let whoever asks have this process's stacks, from now on; returns the descriptor that they are read from.

    To be called in the main thread, by as many as like.
    """
    descriptor = os.memfd_create(f"phalanx:{STACKS}", os.MFD_CLOEXEC)
    faulthandler.register(_SIGNAL, file=descriptor, all_threads=False, chain=False)
    return descriptor


def stack_of(pid: int, descriptor: int, timeout_s: float = _ANSWER_S) -> tuple[str, ...]:
    """Where a process is that offers its stacks at `descriptor`: the main thread's lines, innermost first.

    Blocks for `timeout_s` at most. Empty if it does not answer, or is gone.
    """
    path = f"/proc/{pid}/fd/{descriptor}"
    try:
        with open(path, "rb") as file:
            told = file.seek(0, os.SEEK_END)
            os.kill(pid, _SIGNAL)
            return _frames(_await(file.fileno(), told, timeout_s))
    except OSError:  # it is gone, or may not be looked at
        return ()


def _await(descriptor: int, told: int, timeout_s: float) -> str:
    """What is written from `told` on, once nothing more comes."""
    expires_at, size = time.monotonic() + timeout_s, told
    while time.monotonic() < expires_at:
        time.sleep(_LOOK_S)
        before, size = size, os.fstat(descriptor).st_size
        if size == before > told:
            break
    return os.pread(descriptor, size - told, told).decode(errors="replace")


def _frames(text: str) -> tuple[str, ...]:
    return tuple(f"{found['file']}:{found['line']} in {found['function']}" for found in _FRAME.finditer(text))
