"""The brain's own cost: planning, encoding and committing steps whose workers are simulated.

    python benchmarks/brain.py [--peer-python PATH] [--running 32 --running 1024] [--steps 200]
        [--replicas 1 --replicas 2 --replicas 8 --replicas 32] [--running-each 32 --running-each 256] [--short]

Traffic: *decode*, where every running request makes one token a step; *churn*, where besides each request ends after
128 tokens and another with a prompt of 128 takes its place; *admission*, from a new request to its first token. Prompts
differ in length, so that blocks fill at different times. Times are microseconds; those of steps are medians.

With `--peer-python`, the Python of an environment with vLLM 0.32, its asynchronous scheduler makes the same decode
steps in rounds that alternate with ours. The ratio is that of our plan, encode and commit to its `schedule` and
`update_from_output`, the median over the rounds.

Last, decode with several replicas in lockstep, each with `--running-each` requests, for each number of `--replicas`, in
rounds that alternate. The ratio is that of the time per running request to the first number's.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
import msgspec

from phalanx.config import Config
from phalanx.engine.brain import Brain
from phalanx.protocol.client import Submit
from phalanx.protocol.columns import ints
from phalanx.protocol.sampling import SamplingParams
from phalanx.protocol.worker import Call, Step, StepResult
from phalanx.testing.simulated_worker import Answered, SimulatedWorker

PEER = Path(__file__).parent / "contestants" / "vllm_scheduler.py"
PEER_DEADLINE_S = 120.0

BLOCK_SIZE = 16
PROMPT_LEN = 128
OUTPUT_LEN = 128
VOCAB_SIZE = 32_000
WARM_UP_STEPS = 20
ROUNDS = 5

_encode = msgspec.msgpack.Encoder().encode


class Turn(NamedTuple):
    """Microseconds of the parts of one turn, and bytes of the frames that it sent."""

    plan: float
    encode: float
    commit: float
    frame_bytes: int

    @property
    def total(self) -> float:
        return self.plan + self.encode + self.commit


class TimedExecutor:
    """Encodes plans as the real one does, has them carried out, and keeps the worker's time out of the brain's."""

    def __init__(self, workers: Sequence[SimulatedWorker]) -> None:
        self._workers = workers
        self.begin()

    def begin(self) -> None:
        """A turn of the brain begins."""
        self._plan_s = self._encode_s = 0.0
        self._frame_bytes = 0
        self.resumed_at = time.perf_counter()

    def end(self) -> Turn:
        """The turn is over. What came after the last answer was the commit."""
        commit_s = time.perf_counter() - self.resumed_at
        return Turn(self._plan_s * 1e6, self._encode_s * 1e6, commit_s * 1e6, self._frame_bytes)

    def step(self, step: Step) -> TimedAnswer:
        planned_at = time.perf_counter()
        frame = _encode(Call(call_id=step.number, body=step, reply_ranks=(0,)))
        encoded_at = time.perf_counter()
        self._plan_s += planned_at - self.resumed_at
        self._encode_s += encoded_at - planned_at
        self._frame_bytes += len(frame)
        results = tuple(worker.run(plan) for worker, plan in zip(self._workers, step.plans, strict=True))
        answer = TimedAnswer(self, results)
        self.resumed_at = time.perf_counter()
        return answer


class TimedAnswer(Answered):
    """Notes when the brain gets it."""

    def __init__(self, executor: TimedExecutor, results: tuple[StepResult, ...]) -> None:
        super().__init__(results)
        self._executor = executor

    def result(self) -> tuple[StepResult, ...]:
        self._executor.resumed_at = time.perf_counter()
        return super().result()


class Bench:
    """A brain whose requests never find themselves short of a slot or of blocks."""

    def __init__(self, num_running: int, *, max_model_len: int, output_len: int | None, num_replicas: int = 1) -> None:
        """`num_running` are the requests of each replica."""
        limits: dict[str, Any] = {"max_num_seqs": num_running, "max_num_batched_tokens": max(2048, 2 * num_running)}
        num_blocks = num_running * (-(-max_model_len // BLOCK_SIZE) + 1)
        workers = [
            SimulatedWorker(
                **limits,
                max_model_len=max_model_len,
                block_size=BLOCK_SIZE,
                num_blocks=num_blocks,
                vocab_size=VOCAB_SIZE,
            )
            for _ in range(num_replicas)
        ]
        config = Config.build(
            model="simulated",
            block_size=BLOCK_SIZE,
            data_parallel_size=num_replicas,
            enable_expert_parallel=num_replicas > 1,
            **limits,
        )
        self.executor = TimedExecutor(workers)
        self.brain = Brain(
            config, self.executor, num_blocks=num_blocks, max_model_len=max_model_len, eos_token_ids=(VOCAB_SIZE,)
        )
        self._output_len = output_len
        self._random = random.Random(0)
        self._next_id = 0

    def submit(self, prompt_len: int) -> float:
        """Returns the microseconds that it took."""
        length = prompt_len + self._random.randrange(BLOCK_SIZE)
        prompt = ints([self._random.randrange(VOCAB_SIZE) for _ in range(length)])
        request = Submit(self._next_id, prompt, SamplingParams(max_tokens=self._output_len))
        self._next_id += 1
        started_at = time.perf_counter()
        self.brain.submit(request)
        return (time.perf_counter() - started_at) * 1e6

    def settle(self) -> None:
        """Run until every request decodes."""
        while any(replica.num_waiting for replica in self.brain.stats().replicas):
            self.brain.step()
        self.run(WARM_UP_STEPS)

    def run(self, num_steps: int) -> list[Turn]:
        """Another request comes for each that ends."""
        turns = []
        for _ in range(num_steps):
            self.executor.begin()
            batch = self.brain.step()
            turns.append(self.executor.end())
            for _ in batch.finished if batch else ():
                self.submit(PROMPT_LEN)
        return turns


class Peer:
    """vLLM's scheduler in its own process. Between orders it sleeps."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._answers = connection.makefile("r")
        if self._answers.readline() != "ready\n":
            raise click.ClickException("vLLM's scheduler did not start")

    def decode(self, num_steps: int) -> list[float]:
        """Microseconds of each step."""
        self._connection.sendall(f"{num_steps}\n".encode())
        times_us: list[float] = json.loads(self._answers.readline())
        return times_us


