"""On GPUs, with graphs: which rank it was, also where its Python has long issued what its GPU does not come to."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import Arrival, Rig

from phalanx.errors import HungError, PhalanxError
from phalanx.ledger.verdict import Verdict
from phalanx.protocol.sampling import SamplingParams
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.worker import runner
from phalanx.worker.methods import remote_method

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]

TRAFFIC = [Arrival(0, (1, 2, 3, 4), SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))]
STALL_CYCLES = 8 * 10**9  # some four seconds
SETTINGS: dict[str, Any] = {
    "device": "cuda",
    "tensor_parallel_size": 2,
    "max_model_len": 128,
    "kv_cache_memory": 1 << 22,
    "max_num_seqs": 4,
    "step_timeout_s": 20.0,
    "ledger": True,
    "worker_extension_cls": f"{__name__}:GpuSaboteur",
}


class GpuSaboteur:
    """A worker extension: does harm at the next decode step but `after` of its rank."""

    def __init__(self, worker: Any) -> None:
        self._rank = worker.spec.rank

    @remote_method
    def sabotage(self, rank: int, fault: str, after: int) -> None:
        if rank != self._rank:
            return
        size_for, left = runner.size_for, [after]

        def sabotaged(shapes: Any, sizes: Any) -> int | None:
            size = size_for(shapes, sizes)
            left[0] -= size is not None
            if left[0] >= 0:
                return size
            runner.size_for = size_for
            if fault == "stall":
                torch.cuda._sleep(STALL_CYCLES)
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "loop":
                threading.Event().wait(4.0)
            return None if fault == "eager" else size

        runner.size_for = sabotaged


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


def verdict_on(rig: Rig) -> Verdict | None:
    assert rig.executor._watching is not None
    return rig.executor._watching.verdict


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_waits_is_told_from_one_whose_gpu_does_not_come(checkpoint: Path, culprit: int) -> None:
    with Rig(checkpoint, **SETTINGS) as rig:
        expected = rig.run(TRAFFIC)
        assert verdict_on(rig) is None
        for fault in ("stall", "loop"):
            rig.executor.collective_rpc("sabotage", (culprit, fault, 7))
            assert rig.run(TRAFFIC)[0].tokens == expected[0].tokens
            verdict = verdict_on(rig)
            assert verdict is not None and (verdict.cause, verdict.culprits) == ("late", (culprit,)), verdict
            assert ("its GPU does not come to it" in verdict.what) == (fault == "stall"), verdict.what
            assert verdict.peers is not None and verdict.peers.startswith("a graph of ")


@pytest.mark.parametrize(("fault", "cause"), [("kill", "gone"), ("eager", "diverged")])
def test_a_rank_that_replays_nothing(checkpoint: Path, fault: str, cause: str) -> None:
    with Rig(checkpoint, **SETTINGS) as rig:
        rig.run(TRAFFIC)
        rig.executor.collective_rpc("sabotage", (1, fault, 7))
        with pytest.raises(PhalanxError) as caught:
            rig.run(TRAFFIC)
        watching = rig.executor._watching
        assert watching is not None
        verdict = watching.await_verdict(2.0)
    assert verdict is not None and verdict.cause == cause, verdict
    assert verdict.culprits == ((1,) if fault == "kill" else (0, 1)), "of two ranks with the same plan"
    assert isinstance(caught.value, HungError) == (fault == "eager")
