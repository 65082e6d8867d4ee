"""The actor of a rank, over a launcher that starts nothing. Needs no Ray that runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

pytest.importorskip("ray")

from phalanx.config import Config
from phalanx.errors import StartError
from phalanx.executor.ray import rank_actor
from phalanx.executor.ray.messages import Preparation
from phalanx.executor.ray.rank_actor import RankActor
from phalanx.transport.liveness import Party
from phalanx.transport.queue import QueueHandle, QueueShape
from phalanx.transport.shared_memory import SegmentHandle
from phalanx.worker.spec import WorkerSpec

PID = 4711
KILLED = "killed by SIGKILL"


class FakeLauncher:
    """Of one process."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.is_closed = False
        self.while_reserving: Any = lambda: None
        self.employed: list[WorkerSpec] = []

    def warm(self, checkpoint: str, device: str) -> None:
        assert checkpoint == "m"

    def reserve(self, rank: int, timeout_s: float) -> int:
        self.while_reserving()
        return PID

    def employ(self, spec: WorkerSpec) -> None:
        self.employed.append(spec)
        raise StartError("the fork server", "starting", "it has ended")

    def await_exits(self, timeout_s: float | None) -> bool:
        assert timeout_s is None
        return True

    def exits(self) -> dict[int, str]:
        return {1: KILLED}

    def close(self, timeout_s: float) -> None:
        self.is_closed = True


class FakeLaunchers:
    def __init__(self) -> None:
        self.made: list[FakeLauncher] = []
        self.while_reserving: Any = lambda: None

    def launcher(self, environment: Mapping[str, str]) -> FakeLauncher:
        self.made.append(FakeLauncher(environment))
        self.made[-1].while_reserving = self.while_reserving
        return self.made[-1]


@pytest.fixture
def launchers(monkeypatch: pytest.MonkeyPatch) -> FakeLaunchers:
    found = FakeLaunchers()
    monkeypatch.setattr(rank_actor, "LocalLaunchers", lambda: found)
    monkeypatch.setattr(rank_actor, "end_with_raylet", lambda: None)
    monkeypatch.setattr(rank_actor, "as_nice_as_raylet", lambda: None)
    return found


def preparation(epoch: int, **others: Any) -> bytes:
    settings = {"environment": {}, "threads": 2, "ranks_on_host": 1, "visible_devices": None, **others}
    return msgspec.msgpack.encode(Preparation(epoch=epoch, rank=1, checkpoint="m", deadline_s=5.0, **settings))


def order(epoch: int, brain: Party) -> bytes:
    spec = WorkerSpec(
        rank=1,
        local_rank=0,
        ranks_on_host=1,
        device="cpu",
        config=Config.build(model="m"),
        checkpoint="m",
        epoch=epoch,
        groups=(),
        queue=QueueHandle(SegmentHandle(1, 2, 3, 4), brain, 0, "rank 1", 1, QueueShape(), 0.0),
    )
    return msgspec.msgpack.encode(spec)


def test_two_lines_at_a_time(launchers: FakeLaunchers, monkeypatch: pytest.MonkeyPatch) -> None:
    ends_with: list[Party] = []
    monkeypatch.setattr(rank_actor, "end_with", ends_with.append)
    actor, brain = RankActor(), Party("the brain", 1, 2)
    assert actor.make_process(preparation(1)) == actor.make_process(preparation(2)) == PID
    assert actor.run(order(1, brain)) == actor.run(order(2, brain)) == KILLED
    assert ends_with == [brain], "all lines have the same"
    actor.end(1)
    first, second = launchers.made
    assert first.is_closed and not second.is_closed
    assert [spec.epoch for spec in (*first.employed, *second.employed)] == [1, 2]
    assert actor.run(order(1, brain)) == "it was ended before it had begun"


def test_a_line_that_is_not_to_come_any_more(launchers: FakeLaunchers) -> None:
    """Said before its process is asked for, or while it is made."""
    actor = RankActor()
    actor.end(1)
    with pytest.raises(RuntimeError, match="it is not needed any more"):
        actor.make_process(preparation(1))
    launchers.while_reserving = lambda: actor.end(2)
    with pytest.raises(RuntimeError, match="it is not needed any more"):
        actor.make_process(preparation(2))
    assert launchers.made[-1].is_closed


def test_what_the_node_has_set_itself_stays(launchers: FakeLaunchers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # Ray's doing
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # Ray's doing, too
    given = {"NCCL_DEBUG": "INFO", "HF_TOKEN": "x"}
    RankActor().make_process(preparation(1, environment=given, visible_devices="2,3"))
    found = launchers.made[0].environment
    assert "NCCL_DEBUG" not in found and found["HF_TOKEN"] == "x"
    assert (found["OMP_NUM_THREADS"], found["CUDA_VISIBLE_DEVICES"]) == ("2", "2,3")