@contextlib.contextmanager
def running_peer(python: Path | None, num_running: int, max_model_len: int) -> Iterator[Peer | None]:
    """None without a Python for it."""
    if python is None:
        yield None
        return
    ours, theirs = socket.socketpair()
    ours.settimeout(PEER_DEADLINE_S)
    sizes = map(str, (theirs.fileno(), num_running, max_model_len, PROMPT_LEN, BLOCK_SIZE))
    with theirs:
        process = subprocess.Popen(
            [str(python), str(PEER), *sizes],
            pass_fds=[theirs.fileno()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    try:
        with ours:
            yield Peer(ours)
    finally:
        process.kill()
        process.wait()


def measure_decode(
    num_running: int, steps: int, peer_python: Path | None
) -> tuple[list[Turn], list[float], list[float]]:
    """Ours, theirs, and the ratio of each round."""
    max_model_len = 4 * PROMPT_LEN + 2 * (steps + num_running)  # early requests decode while late ones are prefilled
    bench = Bench(num_running, max_model_len=max_model_len, output_len=None)
    for _ in range(num_running):
        bench.submit(PROMPT_LEN)
    bench.settle()
    ours, theirs, ratios = [], [], []
    with running_peer(peer_python, num_running, max_model_len) as peer:
        for _ in range(ROUNDS):
            turns = bench.run(-(-steps // ROUNDS))
            ours += turns
            if peer is not None:
                times_us = peer.decode(len(turns))
                theirs += times_us
                ratios.append(median(turn.total for turn in turns) / median(times_us))
    return ours, theirs, ratios


def measure_replicas(replicas: tuple[int, ...], num_running: int, steps: int) -> list[tuple[list[Turn], float]]:
    """For each number of replicas the turns, and the time per running request against the first number's."""
    max_model_len = 4 * PROMPT_LEN + 2 * (steps + num_running)
    benches = []
    for num_replicas in replicas:
        benches.append(Bench(num_running, max_model_len=max_model_len, output_len=None, num_replicas=num_replicas))
        for _ in range(num_replicas * num_running):
            benches[-1].submit(PROMPT_LEN)
        benches[-1].settle()
    rounds = [[bench.run(-(-steps // ROUNDS)) for bench in benches] for _ in range(ROUNDS)]
    per_request_us = [
        [median(turn.total for turn in turns) / n for n, turns in zip(replicas, one, strict=True)] for one in rounds
    ]
    return [
        ([turn for one in rounds for turn in one[i]], median(times[i] / times[0] for times in per_request_us))
        for i in range(len(replicas))
    ]


def measure_churn(num_running: int, steps: int) -> list[Turn]:
    """After as many steps as it takes for every request to have been replaced."""
    bench = Bench(num_running, max_model_len=2 * (PROMPT_LEN + OUTPUT_LEN), output_len=OUTPUT_LEN)
    for _ in range(num_running):
        bench.submit(PROMPT_LEN)
    bench.run(2 * OUTPUT_LEN)
    return bench.run(steps)


def measure_admission(prompt_len: int) -> float:
    """Microseconds of the brain for each of several requests, from `submit` to the first token."""
    num_requests = 64
    bench = Bench(num_requests, max_model_len=2 * prompt_len, output_len=None)
    total_us = sum(bench.submit(prompt_len) for _ in range(num_requests))
    while (stats := bench.brain.stats().replicas[0]).num_generated_tokens < num_requests or stats.num_waiting:
        total_us += sum(turn.total for turn in bench.run(1))
    return total_us / num_requests


def columns(turns: list[Turn], num_running: int) -> str:
    """What the tables have in common."""
    plan, encode, commit, frame_bytes = (median(column) for column in zip(*turns, strict=True))
    total = sorted(turn.total for turn in turns)
    return (
        f"{num_running:7} | {plan:6.0f} {encode:7.1f} {commit:7.0f} | {median(total):7.0f} "
        f"{total[int(0.99 * len(total))]:7.0f} {median(total) / num_running:11.2f} | {frame_bytes / num_running:15.1f}"
    )


def report(traffic: str, num_running: int, turns: list[Turn], theirs: list[float], ratios: list[float]) -> None:
    """One line of the table."""
    line = f"{traffic:7} {columns(turns, num_running)}"
    if ratios:
        line += f" | {median(theirs):7.0f} {median(ratios):7.3f}"
    click.echo(line)


@click.command()
@click.option("--peer-python", type=click.Path(path_type=Path), help="Python of a virtual environment with vLLM.")
@click.option("--running", "sizes", type=click.IntRange(1), multiple=True, default=(1, 8, 32, 256, 1024))
@click.option("--replicas", type=click.IntRange(1), multiple=True, default=(1, 2, 8, 32), show_default=True)
@click.option("--running-each", type=click.IntRange(1), multiple=True, default=(32, 256), show_default=True)
@click.option("--steps", default=200, show_default=True, type=click.IntRange(ROUNDS), help="Timed steps a case.")
@click.option("--short", is_flag=True, help="A tenth of the steps: to see that it works.")
def main(
    peer_python: Path | None,
    sizes: tuple[int, ...],
    replicas: tuple[int, ...],
    running_each: tuple[int, ...],
    steps: int,
    short: bool,
) -> None:
    """Time the brain, and vLLM's scheduler beside it."""
    steps = max(ROUNDS, steps // 10) if short else steps
    if peer_python is None or not peer_python.exists():
        click.echo(f"skipped vLLM: {'give --peer-python to compare' if peer_python is None else f'no {peer_python}'}")
        peer_python = None
    click.echo(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}, {steps} steps a case")
    click.echo(
        "traffic running |   plan  encode  commit |   total     p99 per request | bytes a request"
        + (" |    vLLM   ratio" if peer_python else "")
    )
    for num_running in sizes:
        report("decode", num_running, *measure_decode(num_running, steps, peer_python))
    for num_running in sizes:
        report("churn", num_running, measure_churn(num_running, steps), [], [])
    for prompt_len in (PROMPT_LEN, 16 * PROMPT_LEN):
        click.echo(f"admission of a prompt of {prompt_len} tokens: {measure_admission(prompt_len):.0f} per request")
    click.echo("replicas running |   plan  encode  commit |   total     p99 per request | bytes a request |   ratio")
    for num_running in running_each:
        for count, (turns, ratio) in zip(replicas, measure_replicas(replicas, num_running, steps), strict=True):
            click.echo(f"{count:8} {columns(turns, count * num_running)} | {ratio:7.3f}")


if __name__ == "__main__":
    main()
