"""What the brain is told of a failure."""

from __future__ import annotations

import inspect

import msgspec
import pytest

from phalanx.transport.queue import MessageQueue
from phalanx.worker.failure import describe

SLOT_BYTES = inspect.signature(MessageQueue.create).parameters["slot_bytes"].default


def first(depth: int) -> None:
    second(depth)


def second(depth: int) -> None:
    first(depth)


def test_it_fits_into_a_slot_and_keeps_the_end_of_the_traceback() -> None:
    """What does not fit stays in memory of the sender, which ends."""
    with pytest.raises(RecursionError) as deep:
        first(0)
    assert len(str(deep.getrepr(style="native"))) > 64 * 1024
    failure = describe(1, "stepping", deep.value)
    assert failure.traceback.rstrip().endswith("RecursionError: maximum recursion depth exceeded")
    for error in (deep.value, ValueError("long " * SLOT_BYTES)):
        assert len(msgspec.msgpack.encode(describe(1, "stepping", error))) < SLOT_BYTES
