"""The fork server and its workers, as the launcher sees them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from warm_launchers import LAUNCHERS

from phalanx.config import Config
from phalanx.errors import PeerDiedError, StartError, UserError, WorkerError
from phalanx.executor.executor import Executor
from phalanx.executor.local import LocalLauncher
from phalanx.executor.start import NewLauncher, start_executor
from phalanx.models.checkpoint import resolve
from phalanx.protocol.columns import ints
from phalanx.protocol.sampling import SamplingParams
from phalanx.protocol.worker import FIRST_EPOCH, Done, NewRequest, Ping, Step, StepPlan, StepShape
from phalanx.testing.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


def start(checkpoint: Path, new_launcher: NewLauncher = LocalLauncher, **settings: object) -> Executor:
    config = Config.build(
        model=str(checkpoint),
        tensor_parallel_size=2,
        max_num_seqs=4,
        max_model_len=64,
        kv_cache_memory=1 << 20,
        **settings,
    )
    executor, _ = start_executor(config, resolve(str(checkpoint)), lambda *_: None, new_launcher=new_launcher)
    return executor


@pytest.fixture
def warm() -> NewLauncher:
    """Of a launcher that has its fork server already."""
    return LAUNCHERS.launcher


@pytest.fixture
def executor(checkpoint: Path, warm: NewLauncher) -> Iterator[Executor]:
    with start(checkpoint, warm) as executor:
        yield executor


def launcher_of(executor: Executor) -> LocalLauncher:
    launcher = executor._launcher
    assert isinstance(launcher, LocalLauncher)
    return launcher


def num_threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_ranks_answer_and_leave(checkpoint: Path) -> None:
    executor = start(checkpoint)
    assert executor.submit(Ping(), deadline_s=5).result() == [Done(), Done()]
    pids = launcher_of(executor).pids()
    executor.close()
    assert launcher_of(executor).exits() == {0: "exit code 0", 1: "exit code 0"}
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


def test_the_fork_server_has_one_thread(extended: Executor) -> None:
    """A fork copies the calling thread alone: a lock that another one held would never be released in the child."""
    (server,) = {parent_of(pid) for pid in launcher_of(extended).pids().values()}
    assert num_threads(server) == 1


def test_a_killed_rank_is_noticed_and_named(executor: Executor) -> None:
    os.kill(launcher_of(executor).pids()[1], signal.SIGKILL)
    killed_at = time.monotonic()
    with pytest.raises(PeerDiedError, match=r"rank 1 .* killed by SIGKILL"):
        executor.submit(Ping(), deadline_s=30).result()
    assert time.monotonic() - killed_at < 1.0


def test_a_stopped_rank_is_named_by_those_that_wait_for_it(checkpoint: Path, warm: NewLauncher) -> None:
    """The brain itself awaits nothing but the output rank's answer."""
    request = NewRequest(0, ints([1]), 1, 0, ints([0]), SamplingParams(temperature=0.0), 0, ())
    plan = StepPlan(FIRST_EPOCH, 1, StepShape(1, 1, 1), ints([0]), ints([1]), new=(request,))
    with start(checkpoint, warm, step_timeout_s=4.0) as executor:
        os.kill(launcher_of(executor).pids()[1], signal.SIGSTOP)
        with pytest.raises(
            WorkerError, match=r"rank 0 on .*: DeadlineError: waited 3.* s for all_reduce .* from rank 1"
        ):
            executor.step(Step((plan,))).result()


def test_a_plan_of_another_epoch_is_dropped(extended: Executor) -> None:
    stale = StepPlan(epoch=99, step=1, shape=StepShape(1, 1, 1), slots=ints([3]), num_tokens=ints([1]))
    extended.submit(Step((stale,)), ranks=(), deadline_s=5)
    assert extended.submit(Ping(), deadline_s=5).result() == [Done(), Done()]


def test_a_users_mistake_that_only_a_rank_sees(tmp_path: Path, warm: NewLauncher) -> None:
    checkpoint = write_checkpoint(tmp_path, num_attention_heads=1, num_key_value_heads=1)
    with pytest.raises(UserError, match="tensor_parallel_size"):
        start(checkpoint, warm)


