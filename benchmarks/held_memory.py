"""What it takes to take over weights and KV cache from a worker that was killed, beside reading them.

    python benchmarks/held_memory.py --model PATH [--dtype bfloat16] [--rounds 5]

Each round, in turns: a worker that nobody holds the memory of, one whose memory is held, which is then killed, and one
that takes it over. Each is one rank, forked from a process that has torch and the model's code imported, as the fork
server forks them. Times are from the fork on: until it has its weights (`loaded`), its KV cache (`ready`), and its
first token (`token`), with the checkpoint in the page cache. `step` is the fastest of the decoding steps of one row.
Memory is what worker and holder take of the system together once the worker has stepped.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from contextlib import ExitStack
from multiprocessing import Pipe
from pathlib import Path
from typing import NamedTuple

import click
import msgspec
import torch

from phalanx.collectives.spec import GroupSpec
from phalanx.config import Config
from phalanx.memory.held import decode_held
from phalanx.memory.holder import Holder
from phalanx.models.checkpoint import resolve
from phalanx.models.model import import_definition
from phalanx.protocol.columns import ints
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
    StepShape,
)
from phalanx.worker.spec import WorkerSpec
from phalanx.worker.worker import Worker

BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN = 16, 64, 512
PROMPT, NUM_STEPS = 64, 40
_replies = msgspec.msgpack.Decoder(Reply)
_calls = msgspec.msgpack.Decoder(Call)


class Round(NamedTuple):
    """Seconds, and bytes."""

    loaded_s: float
    ready_s: float
    token_s: float
    step_s: float
    memory_bytes: int


class Rank:
    """A worker in a process of its own."""

    def __init__(self, spec: WorkerSpec, threads: int, stack: ExitStack) -> None:
        self.began_at = time.perf_counter()
        self._pipe, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _serve(spec, threads, theirs.recv_bytes, theirs.send_bytes)
            finally:
                os._exit(1)
        theirs.close()
        stack.callback(self._pipe.close)
        stack.callback(self.kill)
        self._pipe.recv_bytes()
        self.loaded_s = time.perf_counter() - self.began_at

    def call(self, body: CommandBody) -> ReplyBody:
        self._pipe.send_bytes(msgspec.msgpack.encode(Call(1, body, (0,))))
        return _replies.decode(self._pipe.recv_bytes()).body

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


def _serve(spec: WorkerSpec, threads: int, receive: object, send: object) -> None:
    torch.set_num_threads(threads)
    worker = Worker(spec, lambda progress: None)
    assert callable(receive) and callable(send)
    send(msgspec.msgpack.encode(Reply(0, worker.load())))
    while True:
        worker.accept(_calls.decode(receive()))
        send(msgspec.msgpack.encode(worker.next_reply(block=True)))


def run(spec: WorkerSpec, threads: int, holder: Holder) -> Round:
    """One worker from its birth to SIGKILL."""
    with ExitStack() as stack:
        rank = Rank(spec, threads, stack)
        allocated = rank.call(AllocateCache(NUM_BLOCKS, MAX_MODEL_LEN))
        assert isinstance(allocated, Allocated)
        ready_s = time.perf_counter() - rank.began_at
        if allocated.held:
            holder.hold(0, decode_held(allocated.held))
        rank.call(_step(0))
        token_s = time.perf_counter() - rank.began_at
        steps_s = []
        for i in range(1, NUM_STEPS):
            began_at = time.perf_counter()
            rank.call(_step(i))
            steps_s.append(time.perf_counter() - began_at)
        return Round(rank.loaded_s, ready_s, token_s, min(steps_s), _memory_bytes(rank.pid))


def _step(number: int) -> Step:
    num_tokens = 1 if number else PROMPT
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    new = NewRequest(0, ints(range(PROMPT)), PROMPT, 0, ints(range(MAX_MODEL_LEN // BLOCK_SIZE)), sampling, 0, ())
    shape = StepShape(num_tokens, 1, 1)
    plan = StepPlan(FIRST_EPOCH, number, shape, ints([0]), ints([num_tokens]), new=() if number else (new,))
    return Step((plan,))


def _memory_bytes(pid: int) -> int:
    """What the process has for itself, and shared memory of ours whoever has it."""
    total = 0
    counted: tuple[str, ...] = ()
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # a mapping begins
            counted = ("Rss:",) if "/memfd:phalanx:" in line else ("Private_Clean:", "Private_Dirty:")
        elif words[0] in counted:
            total += int(words[1]) * 1024
    return total


@click.command()
@click.option("--model", required=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--pack/--no-pack", default=True, show_default=True)
def main(model: str, dtype: str, threads: int, rounds: int, pack: bool) -> None:
    """Load, and take over."""
    torch.set_num_threads(1)  # this process forks
    checkpoint = resolve(model)
    import_definition(str(checkpoint.path))
    plain = WorkerSpec(
        rank=0,
        local_rank=0,
        ranks_on_host=1,
        device="cpu",
        config=Config.build(model=model, device="cpu", dtype=dtype, pack_weights=pack, collective_guard="off"),
        checkpoint=str(checkpoint.path),
        epoch=FIRST_EPOCH,
        groups=(GroupSpec("tp@0", "single", (0,), FIRST_EPOCH, 1.0, 1.0),),
        queue=None,
    )
    keeping = msgspec.structs.replace(plain, keeps_memory=True)
    found: dict[str, list[Round]] = {"not held": [], "held": [], "taken over": []}
    with Holder() as holder:
        for _ in range(rounds):
            found["not held"].append(run(plain, threads, holder))
            holder.drop(0)
            found["held"].append(run(keeping, threads, holder))
            taken = msgspec.structs.replace(keeping, held=holder.memory(0))
            found["taken over"].append(run(taken, threads, holder))
    click.echo(
        f"{'':12}" + "".join(f"{column:>12}" for column in ("loaded ms", "ready ms", "token ms", "step ms", "MiB"))
    )
    for name, rounds_of in found.items():
        medians = [statistics.median(column) for column in zip(*rounds_of, strict=True)]
        seconds = "".join(f"{1000 * median:12.1f}" for median in medians[:4])
        click.echo(f"{name:12}{seconds}{medians[4] / (1 << 20):12.0f}")


if __name__ == "__main__":
    main()
