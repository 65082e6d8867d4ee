"""A worker takes over the memory of one that was killed, and goes on where that one was."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from phalanx.config import Config
from phalanx.executor.start import _open_groups, _specs
from phalanx.memory.held import HeldMemory, decode_held
from phalanx.memory.holder import Holder
from phalanx.models.checkpoint import resolve
from phalanx.models.packed import can_pack
from phalanx.protocol.columns import as_ints, ints
from phalanx.protocol.sampling import SamplingParams
from phalanx.protocol.worker import (
    FIRST_EPOCH,
    AllocateCache,
    Allocated,
    Call,
    CommandBody,
    NewRequest,
    Reply,
    ReplyBody,
    Step,
    StepPlan,
    StepResult,
    StepShape,
)
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.topology.grid import Grid
from phalanx.worker.spec import WorkerSpec
from phalanx.worker.worker import Worker

NUM_BLOCKS, BLOCK_SIZE, MAX_MODEL_LEN = 8, 16, 64
PROMPT = [(7 * i * i + 3) % 256 for i in range(21)]
NUM_TOKENS = 8
_replies = msgspec.msgpack.Decoder(Reply)
_calls = msgspec.msgpack.Decoder(Call)


def spec_of(checkpoint: Path, stack: ExitStack, held: HeldMemory | None = None, **settings: Any) -> WorkerSpec:
    settings = {"dtype": "float32", "block_size": BLOCK_SIZE, "max_num_seqs": 2, "collective_guard": "off", **settings}
    config = Config.build(model=str(checkpoint), device="cpu", **settings)
    groups = _open_groups(config, Grid.of(config.parallel), stack)
    (spec,) = _specs(config, resolve(str(checkpoint)), groups, [None])
    return msgspec.structs.replace(spec, held=held, keeps_memory=True)


class Rank:
    """A worker in a process of its own."""

    def __init__(self, spec: WorkerSpec, stack: ExitStack) -> None:
        self._pipe, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                worker = Worker(spec, lambda progress: None)
                worker.load()
                while True:
                    worker.accept(_calls.decode(theirs.recv_bytes()))
                    theirs.send_bytes(msgspec.msgpack.encode(worker.next_reply(block=True)))
            finally:
                os._exit(1)
        theirs.close()
        stack.callback(self._pipe.close)
        stack.callback(self.kill)

    def call(self, body: CommandBody) -> ReplyBody:
        self._pipe.send_bytes(msgspec.msgpack.encode(Call(1, body, (0,))))
        assert self._pipe.poll(60), "no answer"
        return _replies.decode(self._pipe.recv_bytes()).body

    def allocate(self) -> HeldMemory:
        answer = self.call(AllocateCache(NUM_BLOCKS, MAX_MODEL_LEN))
        assert isinstance(answer, Allocated)
        return decode_held(answer.held)

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def generate(self, known: list[int], count: int, *, num_computed: int = 0) -> list[int]:
        """`known` and so many tokens more, greedily, in blocks that come from the cache's end."""
        blocks = ints(range(NUM_BLOCKS - 1, NUM_BLOCKS - 1 - MAX_MODEL_LEN // BLOCK_SIZE, -1))
        sampling = SamplingParams(temperature=0.0, ignore_eos=True)
        new = NewRequest(0, ints(known), len(PROMPT), num_computed, blocks, sampling, 0, ())
        for i in range(count):
            num_tokens = 1 if i else len(known) - num_computed
            plan = StepPlan(
                FIRST_EPOCH,
                i,
                StepShape(num_tokens, 1, 1),
                ints([0]),
                ints([num_tokens]),
                new=() if i else (new,),
            )
            result = self.call(Step((plan,)))
            assert isinstance(result, StepResult)
            known = [*known, *as_ints(result.tokens).tolist()]
        return known


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def spoil_weights(checkpoint: Path) -> None:
    """Leave the files' headers as they are, and zeros for weights."""
    for file in checkpoint.glob("*.safetensors"):
        content = file.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        file.write_bytes(content[:begin] + bytes(len(content) - begin))


needs_packing = pytest.mark.skipif(not can_pack(torch.float32, torch.device("cpu")), reason="torch without oneDNN")


@pytest.mark.parametrize("pack", [pytest.param(True, marks=needs_packing), False])
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("mixtral", False)])
def test_the_next_worker_goes_on_where_the_one_before_was_killed(
    tmp_path: Path, stack: ExitStack, family: str, tied: bool, pack: bool
) -> None:
    path = write_checkpoint(tmp_path, family, tie_word_embeddings=tied)
    holder = stack.enter_context(Holder())
    first = Rank(spec_of(path, stack, pack_weights=pack), stack)
    holder.hold(0, first.allocate())
    expected = first.generate(PROMPT, NUM_TOKENS)
    assert len(set(expected[len(PROMPT) :])) > 3, "tokens that tell something"
    first.kill()
    spoil_weights(path)
    for length in (len(PROMPT) + 1, len(PROMPT) + 5):  # the third one takes over what the second one had taken over
        rank = Rank(spec_of(path, stack, holder.memory(0), pack_weights=pack), stack)
        assert holder.hold(0, rank.allocate()) == holder.memory(0)
        found = rank.generate(expected[:length], len(expected) - length, num_computed=length - 1)
        assert found == expected
        rank.kill()


