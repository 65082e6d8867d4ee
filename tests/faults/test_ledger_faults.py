"""Whatever one rank does to its peers, the ledger says within two seconds that it was this one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from rig import Arrival, Rig

from phalanx.config import Config
from phalanx.errors import PeerDiedError, UserError
from phalanx.ledger.board import read_board
from phalanx.ledger.patience import STEPS_OF_PATIENCE
from phalanx.protocol.sampling import SamplingParams
from phalanx.testing import chaos
from phalanx.testing.chaos import Outcome, settings_for_chaos, try_fault
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.faults import Fault, FaultPlan, Kind, State, World
from phalanx.testing.running_chaos import find_instance, try_faults
from phalanx.testing.warm_launcher import WarmStart
from phalanx.transport.shared_memory import SharedSegment

pytestmark = pytest.mark.slow

TRAFFIC = [Arrival(0, (1, 2, 3, 4), SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))]
TOLD_WITHIN_S = 2.5
"""On a machine that others use as well."""

NEW_WATCHER_WITHIN_S = 20.0
"""A process has to be started, on a machine that others use as well."""

HOPELESS: tuple[Kind, ...] = ("skip", "extra", "swap", "shape", "dtype")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mixture"), "qwen3_moe")


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmStart]:
    with WarmStart() as started:
        yield started


def outcome_of(warm: WarmStart, checkpoint: Path, fault: Fault, **settings: Any) -> Outcome:
    config = Config.build(model=str(checkpoint), **settings_for_chaos(**settings))
    outcome = try_fault(config, fault, warm)
    assert outcome.injected is not None, outcome
    return outcome


def check(outcome: Outcome) -> None:
    """Nothing that was said is wrong, and it was said in time."""
    assert outcome.rightness.is_right, outcome
    assert outcome.told_after_s is not None and outcome.told_after_s < TOLD_WITHIN_S, outcome


@pytest.mark.parametrize("culprit", [0, 2])
@pytest.mark.parametrize("kind", ["kill", "stop", "loop", "error"])
def test_a_rank_that_does_not_come(checkpoint: Path, warm: WarmStart, kind: Kind, culprit: int) -> None:
    outcome = outcome_of(warm, checkpoint, Fault(kind=kind, rank=culprit, collective=2), tensor_parallel_size=3)
    check(outcome)
    assert f"rank {culprit} on " in str(outcome.verdict or outcome.error)
    if kind == "loop":
        assert outcome.verdict is not None and outcome.verdict.stacks[culprit][0].endswith("in loop")


@pytest.mark.parametrize("index", range(12))
def test_ranks_that_diverge_in_groups_of_two_and_of_three(checkpoint: Path, warm: WarmStart, index: int) -> None:
    size = 2 + index % 2
    plan = FaultPlan.of_seed(index, 1, World(size), kinds=HOPELESS)
    outcome = outcome_of(warm, checkpoint, plan.faults[0], tensor_parallel_size=size)
    check(outcome)
    assert f"rank {plan.faults[0].rank} " in outcome.error, outcome


@pytest.mark.parametrize(("kind", "state"), [("kill", "idle"), ("stop", "idle"), ("wedge", "prefill")])
def test_a_link_of_a_pipeline(checkpoint: Path, warm: WarmStart, kind: Kind, state: State) -> None:
    fault = Fault(kind=kind, rank=1, state=state)
    check(outcome_of(warm, checkpoint, fault, pipeline_parallel_size=2))


def test_a_rank_that_leaves_a_layer_of_experts_early(mixture: Path, warm: WarmStart) -> None:
    fault = Fault(kind="early-return", rank=1, collective=0)
    outcome = outcome_of(warm, mixture, fault, data_parallel_size=2, enable_expert_parallel=True)
    check(outcome)


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_uses_two_groups_in_the_other_order(mixture: Path, warm: WarmStart, culprit: int) -> None:
    settings = {"data_parallel_size": 2, "tensor_parallel_size": 2, "enable_expert_parallel": True}
    fault = Fault(kind="reorder", rank=culprit, collective=1)
    outcome = outcome_of(warm, mixture, fault, all2all_backend="alltoall", **settings)
    assert outcome.rightness.is_right, outcome
    assert outcome.told_after_s is not None and outcome.step_s is not None
    assert outcome.told_after_s < TOLD_WITHIN_S + STEPS_OF_PATIENCE * outcome.step_s, outcome


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_link_that_is_dropped(checkpoint: Path, warm: WarmStart, culprit: int) -> None:
    fault = Fault(kind="link", rank=culprit, collective=1)
    check(outcome_of(warm, checkpoint, fault, tensor_parallel_size=2, collective_backend="gloo"))


def test_a_source_that_runs_ahead_of_a_peer_that_leaves_it_out(checkpoint: Path, warm: WarmStart) -> None:
    """Nobody waits then: both have left the step."""
    fault = Fault(kind="skip", rank=1, collective=0)
    outcome = outcome_of(warm, checkpoint, fault, pipeline_parallel_size=2)
    check(outcome)
    assert outcome.verdict is not None and outcome.verdict.cause == "diverged"


def test_a_rank_that_nobody_needs_and_that_begins_no_step(checkpoint: Path, warm: WarmStart) -> None:
    """The last stage, to which the first one has sent all that there is."""
    outcome = outcome_of(warm, checkpoint, Fault(kind="loop", rank=1, state="idle"), pipeline_parallel_size=2)
    check(outcome)
    assert outcome.verdict is not None and outcome.verdict.cause == "behind"


def test_a_rank_that_dies_at_its_start(checkpoint: Path, warm: WarmStart) -> None:
    fault = Fault(kind="kill", rank=1, state="start")
    outcome = try_fault(Config.build(model=str(checkpoint), **settings_for_chaos(tensor_parallel_size=2)), fault, warm)
    assert outcome.injected is None or outcome.rightness.is_right, outcome


def test_a_rank_that_is_stopped_before_it_has_begun_its_journal(
    checkpoint: Path, warm: WarmStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos, "START_SPREAD_S", 0.0)
    fault = Fault(kind="stop", rank=1, state="start", seconds=60.0)
    outcome = outcome_of(warm, checkpoint, fault, tensor_parallel_size=2, start_timeout_s=3.0)
    assert outcome.rightness.is_right, outcome


def test_a_store_that_hangs_while_ranks_meet(checkpoint: Path, warm: WarmStart) -> None:
    fault = Fault(kind="store", rank=0, state="start")
    outcome = outcome_of(
        warm, checkpoint, fault, tensor_parallel_size=2, collective_backend="gloo", start_timeout_s=5.0
    )
    assert outcome.rightness.is_right, outcome


def test_an_instance_that_runs(checkpoint: Path) -> None:
    """It is under load, is hurt twice for a while, and serves on."""
    settings = settings_for_chaos(tensor_parallel_size=2, step_timeout_s=30.0)
    faults = (
        Fault(kind="stop", rank=1, seconds=1.5),
        Fault(kind="slow", rank=0, collective=3, seconds=3.0),
        Fault(kind="kill", rank=1),
    )
    with Rig(checkpoint, **settings) as rig:
        rig.run(TRAFFIC)
        found: list[Outcome] = []
        chaos = Thread(target=lambda: found.extend(try_faults(find_instance(os.getpid()), faults, patience_s=10.0)))
        chaos.start()
        with pytest.raises(PeerDiedError, match=r"rank 1 .*SIGKILL"):
            while True:
                rig.run(TRAFFIC)
        chaos.join()
    said = [(one.verdict.cause, one.verdict.culprits) for one in found if one.verdict is not None]
    assert said == [("stopped", (1,)), ("late", (0,)), ("gone", (1,))]
    assert all(one.rightness.is_right for one in found), found


def test_a_watcher_that_dies_is_replaced(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    limits = {"max_model_len": 128, "kv_cache_memory": 1 << 20, "max_num_seqs": 4, "ledger": True}
    with Rig(checkpoint, tensor_parallel_size=2, **limits) as rig:
        watching = rig.executor._watching
        assert watching is not None and watching.order is not None and watching.order.outlets is not None
        watching._process.kill()
        ends_at = time.monotonic() + NEW_WATCHER_WITHIN_S
        with SharedSegment.attach(watching.order.outlets.board) as board:
            while (notice := read_board(board.buf)) is None or not notice.num_restarts:
                assert time.monotonic() < ends_at
                time.sleep(0.01)
        assert "the watcher has ended, killed by SIGKILL" in caplog.text
        rig.run(TRAFFIC)
        with pytest.raises(UserError, match="was not started with --allow-chaos"):  # and so it takes no faults
            list(try_faults(find_instance(os.getpid()), (Fault(kind="kill", rank=0),)))
        with pytest.raises(UserError, match="'arm_fault' is not declared"):
            rig.executor.collective_rpc("arm_fault", (Fault(kind="kill", rank=0), "/dev/null"))


def test_no_alarm(checkpoint: Path) -> None:
    settings = {"max_model_len": 128, "kv_cache_memory": 1 << 20, "max_num_seqs": 4, "ledger": True}
    with Rig(checkpoint, tensor_parallel_size=2, pipeline_parallel_size=2, **settings) as rig:
        rig.run(TRAFFIC)
        time.sleep(1.5)  # nobody asks for anything
        rig.run(TRAFFIC)
        assert rig.executor._watching is not None and rig.executor._watching.verdict is None
