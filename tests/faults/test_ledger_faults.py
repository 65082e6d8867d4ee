"""Whatever one rank does to its peers, the ledger says within two seconds that it was this one."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from rig import Arrival, Rig

from phalanx.errors import HungError, PhalanxError
from phalanx.ledger.verdict import Verdict
from phalanx.protocol import SamplingParams
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.worker.methods import remote_method

pytestmark = pytest.mark.slow

TRAFFIC = [Arrival(0, (1, 2, 3, 4), SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))]
TOLD_WITHIN_S = 2.5


class Saboteur:
    """A worker extension: does harm at the next all_reduce but `after` of its rank."""

    def __init__(self, worker: Any) -> None:
        self._rank = worker.spec.rank
        self._groups = worker.groups
        self._runner = worker

    @remote_method
    def pid(self) -> int:
        return os.getpid()

    @remote_method
    def sabotage(self, rank: int, fault: str, after: int) -> None:
        if rank != self._rank:
            return
        group = next(group for name, group in self._groups.items() if name.startswith("tp"))
        all_reduce, left = group.all_reduce, [after]

        def sabotaged(x: Any) -> Any:
            left[0] -= 1
            if left[0] >= 0:
                return all_reduce(x)
            group.all_reduce = all_reduce
            if fault == "loop":
                while True:
                    pass
            if fault == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "skip the rest":
                group.all_reduce = lambda x: x
                group.all_gather = lambda x, dim=-1: x.new_zeros(*x.shape[:-1], x.shape[-1] * group.size)
                group.broadcast = lambda x, src: x
                return x
            assert fault == "other shape"
            return all_reduce(x[..., :8].contiguous()) if x.shape[-1] > 8 else all_reduce(x)

        group.all_reduce = sabotaged


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


def sabotaged_run(checkpoint: Path, fault: str, culprit: int, size: int) -> tuple[Verdict | None, PhalanxError, float]:
    """The verdict, how the run ended, and when the verdict was there after the fault at the latest."""
    settings = {
        "max_model_len": 128,
        "kv_cache_memory": 1 << 20,
        "max_num_seqs": 4,
        "step_timeout_s": 6.0,
        "ledger": True,
    }
    extension = f"{__name__}:Saboteur"
    with Rig(checkpoint, tensor_parallel_size=size, worker_extension_cls=extension, **settings) as rig:
        rig.run(TRAFFIC)
        pids = rig.executor.collective_rpc("pid")
        rig.executor.collective_rpc("sabotage", (culprit, fault, 11))
        watching = rig.executor._watching
        assert watching is not None and watching.verdict is None
        began_at = time.monotonic()
        try:
            with pytest.raises(PhalanxError) as caught:
                rig.run(TRAFFIC)
        finally:
            if fault == "stop":
                os.kill(pids[culprit], signal.SIGCONT)
        verdict = watching.await_verdict(2.0)
        return verdict, caught.value, time.monotonic() - began_at


@pytest.mark.parametrize("culprit", [0, 2])
def test_a_rank_that_leaves_a_step_early(checkpoint: Path, culprit: int) -> None:
    verdict, error, took_s = sabotaged_run(checkpoint, "skip the rest", culprit, 3)
    assert verdict is not None and verdict.culprits == (culprit,), verdict
    assert isinstance(error, HungError) and str(error).startswith(f"rank {culprit} on ")
    assert took_s < TOLD_WITHIN_S


@pytest.mark.parametrize(
    ("fault", "cause", "culprit"),
    [("loop", "slow", 0), ("loop", "slow", 2), ("stop", "stopped", 0), ("kill", "gone", 0), ("kill", "gone", 2)],
)
def test_a_rank_that_does_not_come(
    checkpoint: Path, fault: str, cause: str, culprit: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "phalanx.ledger"):
        verdict, _, _ = sabotaged_run(checkpoint, fault, culprit, 3)
    assert verdict is not None and (verdict.cause, verdict.culprits) == (cause, (culprit,)), verdict
    assert f"verdict: rank {culprit} on " in caplog.text
    if fault == "loop":
        assert verdict.stacks[culprit][0].endswith("in sabotaged")


def test_another_shape(checkpoint: Path) -> None:
    verdict, error, took_s = sabotaged_run(checkpoint, "other shape", 1, 3)
    assert verdict is not None and (verdict.cause, verdict.culprits) == ("diverged", (1,)), verdict
    assert isinstance(error, HungError) and str(error).startswith("rank 1 on "), error
    assert took_s < TOLD_WITHIN_S


def test_a_watcher_that_dies_is_missed_and_no_more(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    limits = {"max_model_len": 128, "kv_cache_memory": 1 << 20, "max_num_seqs": 4, "ledger": True}
    with Rig(checkpoint, tensor_parallel_size=2, **limits) as rig:
        watching = rig.executor._watching
        assert watching is not None
        watching._process.kill()
        watching._thread.join(5.0)
        assert "the watcher has ended, killed by SIGKILL" in caplog.text
        rig.run(TRAFFIC)


def test_no_alarm(checkpoint: Path) -> None:
    settings = {"max_model_len": 128, "kv_cache_memory": 1 << 20, "max_num_seqs": 4, "ledger": True}
    with Rig(checkpoint, tensor_parallel_size=2, pipeline_parallel_size=2, **settings) as rig:
        rig.run(TRAFFIC)
        time.sleep(1.5)  # nobody asks for anything
        rig.run(TRAFFIC)
        assert rig.executor._watching is not None and rig.executor._watching.verdict is None
