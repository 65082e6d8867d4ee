"""A rank's sleep where memory is a GPU's, on a driver that is none: it goes, and comes back to its place."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, bytes_at
from test_worker_held import MAX_MODEL_LEN, NUM_BLOCKS, NUM_TOKENS, PROMPT, Rank, spec_of

from phalanx.memory import gpu_pieces
from phalanx.memory.arena import Arena
from phalanx.memory.cuda_driver import CudaDriver
from phalanx.memory.held import HeldMemory, decode_held
from phalanx.memory.holder import Holder
from phalanx.models.checkpoint import resolve
from phalanx.protocol.columns import ints
from phalanx.protocol.worker import (
    FIRST_EPOCH,
    AllocateCache,
    Allocated,
    Call,
    CommandBody,
    Done,
    FallAsleep,
    ReadWeights,
    Reply,
    ReplyBody,
    Step,
    StepPlan,
    StepShape,
    TakeWeights,
    WakeUp,
    WeightsRead,
)
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.worker import worker
from phalanx.worker.spec import WorkerSpec
from phalanx.worker.worker import Worker

READ_WITHIN_S = 30.0


class Here(Rank):
    """In this process, with memory of such a GPU."""

    def __init__(self, spec: WorkerSpec, stack: ExitStack) -> None:
        self.worker = Worker(spec, lambda progress: None)
        stack.callback(self.worker.close)
        self.worker.load()

    def call(self, body: CommandBody) -> ReplyBody:
        self.worker.accept(Call(1, body, (0,)))
        reply = self.worker.next_reply(block=True)
        assert isinstance(reply, Reply)
        return reply.body

    def made(self) -> list[int]:
        """Of one request, which is then forgotten."""
        tokens = self.generate(PROMPT, NUM_TOKENS)
        nothing = StepPlan(FIRST_EPOCH, NUM_TOKENS, StepShape(0, 0, 0), ints([]), ints([]), dropped=ints([0]))
        self.call(Step((nothing,)))
        return tokens

    def sleep_or_wake(self, body: FallAsleep | WakeUp) -> HeldMemory:
        answer = self.call(body)
        assert isinstance(answer, Allocated) and answer.lack is None, answer
        return decode_held(answer.held)

    def read(self, checkpoint: Path, number: int) -> WeightsRead:
        """Until all is read, or nothing more is."""
        order = ReadWeights(number, str(checkpoint), resolve(str(checkpoint)).fingerprint, in_place=True)
        expires_at = time.monotonic() + READ_WITHIN_S
        while True:
            told = self.call(order)
            assert isinstance(told, WeightsRead) and time.monotonic() < expires_at
            if told.is_whole or told.error is not None or told.lack is not None:
                return told


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    found = FakeCuda()

    def new_arena(spec: WorkerSpec, _: torch.device) -> Arena:
        driver = CudaDriver(0, found)  # type: ignore[arg-type]
        return Arena("memory of rank 0", torch.device("cuda", 0), spec.held, driver=driver)

    monkeypatch.setattr(gpu_pieces, "bytes_at", bytes_at)
    monkeypatch.setattr(worker, "new_arena", new_arena)
    return found


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def rank_of(checkpoint: Path, stack: ExitStack, **settings: Any) -> tuple[Here, HeldMemory]:
    rank = Here(spec_of(checkpoint, stack, pack_weights=False, **settings), stack)
    answer = rank.call(AllocateCache(NUM_BLOCKS, MAX_MODEL_LEN))
    assert isinstance(answer, Allocated)
    return rank, decode_held(answer.held)


def test_memory_goes_and_tokens_stay_what_they_are(llama: Path, cuda: FakeCuda, stack: ExitStack) -> None:
    rank, told = rank_of(llama, stack)
    holder = stack.enter_context(Holder())
    holder.hold(0, told)
    tokens, awake = rank.made(), sum(cuda.mapped.values())
    weights = {name for name in told.regions if not name.startswith(("key.", "value."))}

    asleep = holder.hold(0, rank.sleep_or_wake(FallAsleep(1)))
    assert asleep.regions.keys() == weights and 0 < sum(cuda.mapped.values()) < awake
    told = holder.hold(0, rank.sleep_or_wake(WakeUp()))
    assert told.regions.keys() > weights and set(asleep.pieces) < set(told.pieces)
    assert rank.made() == tokens and sum(cuda.mapped.values()) == awake

    rank.sleep_or_wake(FallAsleep(1))
    asleep = holder.hold(0, rank.sleep_or_wake(FallAsleep(2)))
    assert not asleep.regions and not asleep.pieces and not cuda.mapped
    assert rank.read(llama, 1).is_whole and rank.call(TakeWeights()) == Done()
    assert len(holder.hold(0, rank.sleep_or_wake(WakeUp())).pieces) == len(told.pieces)
    assert rank.made() == tokens and sum(cuda.mapped.values()) == awake


def test_who_finds_no_memory_says_so_and_can_sleep_on(llama: Path, cuda: FakeCuda, stack: ExitStack) -> None:
    rank, _ = rank_of(llama, stack)
    tokens = rank.made()
    for level in (1, 2):
        rank.sleep_or_wake(FallAsleep(level))
        others = cuda.total_bytes - cuda.created_bytes
        cuda.total_bytes -= others
        if level == 2:
            told = rank.read(llama, 1)
            assert told.error is None and told.lack is not None and "CUDA_ERROR_OUT_OF_MEMORY" in told.lack
        answer = rank.call(WakeUp())
        assert isinstance(answer, Allocated) and answer.lack is not None
        assert "for the memory of rank 0: cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY" in answer.lack
        rank.sleep_or_wake(FallAsleep(level))
        cuda.total_bytes += others
        if level == 2:
            assert rank.read(llama, 2).is_whole and rank.call(TakeWeights()) == Done()
        rank.sleep_or_wake(WakeUp())
        assert rank.made() == tokens
