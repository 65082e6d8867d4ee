"""Other numbers of ranks on GPUs, with graphs, while requests run. Skipped where there are too few."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from formation_rig import Rig, kill
from gpu_memory_used import used_bytes
from test_resize import run_through

from phalanx.membership.resize import Size
from phalanx.testing.checkpoints import write_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]


@pytest.mark.parametrize(
    ("family", "settings", "sizes"),
    [
        ("llama", {}, (Size(1, 2), Size(1, 1))),
        ("llama", {"standby": 1}, (Size(1, 2), Size(1, 1))),
        ("qwen3_moe", {"enable_expert_parallel": True}, (Size(2, 1), Size(1, 1))),
        ("qwen3_moe", {"enable_expert_parallel": True, "tensor_parallel_size": 2}, (Size(2, 2), Size(1, 2))),
    ],
    ids=["dense", "dense with a standby line", "mixture", "mixture on tp2"],
)
def test_up_and_down_and_a_fault_after_each(
    tmp_path: Path, family: str, settings: dict[str, Any], sizes: tuple[Size, ...]
) -> None:
    if torch.cuda.device_count() < max(size.data_parallel_size * size.tensor_parallel_size for size in sizes):
        pytest.skip("needs more GPUs")
    before = used_bytes()
    checkpoint = write_checkpoint(tmp_path / "model", family)
    made = Rig(checkpoint, tmp_path / "report", launcher="local", device="cuda", kv_cache_memory=1 << 26, **settings)
    try:
        at_first = used_bytes()
        for size in sizes:
            ended = run_through(made, size)
            assert ended.ending == "done" and made.formation.size == size, ended
            if settings.get("standby"):
                made.await_standby()
            assert made.run(kill(made.pids()[0], signal.SIGKILL)) == made.expected
        assert set(made.stats().healed) == {"standby" if settings.get("standby") else "new line"}
        assert used_bytes() < at_first + (1 << 30), "nothing of lines before is left"
    finally:
        made.close()
    assert used_bytes() < before + (1 << 30)
