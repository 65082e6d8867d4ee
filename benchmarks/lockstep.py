"""A mixture of experts over many ranks for many steps: nothing hangs, no rank is ever in another collective.

    python benchmarks/lockstep.py [--steps 20000] [--tensor-parallel-size 4] [--data-parallel-size 2]
        [--all2all-backend allgather_reducescatter] [--streams 32] [--seed 0] [--short]
    python benchmarks/lockstep.py --compare [--all2all-backend alltoall] [--ranks 2 --ranks 4 --ranks 8] [--short]

Streams of requests with prompts of all sizes arrive and end at random, and now and then nobody comes for a while, so
that replicas run empty. The model is a small random one. Ranks compare every collective with their peers', so that a
divergence ends the run. At the end some requests are computed again by transformers: their tokens must be the same.
Prints how many steps had a replica without a token, and how many had a rank without a token for its experts, in one
layer or more; for each rank also in how many layers of all steps it had none.

With --compare there is no long run: it measures what lockstep costs (lockstep_cost.py).
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from lockstep_cost import Load, compare
from transformers import AutoModelForCausalLM

from phalanx.config import Config
from phalanx.engine.brain import Brain
from phalanx.errors import PhalanxError
from phalanx.executor.executor import Executor
from phalanx.executor.start import start_executor
from phalanx.models.checkpoint import resolve
from phalanx.protocol import SamplingParams, Step, Submit, as_ints, ints
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.worker.methods import remote_method

MAX_MODEL_LEN = 256
NUM_CHECKED = 40
REPORT_S = 10.0
SHORT_STEPS = 200


class EmptySteps:
    """A worker extension: notes the steps in which this rank has no token for its experts of some layer."""

    def __init__(self, worker: Any) -> None:
        self._num_layers = len(worker.model.experts)
        self._num_visits = 0
        """Of layers; each step visits each of them once, whatever the router says."""
        self._num_empty_by_step = bytearray()
        for experts in worker.model.experts.values():
            self._watch(experts.load)

    def _watch(self, load: Any) -> None:
        note = load.note

        def noted(local_NK: torch.Tensor) -> None:
            note(local_NK)
            if self._num_visits % self._num_layers == 0:
                self._num_empty_by_step.append(0)
            self._num_empty_by_step[-1] += not bool((local_NK < load.mine.size).any())
            self._num_visits += 1

        load.note = noted

    @remote_method
    def num_empty_layers(self) -> bytes:
        """By step, a byte each: layers in which this rank had nothing to compute."""
        return bytes(self._num_empty_by_step)


class CountingExecutor:
    """Passes steps on, and counts those in which a replica has no token."""

    def __init__(self, executor: Executor) -> None:
        self.num_steps = self.num_with_an_empty_replica = 0
        self._executor = executor

    def step(self, step: Step) -> Any:
        self.num_steps += 1
        self.num_with_an_empty_replica += any(not plan.shape.num_tokens for plan in step.plans)
        return self._executor.step(step)


class Asked(NamedTuple):
    """A request, with the tokens that have come."""

    prompt: list[int]
    num_wanted: int
    tokens: list[int]


class Streams:
    """So many clients, each of which sends a request when its last one has ended, sooner or later."""

    def __init__(self, brain: Brain, num_streams: int, seed: int) -> None:
        self.num_done = self.num_tokens = 0
        self.finished: list[Asked] = []
        """Some of the requests, from all of the run."""
        self._brain = brain
        self._dice = random.Random(seed)
        self._num_streams = num_streams
        self._running: dict[int, Asked] = {}
        self._next_id = 0
        self._num_wanted = num_streams

    def arrive(self) -> None:
        """Let some clients come. In one of 40 turns all stay away, or come, until the dice say otherwise."""
        if self._dice.random() < 1 / 40:
            self._num_wanted = self._dice.choice([0, 1, 2, self._num_streams // 2, self._num_streams])
        while len(self._running) < self._num_wanted or not self._running:
            self._submit()

    def step(self) -> None:
        batch = self._brain.step()
        if batch is None:
            return
        ids = memoryview(batch.request_ids).cast("q").tolist()
        for request_id, token in zip(ids, as_ints(batch.tokens).tolist(), strict=True):
            self._running[request_id].tokens.append(token)
            self.num_tokens += 1
        for request_id, _ in batch.finished:
            done = self._running.pop(request_id)
            assert len(done.tokens) == done.num_wanted, "a request ended before its time"
            self.num_done += 1
            self._keep(done)

    def finish(self) -> None:
        while self._brain.has_work():
            self.step()
        assert not self._running, "requests were forgotten"

    def _keep(self, done: Asked) -> None:
        """So that each has the same chance, however many there will be."""
        if len(self.finished) < NUM_CHECKED:
            self.finished.append(done)
        elif (place := self._dice.randrange(self.num_done)) < NUM_CHECKED:
            self.finished[place] = done

    def _submit(self) -> None:
        length = self._dice.choice([1, 2, 5, 16, 40, 120])
        prompt = [self._dice.randrange(256) for _ in range(length)]
        num_tokens = self._dice.choice([1, 4, 20, 60, 100])
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        self._brain.submit(Submit(self._next_id, ints(prompt), sampling))
        self._running[self._next_id] = Asked(prompt, num_tokens, [])
        self._next_id += 1


@click.command()
@click.option(
    "--steps", type=click.IntRange(1), default=20_000, show_default=True, help="Then what has begun is finished."
)
@click.option("--tensor-parallel-size", "-tp", type=click.IntRange(1), default=4, show_default=True)
@click.option("--data-parallel-size", "-dp", type=click.IntRange(1), default=2, show_default=True)
@click.option(
    "--all2all-backend",
    type=click.Choice(["allgather_reducescatter", "alltoall"]),
    default="allgather_reducescatter",
    show_default=True,
)
@click.option("--streams", type=click.IntRange(1), default=32, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--compare", "is_comparison", is_flag=True, help="Compare with two engines that share nothing instead.")
@click.option(
    "--ranks",
    type=click.Choice([2, 4, 8]),
    multiple=True,
    default=(2, 4, 8),
    show_default=True,
    help="To compare: in all, of two replicas. May be repeated.",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="To compare.")
@click.option("--short", is_flag=True, help=f"At most {SHORT_STEPS} steps, or one short round.")
def main(
    steps: int,
    tensor_parallel_size: int,
    data_parallel_size: int,
    all2all_backend: str,
    streams: int,
    seed: int,
    is_comparison: bool,
    ranks: tuple[int, ...],
    rounds: int,
    short: bool,
) -> None:
    """Run a mixture of experts in lockstep for so many steps, or measure what lockstep costs."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that engines and ranks are ended
    if is_comparison:
        load = Load(streams, input_len=16, output_len=8) if short else Load(streams, input_len=32, output_len=64)
        compare(ranks, all2all_backend, load, 1 if short else rounds)
        return
    steps = min(steps, SHORT_STEPS) if short else steps
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder), "mixtral", num_local_experts=2 * tensor_parallel_size)
        config = Config.build(
            model=str(checkpoint),
            dtype="float32",
            tensor_parallel_size=tensor_parallel_size,
            data_parallel_size=data_parallel_size,
            enable_expert_parallel=True,
            all2all_backend=all2all_backend,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=streams,
            max_num_batched_tokens=max(64, streams),
            kv_cache_memory=4 << 20,
            worker_extension_cls=f"{Path(__file__).stem}:EmptySteps",
        )
        try:
            clients = _run_streams(config, steps, streams, seed)
        except PhalanxError as error:
            raise click.ClickException(str(error)) from error
        click.echo(f"tokens of {_check(checkpoint, clients)} requests equal transformers'")