def test_a_start_that_takes_too_long_says_who_is_awaited(checkpoint: Path) -> None:
    with pytest.raises(Exception, match="rank 0, rank 1") as caught:
        start(checkpoint, start_timeout_s=0.05)
    assert isinstance(caught.value, (TimeoutError, StartError))


EXTENSION = """
import logging

from phalanx.worker.methods import remote_method

class Probe:
    def __init__(self, worker):
        self.worker = worker

    @remote_method
    def parameters_like(self, part: str) -> int:
        return sum(part in name for name in self.worker.model.named_parameters())

    @remote_method
    def summed(self, value: float) -> float:
        import torch

        return float(self.worker.groups["tp@0"].all_reduce(torch.tensor([value * (1 + self.worker.spec.rank)]))[0])

    @remote_method
    def warn(self, of: list[str]) -> None:
        for one in of:
            logging.getLogger("mine").warning("beware of %s", one)

    @remote_method
    def fail_on(self, rank: int) -> None:
        if self.worker.spec.rank == rank:
            raise ArithmeticError("no such sum")
"""


def start_extended(checkpoint: Path, folder: Path) -> Executor:
    (folder / "phalanx_probe.py").write_text(EXTENSION)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        return start(checkpoint, worker_extension_cls="phalanx_probe:Probe")


@pytest.fixture(scope="module")
def extended(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    """For tests after which the ranks are as before."""
    with start_extended(checkpoint, tmp_path_factory.mktemp("extension")) as executor:
        yield executor


def test_ranks_carry_out_methods_that_they_declare(extended: Executor) -> None:
    places = extended.collective_rpc("whereabouts")
    assert [place["rank"] for place in places] == [0, 1]
    assert {place["pid"] for place in places} == set(launcher_of(extended).pids().values())
    assert extended.collective_rpc("parameters_like", ["q_proj"]) == [2, 2]
    assert extended.collective_rpc("summed", kwargs={"value": 1.5}, unique_reply_rank=1) == 4.5
    pending = extended.collective_rpc("summed", [1.0], non_block=True)
    assert pending.result() == [3.0, 3.0]


def test_a_method_that_raises_names_its_rank_and_the_run_goes_on(extended: Executor) -> None:
    with pytest.raises(WorkerError, match=r"rank 1.*ArithmeticError.*no such sum"):
        extended.collective_rpc("fail_on", [1], unique_reply_rank=0)
    with pytest.raises(UserError, match="'remove' is not declared"):
        extended.collective_rpc("remove")
    with pytest.raises(UserError, match="unique_reply_rank: 2"):
        extended.collective_rpc("whereabouts", unique_reply_rank=2)
    extended.check_health()


def test_a_rank_is_named_in_its_log_and_goes_on_when_nobody_reads_it(checkpoint: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    stderr = os.dup(2)
    os.dup2(write, 2)
    try:
        executor = start_extended(checkpoint, tmp_path)
    finally:
        os.dup2(stderr, 2)
    with executor:
        executor.collective_rpc("warn", [[]])
        executor.collective_rpc("warn", [["dogs"]])
        assert {*os.read(read, 4096).splitlines()} == {b"WARNING rank %d: beware of dogs" % rank for rank in (0, 1)}
        executor.collective_rpc("warn", [["." * 1000] * 200], timeout_s=10.0)
    for descriptor in (read, write, stderr):
        os.close(descriptor)


def test_a_failure_is_told_once_and_health_tells_it_again(executor: Executor) -> None:
    told: list[Exception] = []
    executor.on_failure(told.append)
    executor.check_health()
    os.kill(launcher_of(executor).pids()[1], signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(PeerDiedError, match="rank 1"):
            executor.check_health()
    assert len(told) == 1 and "rank 1" in str(told[0])


def test_an_extension_that_does_not_exist_is_named_before_serving(checkpoint: Path, warm: NewLauncher) -> None:
    with pytest.raises(UserError, match=r"worker_extension_cls.*no_such_module"):
        start(checkpoint, warm, worker_extension_cls="no_such_module:Probe")
