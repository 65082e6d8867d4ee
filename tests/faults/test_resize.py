"""Another number of ranks while requests run: every stream is that of a run without it, whatever happens meanwhile."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from formation_rig import READY_WITHIN_S, Rig, kill
from resize_rig import cancel_once_begun, once, pids_that_come, run_through
from test_formation import expect_nothing_is_left, num_segments

from phalanx.engine.resizing import EngineResizing
from phalanx.errors import PeerDiedError
from phalanx.membership.resize import Size
from phalanx.protocol.client import Resize
from phalanx.protocol.columns import WrongSetting
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.transport.liveness import is_running
from phalanx.worker.methods import remote_method

pytestmark = pytest.mark.slow


class Follower:
    """A worker extension that notes which size was before, and cannot do with tensor parallelism."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._before: list[int] = []

    @remote_method
    def reinitialize_distributed(self, data_parallel_size: int, tensor_parallel_size: int) -> None:
        if self._worker.spec.config.parallel.tensor_parallel_size > 1:
            raise ValueError("not over several ranks")
        self._before = [data_parallel_size, tensor_parallel_size]

    @remote_method
    def before(self) -> list[int]:
        return self._before


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Two replicas that share experts."""
    mixture = write_checkpoint(tmp_path_factory.mktemp("mixture"), "mixtral")
    num_held = num_segments()
    rig = Rig(
        mixture,
        tmp_path_factory.mktemp("rig") / "report",
        data_parallel_size=2,
        enable_expert_parallel=True,
        worker_extension_cls="test_resize:Follower",
    )
    yield rig
    expect_nothing_is_left(rig, num_held)


def test_down_and_up_and_a_fault_after_it(rig: Rig) -> None:
    for size in (Size(1, 1), Size(2, 1)):
        before, pids, epoch = rig.formation.size, rig.pids(), rig.formation.epoch
        ended = run_through(rig, size)
        assert ended.ending == "done" and ended.ready is not None, ended
        assert (ended.ready.num_replicas, ended.ready.world_size) == (size.data_parallel_size, len(rig.pids()))
        assert rig.formation.size == size and rig.formation.epoch > epoch
        assert rig.formation.collective_rpc("before", unique_reply_rank=0).result() == list(before)
        expires_at = time.monotonic() + READY_WITHIN_S
        while any(map(is_running, pids.values())):
            assert time.monotonic() < expires_at
            time.sleep(0.01)
    rig.errors.clear()
    assert rig.run(kill(rig.pids()[1], signal.SIGKILL)) == rig.expected
    assert rig.errors == [PeerDiedError] and rig.stats().healed == {"new line": 1}


def test_a_rank_that_is_prepared_is_killed(rig: Rig) -> None:
    pids, epoch = rig.pids(), rig.formation.epoch

    def harm() -> bool:
        for pid in pids_that_come(rig).values():
            os.kill(pid, signal.SIGKILL)
            return True
        return False

    ended = run_through(rig, Size(1, 1), once(harm))
    assert ended.ending == "failed" and "killed by SIGKILL" in ended.reason
    assert rig.pids() == pids and rig.formation.epoch == epoch and rig.formation.size == Size(2, 1)


def test_a_rank_that_serves_is_killed_meanwhile(rig: Rig) -> None:
    """Healing comes first."""
    rig.errors.clear()

    def harm() -> bool:
        if not pids_that_come(rig):
            return False
        os.kill(rig.pids()[0], signal.SIGKILL)
        return True

    ended = run_through(rig, Size(1, 1), once(harm))
    assert ended.ending == "failed" and "rank 0" in ended.reason
    assert rig.errors == [PeerDiedError] and rig.formation.size == Size(2, 1)


@pytest.mark.parametrize("when", ["before it has begun", "once begun"])
def test_cancelled_and_another_one_refused(rig: Rig, when: str) -> None:
    pids, refused = rig.pids(), []

    def meanwhile(resizing: EngineResizing) -> None:
        other = EngineResizing(rig.formation, rig.brain, refused.append)
        other.begin(Resize(8, 1, 2))
        if when == "once begun":
            cancel_once_begun(resizing)
        else:
            resizing.cancel(7)

    assert run_through(rig, Size(1, 1), meanwhile).ending == "cancelled" and rig.pids() == pids
    assert refused[0].ending == "refused" and "from DP 2, TP 1 to DP 1, TP 1 is under way" in refused[0].reason


def test_an_extension_that_cannot_follow_undoes_it(rig: Rig) -> None:
    ended = run_through(rig, Size(1, 2))
    assert ended.ending == "failed" and "ValueError: not over several ranks" in ended.reason
    assert rig.formation.size == Size(2, 1)


def test_what_cannot_be_is_refused_before_anything_is_started(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = run_through(rig, Size(5, 1))
    assert ended.ending == "refused" and "at most 4 ranks for this model" in ended.reason
    with monkeypatch.context() as patch:
        patch.setattr("phalanx.membership.room.num_cores", lambda: 3)
        ended = run_through(rig, Size(4, 1))
    assert ended.setting == WrongSetting("data_parallel_size", 4, "there are 3 cores, too few for 4 ranks")
    with monkeypatch.context() as patch:
        patch.setattr("phalanx.membership.room.free_host_bytes", lambda: 0)
        ended = run_through(rig, Size(1, 1))
    assert ended.ending == "refused" and "more memory, and 0.00 GiB are free" in ended.reason
    rig.formation.weights_changed()
    ended = run_through(rig, Size(1, 1))
    assert ended.ending == "refused" and "those of the checkpoint" in ended.reason


def test_a_standby_line_is_of_the_size_that_there_is(tmp_path: Path) -> None:
    """And tensor parallelism of a dense model."""
    num_held = num_segments()
    rig = Rig(write_checkpoint(tmp_path / "llama"), tmp_path / "report", tensor_parallel_size=2, standby=1)
    rig.await_standby()
    assert run_through(rig, Size(1, 1)).ending == "done"
    rig.await_standby()
    assert rig.run(kill(rig.pids()[0], signal.SIGKILL)) == rig.expected
    assert rig.stats().healed == {"standby": 1} and len(rig.pids()) == 1
    expect_nothing_is_left(rig, num_held)