def _run_streams(config: Config, steps: int, num_streams: int, seed: int) -> Streams:
    executor, capacity = start_executor(config, resolve(config.model.model), lambda *_: None)
    with executor:
        counting = CountingExecutor(executor)
        brain = Brain(
            config, counting, num_blocks=capacity.num_blocks, max_model_len=capacity.max_model_len, eos_token_ids=()
        )
        clients = Streams(brain, num_streams, seed)
        began_at = time.monotonic()
        _run(clients, counting, steps)
        took_s = time.monotonic() - began_at
        by_rank: list[bytes] = executor.collective_rpc("num_empty_layers")
    assert {len(steps) for steps in by_rank} == {counting.num_steps}, "a rank took another number of steps"
    num_with_an_empty_rank = sum(map(any, zip(*by_rank, strict=True)))
    click.echo(
        f"{counting.num_steps} steps in {took_s:.0f} s over {config.parallel.world_size} ranks: "
        f"{clients.num_done} requests, all complete, {clients.num_tokens} tokens\n"
        f"steps with a replica without a token: {counting.num_with_an_empty_replica}\n"
        f"steps in which a rank had no token for its experts of a layer: {num_with_an_empty_rank}\n"
        f"layers of steps in which it had none, by rank: {list(map(sum, by_rank))}"
    )
    return clients


def _run(clients: Streams, counting: CountingExecutor, steps: int) -> None:
    began_at = reported_at = time.monotonic()
    while counting.num_steps < steps:
        clients.arrive()
        clients.step()
        now = time.monotonic()
        if now > reported_at + REPORT_S:
            reported_at = now
            left_s = (now - began_at) / counting.num_steps * (steps - counting.num_steps)
            told = f"{counting.num_steps} of {steps} steps, {clients.num_done} requests, {left_s:.0f} s to go"
            click.echo(told, err=True)
    clients.finish()


def _check(checkpoint: Path, clients: Streams) -> int:
    click.echo(f"computing {len(clients.finished)} of the requests with transformers", err=True)
    torch.set_num_threads(1)  # a model this small is slower with more
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for prompt, num_tokens, tokens in clients.finished:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
            )
        assert out[0, len(prompt) :].tolist() == tokens, f"other tokens after {prompt}"
    return len(clients.finished)


if __name__ == "__main__":
    main()
