"""What lockstep costs: two replicas that share out their experts against two engines that know nothing of each other.

Used by `lockstep.py --compare`. Both hold the same model, a small random mixture of experts, and get the same requests,
half of them each. The engines are two processes of one rank, each with all experts; the replicas have tensor parallel
ranks of their own, and share out the experts over all ranks. They take turns; who waits for its turn sleeps.

Of each call of a dispatcher, *waiting* is the time until the last of all ranks has come to it: all ranks of a host read
the same clock. What remains is the call's own: copying, adding up, and being woken.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from phalanx.config import Config
from phalanx.engine.brain import Brain
from phalanx.executor.start import start_executor
from phalanx.models.checkpoint import resolve
from phalanx.protocol.client import Submit
from phalanx.protocol.columns import ints
from phalanx.protocol.sampling import SamplingParams
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.worker.methods import remote_method

if TYPE_CHECKING:
    from phalanx.worker.worker import Worker

Spans = list[tuple[float, float]]
"""When calls began and ended, in seconds of the host's monotonic clock."""
Prompts = Sequence[Sequence[int]]

MODEL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
}
NUM_ENGINES = 2
DEADLINE_S = 300.0


class DispatchClock:
    """A worker extension: when each dispatch began and ended, and each combine, in turn."""

    def __init__(self, worker: Worker) -> None:
        self._spans: Spans = []
        dispatcher: Any = worker.model._dispatcher
        for name in ("dispatch", "combine"):
            setattr(dispatcher, name, self._timed(getattr(dispatcher, name)))

    @remote_method
    def take_spans(self) -> Spans:
        """Those since the last call."""
        spans, self._spans = self._spans, []
        return spans

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            began_at = time.monotonic()
            result = call(*arguments)
            self._spans.append((began_at, time.monotonic()))
            return result

        return run


class Shares(NamedTuple):
    """Of the time, the mean over the ranks."""

    dispatch: float
    combine: float
    waiting: float


class Run(NamedTuple):
    """One round of both."""

    lockstep_s: float
    apart_s: float
    shares: Shares


class Load(NamedTuple):
    """So many requests for all engines or replicas together."""

    streams: int
    input_len: int
    output_len: int

    def prompts(self, dice: random.Random) -> list[list[int]]:
        return [[dice.randrange(256) for _ in range(self.input_len)] for _ in range(self.streams)]


def make_config(model: Path, load: Load, **more: Any) -> Config:
    return Config.build(
        model=str(model),
        dtype="float32",
        device="cpu",
        max_model_len=load.input_len + load.output_len,
        max_num_seqs=load.streams,
        kv_cache_memory=16 << 20,
        enable_prefix_caching=False,
        **more,
    )


def serve(brain: Brain, prompts: Prompts, output_len: int) -> None:
    """Blocks until every prompt has its output."""
    sampling = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    for request_id, prompt in enumerate(prompts):
        brain.submit(Submit(request_id, ints(prompt), sampling))
    while brain.has_work():
        brain.step()


class Lockstep:
    """Two replicas over all ranks."""

    def __init__(self, model: Path, load: Load, num_ranks: int, backend: str, stack: ExitStack) -> None:
        config = make_config(
            model,
            load,
            data_parallel_size=NUM_ENGINES,
            tensor_parallel_size=num_ranks // NUM_ENGINES,
            enable_expert_parallel=True,
            all2all_backend=backend,
            worker_extension_cls=f"{__name__}:DispatchClock",
        )
        self._executor, capacity = start_executor(config, resolve(str(model)), lambda *_: None)
        stack.push(self._executor)
        self._brain = Brain(
            config,
            self._executor,
            num_blocks=capacity.num_blocks,
            max_model_len=capacity.max_model_len,
            eos_token_ids=(),
        )

    def run(self, prompts: Prompts, output_len: int) -> tuple[float, Shares]:
        """Seconds, and what took them."""
        self._executor.collective_rpc("take_spans")
        began_at = time.monotonic()
        serve(self._brain, prompts, output_len)
        seconds = time.monotonic() - began_at
        return seconds, shares(self._executor.collective_rpc("take_spans"), seconds)


