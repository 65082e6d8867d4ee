"""The fork server and its workers, as the launcher sees them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phalanx.config import Config
from phalanx.errors import PeerDiedError, StartError, UserError, WorkerError
from phalanx.executor.executor import Executor
from phalanx.executor.local import LocalLauncher
from phalanx.executor.start import start_executor
from phalanx.models.checkpoint import resolve
from phalanx.protocol import FIRST_EPOCH, Done, NewRequest, Ping, SamplingParams, StepPlan, StepShape, ints
from phalanx.testing.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


def start(checkpoint: Path, **settings: object) -> Executor:
    config = Config.build(
        model=str(checkpoint),
        tensor_parallel_size=2,
        max_num_seqs=4,
        max_model_len=64,
        kv_cache_memory=1 << 20,
        **settings,
    )
    executor, _ = start_executor(config, resolve(str(checkpoint)), lambda *_: None)
    return executor


@pytest.fixture
def executor(checkpoint: Path) -> Iterator[Executor]:
    with start(checkpoint) as executor:
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


def test_the_fork_server_has_one_thread(executor: Executor) -> None:
    """A fork copies the calling thread alone: a lock that another one held would never be released in the child."""
    (server,) = {parent_of(pid) for pid in launcher_of(executor).pids().values()}
    assert num_threads(server) == 1


def test_a_killed_rank_is_noticed_and_named(executor: Executor) -> None:
    os.kill(launcher_of(executor).pids()[1], signal.SIGKILL)
    killed_at = time.monotonic()
    with pytest.raises(PeerDiedError, match=r"rank 1 .* killed by SIGKILL"):
        executor.submit(Ping(), deadline_s=30).result()
    assert time.monotonic() - killed_at < 1.0


def test_a_stopped_rank_is_named_by_those_that_wait_for_it(checkpoint: Path) -> None:
    """The brain itself awaits nothing but the output rank's answer."""
    request = NewRequest(0, ints([1]), 1, 0, ints([0]), SamplingParams(temperature=0.0), 0, ())
    plan = StepPlan(FIRST_EPOCH, 1, StepShape(1, 1, 1), ints([0]), ints([1]), new=(request,))
    with start(checkpoint, step_timeout_s=4.0) as executor:
        os.kill(launcher_of(executor).pids()[1], signal.SIGSTOP)
        with pytest.raises(
            WorkerError, match=r"rank 0 on .*: DeadlineError: waited 3.* s for all_reduce .* from rank 1"
        ):
            executor.step(plan).result()


def test_a_plan_of_another_epoch_is_dropped(executor: Executor) -> None:
    stale = StepPlan(epoch=99, step=1, shape=StepShape(1, 1, 1), slots=ints([3]), num_tokens=ints([1]))
    executor.submit(stale, ranks=(), deadline_s=5)
    assert executor.submit(Ping(), deadline_s=5).result() == [Done(), Done()]


def test_a_users_mistake_that_only_a_rank_sees(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, num_attention_heads=1, num_key_value_heads=1)
    with pytest.raises(UserError, match="tensor_parallel_size"):
        start(checkpoint)


def test_a_start_that_takes_too_long_says_who_is_awaited(checkpoint: Path) -> None:
    with pytest.raises(Exception, match="rank 0, rank 1") as caught:
        start(checkpoint, start_timeout_s=0.05)
    assert isinstance(caught.value, (TimeoutError, StartError))
