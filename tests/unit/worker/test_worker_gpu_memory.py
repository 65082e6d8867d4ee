"""What a worker does where a GPU's memory cannot be shared."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import pytest
import torch

from phalanx.config import Config
from phalanx.errors import ConfigError, DriverError
from phalanx.protocol.worker import FIRST_EPOCH
from phalanx.worker import rank_memory
from phalanx.worker.spec import WorkerSpec

GPU = torch.device("cuda", 1)


class Driver:
    """Of a GPU that can share memory, or cannot; `device` 7 has none."""

    can_share = False

    def __init__(self, device: int) -> None:
        if device == 7:
            raise DriverError("cuInit", "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected")


class Sharing(Driver):
    can_share = True


def spec_of(**settings: Any) -> WorkerSpec:
    return WorkerSpec(
        rank=0,
        local_rank=0,
        ranks_on_host=2,
        device="cuda",
        config=Config.build(model="m", device="cuda", **settings),
        checkpoint="m",
        epoch=FIRST_EPOCH,
        groups=(),
        queue=None,
        keeps_memory=True,
    )


def test_memory_is_shared_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_memory, "CudaDriver", Sharing)
    assert isinstance(rank_memory._driver(spec_of(standby=1), GPU), Sharing)


@pytest.mark.parametrize(
    ("device", "why_not"), [(1, "this GPU's driver has no memory with descriptors"), (7, "CUDA_ERROR_NO_DEVICE")]
)
def test_where_it_cannot_be_one_rank_says_what_follows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, device: int, why_not: str
) -> None:
    monkeypatch.setattr(rank_memory, "CudaDriver", Driver)
    gpu = torch.device("cuda", device)
    with caplog.at_level(logging.WARNING):
        for local_rank in (0, 1):
            spec = msgspec.structs.replace(spec_of(), local_rank=local_rank)
            assert rank_memory._driver(spec, gpu) is None
            arena = rank_memory.new_arena(spec, gpu)
            assert not arena.can_be_held
    first, second = caplog.messages  # one for each of the two calls of the first rank
    assert first == second and first.startswith("after a fault, weights are read again") and why_not in first
    with pytest.raises(ConfigError, match=r"standby: 1 is not possible: 0 here: .*, which two lines could share"):
        rank_memory._driver(spec_of(standby=1), gpu)


def test_nobody_is_told_of_what_would_not_outlive_the_process_anyway(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rank_memory, "CudaDriver", Driver)
    spec = msgspec.structs.replace(spec_of(standby=1), keeps_memory=False)
    assert rank_memory._driver(spec, GPU) is None and not caplog.messages
    monkeypatch.setattr(rank_memory, "CudaDriver", Sharing)
    assert rank_memory._driver(spec, GPU) is not None, "it can be given back"


def test_experts_that_move_have_no_standby_line_on_gpus() -> None:
    with pytest.raises(ConfigError, match="standby: 1 is not possible: 0 with enable_eplb on GPUs"):
        spec_of(standby=1, enable_expert_parallel=True, enable_eplb=True, data_parallel_size=2)