def shares(spans: list[Spans], seconds: float) -> Shares:
    """From the calls of every rank, dispatch and combine in turn: all ranks make the same ones."""
    own_s, waiting_s = [0.0, 0.0], 0.0
    for number, call in enumerate(zip(*spans, strict=True)):
        last_came_at = max(began_at for began_at, _ in call)
        for began_at, ended_at in call:
            waited_until = min(last_came_at, ended_at)
            waiting_s += waited_until - began_at
            own_s[number % 2] += ended_at - waited_until
    total_s = seconds * len(spans)
    return Shares(own_s[0] / total_s, own_s[1] / total_s, waiting_s / total_s)


def be_engine(model: Path, load: Load, orders: Connection) -> None:
    """An engine of one rank, with half of the cores: serves lists of prompts, until there are no more."""
    threads = max(1, len(os.sched_getaffinity(0)) // NUM_ENGINES)
    config = make_config(model, load, threads_per_rank=threads)
    executor, capacity = start_executor(config, resolve(str(model)), lambda *_: None)
    with executor:
        brain = Brain(
            config, executor, num_blocks=capacity.num_blocks, max_model_len=capacity.max_model_len, eos_token_ids=()
        )
        orders.send("ready")
        while True:
            try:
                prompts = orders.recv()
            except EOFError:
                return
            serve(brain, prompts, load.output_len)
            orders.send("done")


class Apart:
    """Two engines in processes of their own."""

    def __init__(self, connections: Sequence[Connection]) -> None:
        self._connections = connections
        self._await("ready")

    def run(self, prompts: Prompts) -> float:
        """Seconds until both are done."""
        began_at = time.monotonic()
        for engine, connection in enumerate(self._connections):
            connection.send(prompts[engine::NUM_ENGINES])
        self._await("done")
        return time.monotonic() - began_at

    def _await(self, word: str) -> None:
        for connection in self._connections:
            try:
                if not connection.poll(DEADLINE_S) or connection.recv() != word:
                    raise click.ClickException(f"an engine was not {word} within {DEADLINE_S:.0f} s")
            except EOFError:
                raise click.ClickException("an engine died") from None


@contextmanager
def two_engines(model: Path, load: Load) -> Iterator[Apart]:
    processes = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        connections = []
        for _ in range(NUM_ENGINES):
            ours, theirs = processes.Pipe()
            process = processes.Process(target=be_engine, args=(model, load, theirs), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join)
            stack.callback(process.kill)
            stack.callback(ours.close)
            connections.append(ours)
        yield Apart(connections)


def compare(ranks: Sequence[int], backend: str, load: Load, rounds: int) -> None:
    """Print a line for each number of ranks: medians over `rounds` rounds, after one to warm up."""
    click.echo(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}, {backend}, {load.streams} streams")
    click.echo("ranks | lockstep tok/s | apart tok/s  ratio | dispatch  combine  waiting, of the time")
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint(Path(folder), "qwen3_moe", **MODEL)
        with two_engines(model, load) as apart:
            for num_ranks in ranks:
                with ExitStack() as stack:
                    lockstep = Lockstep(model, load, num_ranks, backend, stack)
                    _report(num_ranks, load, _take_turns(lockstep, apart, load, rounds))


def _take_turns(lockstep: Lockstep, apart: Apart, load: Load, rounds: int) -> list[Run]:
    dice = random.Random(0)
    runs = []
    for _ in range(1 + rounds):
        prompts = load.prompts(dice)
        seconds, taken = lockstep.run(prompts, load.output_len)
        runs.append(Run(seconds, apart.run(prompts), taken))
    return runs[1:]


def _report(num_ranks: int, load: Load, runs: Sequence[Run]) -> None:
    num_tokens = load.streams * load.output_len
    lockstep, apart = (num_tokens / statistics.median(seconds) for seconds in list(zip(*runs, strict=True))[:2])
    ratio = statistics.median(run.apart_s / run.lockstep_s for run in runs)
    dispatch, combine, waiting = (
        statistics.median(column) for column in zip(*(run.shares for run in runs), strict=True)
    )
    click.echo(
        f"{num_ranks:5} | {lockstep:14.1f} | {apart:11.1f} {ratio:6.2f} | {dispatch:8.1%} {combine:8.1%} {waiting:8.1%}"
    )
