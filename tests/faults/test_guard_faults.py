"""Ranks that diverge without a hang end the run before the step's tokens; `strict` names the call that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rig import Arrival, Rig

from phalanx.errors import DivergedError, WorkerError
from phalanx.protocol.client import Submit
from phalanx.protocol.columns import ints
from phalanx.protocol.sampling import SamplingParams
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.worker.methods import remote_method

pytestmark = pytest.mark.slow

TRAFFIC = [Arrival(0, (1, 2, 3, 4), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))]
LIMITS = {"max_model_len": 64, "kv_cache_memory": 1 << 20, "max_num_seqs": 4, "step_timeout_s": 20.0}


class Saboteur:
    """A worker extension: has its rank do something else than its peers, which they come out of all the same."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    @remote_method
    def meet(self) -> None:
        """A collective of a method's own, which has no step."""
        for _ in range(self._worker.spec.rank + 1):
            self._group.all_reduce  # nobody needs to issue it
        self._group.barrier()

    @remote_method
    def meet_late(self) -> None:
        """From now on ranks meet once more: rank 0 in each step, the others after it."""
        runner, accept, group = self._worker._runner, self._worker.accept, self._group
        launch = runner.launch
        if self._worker.spec.rank == 0:

            def launch_and_meet(step: Any) -> Any:
                flight = launch(step)
                group.barrier()
                return flight

            runner.launch = launch_and_meet
        else:

            def accept_and_meet(call: Any) -> None:
                accept(call)
                if type(call.body).__name__ == "Step":
                    group.barrier()

            self._worker.accept = accept_and_meet

    @remote_method
    def skip_one(self, rank: int) -> None:
        group = self._group
        all_reduce = group.all_reduce

        def skip(x: Any) -> Any:
            group.all_reduce = all_reduce
            return x

        if self._worker.spec.rank == rank:
            group.all_reduce = skip

    @property
    def _group(self) -> Any:
        return next(group for name, group in self._worker.groups.items() if name.startswith("tp"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


def test_a_divergence_without_a_hang(checkpoint: Path) -> None:
    settings: dict[str, Any] = {**LIMITS, "ledger": True, "worker_extension_cls": f"{__name__}:Saboteur"}
    with Rig(checkpoint, tensor_parallel_size=2, **settings) as rig:
        watching = rig.executor._watching
        assert watching is not None
        watching.silence()  # it may be the first to say so, and ends the ranks then
        watching._thread.join(5.0)
        rig.run(TRAFFIC)
        rig.executor.collective_rpc("meet")
        rig.run(TRAFFIC)
        rig.executor.collective_rpc("meet_late")
        rig.brain.submit(Submit(99, ints([1, 2, 3, 4]), TRAFFIC[0].sampling))
        with pytest.raises(DivergedError) as caught:
            while True:
                batch = rig.brain.step()
                assert batch is None or not batch.tokens
        # Of two there is no majority; but in no step before has anybody met there.
        assert caught.value.ranks == (0,) and caught.value.group == "tp@0"
        assert "rank 0 issued barrier where rank 1 issued nothing more" in str(caught.value)


def test_off_lets_it_pass(checkpoint: Path) -> None:
    settings: dict[str, Any] = {
        **LIMITS,
        "collective_guard": "off",
        "ledger": False,
        "worker_extension_cls": f"{__name__}:Saboteur",
    }
    with Rig(checkpoint, tensor_parallel_size=2, **settings) as rig:
        rig.executor.collective_rpc("meet_late")
        (outcome,) = rig.run(TRAFFIC)
        assert len(outcome.tokens) == 12


def test_strict_names_the_call(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {**LIMITS, "collective_guard": "strict", "worker_extension_cls": f"{__name__}:Saboteur"}
    with Rig(checkpoint, tensor_parallel_size=2, ledger=True, **settings) as rig:
        rig.run(TRAFFIC)
        rig.executor.collective_rpc("skip_one", (1,))
        with pytest.raises(WorkerError) as caught:
            rig.run(TRAFFIC)
        assert caught.value.kind == "CollectiveMismatchError"
        assert "rank 0 is in all_reduce" in caught.value.message and "; rank 1 is in " in caught.value.message
        assert "in agree" in caught.value.traceback and "in launch" in caught.value.traceback
        assert "verdict: " in caplog.text, "the ledger says it, too, before the engine may end"
