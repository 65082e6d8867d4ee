"""On GPUs weights and KV cache outlive ranks too: those that come after a fault read and compute nothing again.

Skipped where there are no GPUs.
"""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from formation_rig import Rig, Streams, kill
from gpu_memory_used import used_bytes
from shared_memory_names import no_new_names

from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.faults import Fault, State

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("_no_names_are_left"),
]

FREED_WITHIN_S = 10.0


@pytest.fixture
def _no_names_are_left() -> Iterator[None]:
    """Of NCCL's memory, either, whose processes are killed."""
    with no_new_names():
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mixture"), "qwen3_moe")


def rig(checkpoint: Path, report: Path, **settings: Any) -> Rig:
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    num_gpus = math.prod(settings.get(size, 1) for size in sizes)
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs")
    return Rig(checkpoint, report, launcher="local", device="cuda", kv_cache_memory=1 << 22, **settings)


@pytest.fixture(params=[1, 2], ids=["tp1", "tp2"])
def ready(request: pytest.FixtureRequest, llama: Path, tmp_path: Path) -> Iterator[Rig]:
    """Ranks, and as many that stand ready."""
    before = used_bytes()
    made = rig(llama, tmp_path / "report", tensor_parallel_size=request.param, standby=1)
    try:
        made.await_standby()
        yield made
    finally:
        made.close()
    expires_at = time.monotonic() + FREED_WITHIN_S
    while used_bytes() > before + (64 << 20):
        assert time.monotonic() < expires_at, f"{used_bytes()} bytes are used, {before} were before"
        time.sleep(0.2)


def run_with_kill(made: Rig, rank: int, state: State, step: int) -> Streams:
    """All requests, while this rank is killed: before a collective, if it has any."""
    pids = made.pids()
    if len(pids) == 1:
        return made.run(kill(pids[rank], signal.SIGKILL))
    return made.run_with(Fault(kind="kill", rank=rank, state=state, step=step))


def test_killed_ranks_with_a_standby_line(ready: Rig) -> None:
    last = len(ready.pids()) - 1
    kills: tuple[tuple[int, State], ...] = ((0, "decode"), (last, "prefill"), (last, "decode"))
    for rank, state in kills:
        ready.await_standby()
        assert run_with_kill(ready, rank, state, step=3) == ready.expected
        print(f"pause with a standby line: {1e3 * ready.stats().last_pause_s:.0f} ms")
    assert ready.stats().healed == {"standby": 3}


def test_both_lines_are_killed(ready: Rig) -> None:
    """What is left is the memory."""
    assert ready.run(kill(ready.server_pid(), signal.SIGKILL)) == ready.expected
    print(f"pause with a new fork server and line: {1e3 * ready.stats().last_pause_s:.0f} ms")
    assert set(ready.stats().healed) == {"new line"}


@pytest.mark.parametrize(
    "grid",
    [
        {},
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"data_parallel_size": 2, "enable_expert_parallel": True, "all2all_backend": "alltoall"},
        {"data_parallel_size": 2, "enable_expert_parallel": True},
        {"data_parallel_size": 2, "enable_expert_parallel": True, "enable_eplb": True, "eplb_interval_steps": 5},
    ],
    ids=["tp1", "tp2", "pp2", "experts, alltoall", "experts", "experts that move"],
)
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_killed_ranks_without_a_standby_line(
    grid: dict[str, Any], graphs: bool, llama: Path, mixture: Path, tmp_path: Path
) -> None:
    made = rig(mixture if "data_parallel_size" in grid else llama, tmp_path / "report", cuda_graphs=graphs, **grid)
    try:
        kills: tuple[tuple[int, State], ...] = ((0, "decode"), (len(made.pids()) - 1, "prefill"))
        for rank, state in kills:
            assert run_with_kill(made, rank, state, step=2) == made.expected
            print(f"pause with a new line: {1e3 * made.stats().last_pause_s:.0f} ms")
        assert made.stats().healed == {"new line": 2}
        made.formation._recovery._memory.drop()  # type: ignore[union-attr]
        assert made.run(kill(made.pids()[0], signal.SIGKILL)) == made.expected, "computed again from the tokens"
        assert made.stats().healed == {"new line": 2, "checkpoint": 1}
    finally:
        made.close()


def test_memory_of_a_worker_that_is_killed_in_the_midst_of_kernels(tmp_path: Path) -> None:
    """Sixteen GiB, in three processes: one that fills it and computes on it, this one that holds it, one that has it
    next. This one has no CUDA.
    """
    script = Path(__file__).with_name("gpu_memory_tasks.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    print(done.stdout, done.stderr)
    assert done.returncode == 0 and "all right" in done.stdout
