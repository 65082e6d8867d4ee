"""What the brain is told of a failure."""

from __future__ import annotations

import msgspec
import pytest

from phalanx.errors import ConfigError
from phalanx.protocol.worker import Failure
from phalanx.transport.queue import DEFAULT_SHAPE
from phalanx.worker.failure import describe

SLOT_BYTES = DEFAULT_SHAPE.slot_bytes


def first(depth: int) -> None:
    second(depth)


def second(depth: int) -> None:
    first(depth)


def test_it_fits_into_a_slot_and_keeps_the_end_of_the_traceback() -> None:
    """What does not fit stays in memory of the sender, which ends."""
    with pytest.raises(RecursionError) as deep:
        first(0)
    assert len(str(deep.getrepr(style="native"))) > 64 * 1024
    failure = describe("stepping", deep.value)
    assert failure.phase == ""
    assert failure.traceback.rstrip().endswith("RecursionError: maximum recursion depth exceeded")
    for error in (deep.value, ValueError("long " * SLOT_BYTES), ValueError("\N{OX}" * SLOT_BYTES)):
        assert len(msgspec.msgpack.encode(describe("stepping", error))) < SLOT_BYTES


def test_a_name_that_is_no_text_travels() -> None:
    failure = describe("loading", ValueError("nothing in model\udcff"))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(failure), type=Failure) == failure
    assert failure.phase == "loading"
    assert r"model\udcff" in failure.message
    assert r"model\udcff" in failure.traceback


def test_a_wrong_setting_is_told_by_field_value_and_what_is_allowed() -> None:
    failure = describe("loading", ConfigError("tensor_parallel_size", 16, "at most 9 for this model"))
    assert failure.is_user_error
    assert failure.setting is not None
    error = failure.setting.error()
    assert (error.field, error.value, error.allowed) == ("tensor_parallel_size", 16, "at most 9 for this model")
