"""What a process writes into a pipe of ours, until it ends."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator

CHUNK_BYTES = 1 << 16


def output_until_end(
    pipe: int, pidfd: int, every_s: float | None = None, meanwhile: Callable[[], None] = lambda: None
) -> Iterator[bytes]:
    """Chunk by chunk, also what is still in the pipe when the process ends. Calls `meanwhile` whenever nothing has come
    for `every_s`.

    The end is not that of the pipe alone: a child, before it has closed what it inherited, keeps that open for as long
    as it is stopped. Descriptors stay the caller's.
    """
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    poll.register(pidfd, select.POLLIN)
    at_most_ms = every_s * 1000 if every_s is not None else None
    while pipe in (ready := [descriptor for descriptor, _ in poll.poll(at_most_ms)]) or pidfd not in ready:
        if not ready:
            meanwhile()
            continue
        data = os.read(pipe, CHUNK_BYTES)
        if not data:
            return
        yield data