def test_keys_and_values_are_the_ones_that_were_there(tmp_path: Path, stack: ExitStack) -> None:
    """Without them the tokens are others, so that the test above tells something."""
    path = write_checkpoint(tmp_path)
    first = Rank(spec_of(path, stack), stack)
    first.allocate()
    expected = first.generate(PROMPT, NUM_TOKENS)
    length = len(PROMPT) + 1
    second = Rank(spec_of(path, stack), stack)
    second.allocate()
    assert second.generate(expected[:length], len(expected) - length, num_computed=length - 1) != expected


def told(spec: WorkerSpec) -> Allocated:
    """What a worker in this process answers when it is ready."""
    worker = Worker(spec, lambda progress: None)
    try:
        worker.load()
        worker.accept(Call(1, AllocateCache(NUM_BLOCKS, MAX_MODEL_LEN), (0,)))
        reply = worker.next_reply(block=False)
        assert isinstance(reply, Reply) and isinstance(reply.body, Allocated)
        return reply.body
    finally:
        worker.close()


def test_nothing_is_told_unless_somebody_keeps_it(tmp_path: Path, stack: ExitStack) -> None:
    spec = spec_of(write_checkpoint(tmp_path), stack)
    assert told(msgspec.structs.replace(spec, keeps_memory=False)) == Allocated()


@pytest.mark.parametrize("moves", [True, False])
def test_of_experts_that_move_only_the_cache_is_held(tmp_path: Path, stack: ExitStack, moves: bool) -> None:
    path = write_checkpoint(tmp_path, "mixtral")
    held = decode_held(told(spec_of(path, stack, enable_expert_parallel=True, enable_eplb=moves)).held)
    is_cache = [name.startswith(("key.", "value.")) for name in held.regions]
    assert any(is_cache) and all(is_cache) == moves
    assert len(held.segments) == (1 if moves else 2), "the cache is apart from the weights"


def test_with_experts_that_move_the_next_worker_reads_its_weights(tmp_path: Path, stack: ExitStack) -> None:
    """And goes on with the cache of the one before."""
    path = write_checkpoint(tmp_path, "mixtral")
    holder, eplb = stack.enter_context(Holder()), {"enable_expert_parallel": True, "enable_eplb": True}
    first = Rank(spec_of(path, stack, **eplb), stack)
    holder.hold(0, first.allocate())
    expected = first.generate(PROMPT, NUM_TOKENS)
    first.kill()
    for length in (len(PROMPT) + 1, len(PROMPT) + 5):
        rank = Rank(spec_of(path, stack, holder.memory(0), **eplb), stack)
        assert holder.hold(0, rank.allocate()) == holder.memory(0)
        assert rank.generate(expected[:length], len(expected) - length, num_computed=length - 1) == expected
        rank.kill()
