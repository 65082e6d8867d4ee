"""Ranks are killed, stopped and led astray while requests run: every stream is that of a run without faults."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from formation_rig import POISON, PROMPTS, READY_WITHIN_S, SAMPLINGS, Poisonous, Rig, kill

from phalanx.errors import EngineDeadError, HungError, NotHealedError, PeerDiedError, WorkerError
from phalanx.executor.executor import Executor
from phalanx.membership.lines import Lines
from phalanx.protocol.client import Submit
from phalanx.protocol.columns import ints
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.faults import Fault
from phalanx.transport.liveness import is_running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mixture"), "qwen3_moe")


@pytest.fixture(scope="module")
def guarded(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Two ranks, and two that stand ready."""
    num_held = num_segments()
    rig = Rig(llama, tmp_path_factory.mktemp("guarded") / "report", tensor_parallel_size=2, standby=1)
    yield rig
    expect_nothing_is_left(rig, num_held)


@pytest.fixture
def ready(guarded: Rig) -> Rig:
    guarded.await_standby()
    guarded.errors.clear()
    return guarded


def expect_nothing_is_left(rig: Rig, num_held: int) -> None:
    pids = [rig.server_pid(), *rig.pids().values()]
    rig.close()
    assert not any(map(is_running, pids))
    assert num_segments() == num_held


def num_segments() -> int:
    """Of ranks' memory, that this process holds, but for what only waits to be collected."""
    gc.collect()
    return sum("memory of rank" in _target(descriptor) for descriptor in os.listdir("/proc/self/fd"))


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:  # that of the listing
        return ""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("state", ["prefill", "decode"])
def test_a_killed_rank_with_a_standby_line(ready: Rig, rank: int, state: str) -> None:
    gc.collect()
    before, num_descriptors = ready.stats(), len(os.listdir("/proc/self/fd"))
    assert ready.run_with(Fault(kind="kill", rank=rank, state=state, step=3)) == ready.expected  # type: ignore[arg-type]
    after = ready.stats()
    assert after.epoch > before.epoch and after.healed["standby"] == before.healed.get("standby", 0) + 1
    assert ready.errors == [PeerDiedError]
    ready.await_standby()
    expires_at = time.monotonic() + 5.0
    while len(os.listdir("/proc/self/fd")) > num_descriptors:  # what the failed line has used goes in the background
        assert time.monotonic() < expires_at, sorted(map(_target, os.listdir("/proc/self/fd")))
        gc.collect()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(kind="stop", rank=1), HungError),
        (Fault(kind="error", rank=0), WorkerError),
        (Fault(kind="skip", rank=1, state="prefill"), HungError),
    ],
)
def test_a_rank_that_is_stopped_fails_or_diverges(ready: Rig, fault: Fault, error: type[Exception]) -> None:
    assert ready.run_with(fault) == ready.expected
    assert ready.errors == [error]


