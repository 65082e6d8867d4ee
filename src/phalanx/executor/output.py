"""What a process writes into a pipe of ours, until it ends."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

CHUNK_BYTES = 1 << 16


def output_until_end(pipe: int, pidfd: int) -> Iterator[bytes]:
    """Chunk by chunk, also what is still in the pipe when the process ends.

    The end is not that of the pipe alone: a child, before it has closed what it inherited, keeps that open for as long
    as it is stopped. Descriptors stay the caller's.
    """
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    poll.register(pidfd, select.POLLIN)
    while pipe in (ready := [descriptor for descriptor, _ in poll.poll()]) or pidfd not in ready:
        data = os.read(pipe, CHUNK_BYTES)
        if not data:
            return
        yield data
