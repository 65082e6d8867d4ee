"""No test of the transport leaves anything behind."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator

import pytest
from shared_memory_names import new_names

from phalanx.transport.readiness import Poller


def _descriptors() -> list[str]:
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return sorted(link for link in links if "memfd:phalanx" in link or "pidfd" in link or "socket" in link)


@pytest.fixture(scope="package", autouse=True)
def _what_was_there_before() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # else each test's collection goes through all that torch and transformers have made
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    Poller.of_process()
    gc.collect()  # what an earlier test, of another package too, has left to the collector must not go in between
    before, names = Counter(_descriptors()), set(os.listdir("/dev/shm"))
    yield
    request.node.funcargs.clear()  # a mapping goes with its last view, and pytest keeps fixtures longer than this
    if Counter(_descriptors()) - before:
        gc.collect()
    assert Counter(_descriptors()) - before == Counter()
    assert not new_names(names)