@pytest.mark.parametrize("kind", ["kill", "error"])
def test_a_standby_line_goes_on_while_those_before_it_end(
    ready: Rig, kind: Literal["kill", "error"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs, where an end takes long: blocks are set aside, and requests have copies of what they held."""
    may_end, kill_ranks = threading.Event(), Executor.kill

    def kill_later(executor: Executor) -> None:
        may_end.wait(READY_WITHIN_S)
        kill_ranks(executor)

    monkeypatch.setattr(Lines, "go_on_beside", True)
    monkeypatch.setattr(Executor, "kill", kill_later)
    scheduler = ready.brain._scheduler
    assert ready.run_with(Fault(kind=kind, rank=1, state="decode", step=3)) == ready.expected
    assert scheduler.has_set_aside and scheduler.copies == ()
    may_end.set()
    ready.await_standby()
    assert ready.run() == ready.expected
    assert not scheduler.has_set_aside


def test_both_lines_and_the_fork_server_are_killed(ready: Rig) -> None:
    """What is left is the memory: a fork server comes up, and a line on it."""
    server = ready.server_pid()
    failed_before = dict(ready.stats().failed)
    assert ready.run(kill(server, signal.SIGKILL)) == ready.expected
    assert ready.stats().healed["new line"] == 1
    assert ready.server_pid() != server and ready.stats().failed.get("checkpoint") == failed_before.get("checkpoint")


def test_a_standby_line_that_dies_is_replaced(ready: Rig) -> None:
    num_faults = ready.stats().num_standby_faults
    standby = ready.formation._recovery._standby  # type: ignore[union-attr]
    os.kill(standby._line.executor._launcher.pids()[1], signal.SIGKILL)  # type: ignore[union-attr]
    assert ready.run() == ready.expected and not ready.errors
    expires_at = time.monotonic() + READY_WITHIN_S
    while ready.stats().num_standby_faults == num_faults:
        assert time.monotonic() < expires_at
        time.sleep(0.01)
    ready.await_standby()
    assert ready.stats().num_standby_faults == num_faults + 1


@pytest.mark.parametrize(
    "grid",
    [
        {"pipeline_parallel_size": 2},
        {"data_parallel_size": 2, "enable_expert_parallel": True, "enable_eplb": True, "eplb_interval_steps": 5},
    ],
    ids=["pipeline", "experts"],
)
def test_a_killed_rank_without_a_standby_line(grid: dict[str, int], llama: Path, mixture: Path, tmp_path: Path) -> None:
    num_held = num_segments()
    rig = Rig(mixture if "data_parallel_size" in grid else llama, tmp_path / "report", **grid)
    for rank, state in ((1, "decode"), (0, "prefill")):
        assert rig.run_with(Fault(kind="kill", rank=rank, state=state, step=2)) == rig.expected  # type: ignore[arg-type]
    assert rig.stats().healed == {"new line": 2}
    rig.formation._recovery._memory.drop()  # type: ignore[union-attr]
    assert rig.run(kill(rig.pids()[1], signal.SIGKILL)) == rig.expected, "computed again from the tokens"
    assert rig.stats().healed == {"new line": 2, "checkpoint": 1}
    expect_nothing_is_left(rig, num_held)


def test_faults_while_it_heals_requests_that_kill_and_an_end_in_the_midst_of_it(llama: Path, tmp_path: Path) -> None:
    extension = f"{Poisonous.__module__}:{Poisonous.__name__}"
    rig = Rig(llama, tmp_path / "report", tensor_parallel_size=2, worker_extension_cls=extension)
    killed = threading.Event()

    def kill_the_next() -> None:
        epoch = rig.formation.epoch
        while not killed.is_set():
            for pid in children_of(server):
                if pid not in old:
                    os.kill(pid, signal.SIGKILL)
                    killed.set()
                    return
            assert rig.formation.epoch == epoch
            time.sleep(0.001)

    server, old = rig.server_pid(), set(rig.pids().values())
    hurting = threading.Thread(target=kill_the_next)
    hurting.start()
    assert rig.run(kill(rig.pids()[0], signal.SIGKILL)) == rig.expected
    hurting.join()
    assert rig.stats().failed == {"new line": 1} and rig.stats().healed == {"new line": 1}

    rig.brain.submit(Submit(999, ints([1, POISON, 2]), SAMPLINGS[0]))
    assert rig.run() == rig.expected, "what comes beside a request that kills lives"
    assert set(rig.request_errors) == {999} and "killed by SIGKILL" in rig.request_errors[999]

    rig.brain.submit(Submit(1000, ints(PROMPTS[0]), SAMPLINGS[0]))
    os.kill(rig.pids()[1], signal.SIGKILL)
    with pytest.raises(PeerDiedError) as caught:
        while True:
            rig.brain.step()
    healing = rig.formation.begin_healing(caught.value)
    began_at = time.monotonic()
    rig.close()
    assert time.monotonic() - began_at < 5.0
    assert healing.wait(0.0)
    with pytest.raises((EngineDeadError, NotHealedError)):
        healing.result()
    assert not is_running(server)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
