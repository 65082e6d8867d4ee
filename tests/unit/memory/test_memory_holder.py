"""What a holder keeps: memory of processes that are gone, for those that come after them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from phalanx.errors import FrameError, PeerDiedError
from phalanx.memory.arena import Arena
from phalanx.memory.held import HeldMemory, decode_held, encode_held
from phalanx.memory.holder import Holder

CPU = torch.device("cpu")


@pytest.fixture
def holder() -> Iterator[Holder]:
    with Holder() as holder:
        yield holder


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Worker:
    """Another process, which has filled some memory and waits for its end."""

    def __init__(self, **tensors: int) -> None:
        told_read, told_write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            arena = Arena("memory of a worker", CPU)
            for name, value in tensors.items():
                arena.allocate(name, (1000,), torch.int64).fill_(value)
            os.write(told_write, encode_held(arena.describe()))
            signal.pause()
            os._exit(0)
        os.close(told_write)
        self.told = decode_held(os.read(told_read, 1 << 16))
        os.close(told_read)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def test_memory_outlives_a_worker_that_is_killed(holder: Holder) -> None:
    worker = Worker(weight=7, key=8)
    assert holder.memory(0) is None
    held = holder.hold(0, worker.told)
    worker.kill()
    assert {handle.pid for handle in held.segments} == {os.getpid()}
    with Arena("the next one", CPU, holder.memory(0)) as arena:
        assert [arena.allocate(name, (1000,), torch.int64)[999].item() for name in ("key", "weight")] == [8, 7]
        assert holder.hold(0, arena.describe()) == held, "what is held already stays as it is"


def test_it_is_not_mapped(holder: Holder) -> None:
    worker = Worker(weight=7)
    holder.hold(0, worker.told)
    worker.kill()
    assert "memory of a worker" not in Path("/proc/self/maps").read_text()


def test_who_was_too_late_changes_nothing(holder: Holder) -> None:
    first, second = Worker(weight=7), Worker(weight=8)
    held = holder.hold(0, first.told)
    before = num_descriptors()
    for worker in (first, second):
        worker.kill()
    with pytest.raises(PeerDiedError, match="memory of a worker"):
        holder.hold(0, second.told)
    assert holder.memory(0) == held and num_descriptors() == before


def test_half_of_a_memory_is_not_kept(holder: Holder) -> None:
    with Arena("first", CPU) as first, Arena("second", CPU) as second:
        for arena in (first, second):
            arena.allocate("t", (1,), torch.int64)
        gone = second.describe()
        second.close()
        before = num_descriptors()
        with pytest.raises(FrameError):
            holder.hold(0, HeldMemory(first.describe().segments + gone.segments, {}))
    assert num_descriptors() <= before and holder.memory(0) is None


def test_what_is_told_no_more_is_let_go(holder: Holder) -> None:
    before = num_descriptors()
    with Arena("first", CPU) as first:
        first.allocate("weight", (1,), torch.int64)
        first.begin_part()
        first.allocate("key", (1,), torch.int64).fill_(5)
        holder.hold(0, first.describe())
        holder.hold(1, first.describe())
        holder.hold(0, first.describe(lambda name: name == "key"))
        assert num_descriptors() == before + 2 + 1 + 2, "an arena has one for each segment"
    holder.drop(1)
    assert num_descriptors() == before + 1
    with Arena("next", CPU, holder.memory(0)) as arena:
        assert arena.allocate("key", (1,), torch.int64).item() == 5
        arena.allocate("weight", (1,), torch.int64)
        assert len(holder.hold(0, arena.describe()).segments) == 2
    holder.close()
    holder.close()
    assert holder.memory(0) is None
