"""Real ranks in groups that span hosts: they join over the brain, and a fault among them is named.

Here all on one host, which a spanning group neither knows nor minds. On hosts of their own: test_ray_*.py.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from rig import Arrival, Rig

from phalanx.collectives.spec import GroupSpec
from phalanx.config import Config
from phalanx.errors import PeerDiedError, WorkerError
from phalanx.executor import start
from phalanx.executor.groups import describe_group
from phalanx.protocol.sampling import SamplingParams
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.topology.grid import Grid

pytestmark = pytest.mark.slow

_LIMITS = {"max_num_seqs": 4, "max_model_len": 64, "kv_cache_memory": 1 << 20}
_ARRIVALS = [
    Arrival(turn, tuple(range(1 + turn, 12 + 2 * turn)), SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True))
    for turn in range(4)
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> list[list[int]]:
    """The tokens of one process."""
    with Rig(checkpoint, **_LIMITS) as rig:
        return [outcome.tokens for outcome in rig.run(_ARRIVALS)]


@pytest.fixture
def spanning(monkeypatch: pytest.MonkeyPatch) -> None:
    def describe_all(config: Config, grid: Grid, *_: Any) -> list[GroupSpec]:
        groups = [describe_group(config, members, one_host=False) for members in grid.groups()]
        assert any(group.spans_hosts for group in groups)
        return groups

    monkeypatch.setattr(start, "_open_groups", describe_all)


def pids(rig: Rig) -> dict[int, int]:
    return rig.executor._launcher.pids()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("tp_size", "num_stages"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_tokens_equal_those_of_one_process(
    checkpoint: Path, alone: list[list[int]], spanning: None, tp_size: int, num_stages: int
) -> None:
    with Rig(checkpoint, **_LIMITS, tensor_parallel_size=tp_size, pipeline_parallel_size=num_stages) as rig:
        spread = [outcome.tokens for outcome in rig.run(_ARRIVALS)]
    assert spread == alone


def test_a_killed_rank_is_named_by_the_brain(checkpoint: Path, spanning: None) -> None:
    with Rig(checkpoint, **_LIMITS, tensor_parallel_size=2, pipeline_parallel_size=2) as rig:
        os.kill(pids(rig)[3], signal.SIGKILL)
        began_at = time.monotonic()
        with pytest.raises(PeerDiedError, match=r"rank 3 \(pid \d+\) died: killed by SIGKILL"):
            rig.run(_ARRIVALS)
        assert time.monotonic() - began_at < 3.0


def test_a_stopped_rank_is_named_with_group_and_collective(checkpoint: Path, spanning: None) -> None:
    with Rig(checkpoint, **_LIMITS, tensor_parallel_size=2, step_timeout_s=4.0) as rig:
        stopped = pids(rig)[1]
        os.kill(stopped, signal.SIGSTOP)
        began_at = time.monotonic()
        with pytest.raises(WorkerError) as caught:
            rig.run(_ARRIVALS)
        assert time.monotonic() - began_at < 4.0 + 2.0
        assert caught.value.rank == 0
        assert caught.value.kind == "DeadlineError"
        assert "of group tp@0, epoch 1" in str(caught.value)
        assert f"from rank 1 (pid {stopped} on 127.0.0.1)" in str(caught.value)
