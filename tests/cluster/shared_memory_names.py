"""What has a name in /dev/shm, where nothing of ours should have one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

_WITHIN_S = 2.0


def new_names(before: set[str]) -> set[str]:
    """Those that came after `before` and stay: what others on this machine make is gone in a moment."""
    expires_at = time.monotonic() + _WITHIN_S
    while (new := set(os.listdir("/dev/shm")) - before) and time.monotonic() < expires_at:
        time.sleep(0.01)
    return new


@contextmanager
def no_new_names() -> Iterator[None]:
    """Nothing that is done meanwhile leaves one."""
    before = set(os.listdir("/dev/shm"))
    yield
    assert not new_names(before)
