"""A mixture of experts over many ranks for many steps: nothing hangs, no rank is ever in another collective.

    python benchmarks/lockstep.py [--steps 20000] [--tensor-parallel-size 4] [--data-parallel-size 2]
        [--all2all-backend allgather_reducescatter] [--streams 32] [--seed 0] [--short]
    python benchmarks/lockstep.py --device cuda --shape qwen3-30b-a3b -tp 2 -dp 2 --steps 3000
    python benchmarks/lockstep.py --compare [--all2all-backend alltoall] [--ranks 2 --ranks 4 --ranks 8] [--short]

Streams of requests with prompts of all sizes arrive and end at random, and now and then nobody comes for a while, so
that replicas run empty. The model is a small random one, or one of a real one's shape (in bfloat16: its weights are
written to a temporary folder first, tens of gigabytes). Ranks compare every collective with their peers', so that a
divergence ends the run. At the end some requests are computed again by transformers: their tokens must be the same, or
in bfloat16, where rounding turns a near tie, nearly the likeliest. Prints how many steps had a replica without a token,
and how many had a rank without a token for its experts, in one layer or more; for each rank also in how many layers of
all steps it had none.

With --compare there is no long run: it measures what lockstep costs (lockstep_cost.py).
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from large_checkpoint import SHAPES, write_large_checkpoint
from lockstep_cost import Load, compare
from transformers import AutoModelForCausalLM

from phalanx.config import Config
from phalanx.engine.brain import Brain
from phalanx.errors import PhalanxError
from phalanx.executor.executor import Executor
from phalanx.executor.start import start_executor
from phalanx.models.checkpoint import resolve
from phalanx.protocol.client import Submit
from phalanx.protocol.columns import as_ints, ints
from phalanx.protocol.sampling import SamplingParams
from phalanx.protocol.worker import Step
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.worker.methods import remote_method

MAX_MODEL_LEN = 256
NUM_CHECKED = 40
REPORT_S = 10.0
SHORT_STEPS = 200
TINY = "tiny"

NEAR_TIE = 0.5
"""Of logits: a tenth of what a token chosen at random falls short of the likeliest by."""


class EmptyLayers:
    """A worker extension: in how many layers of each step this rank has no token for its experts.

    Counts on the device, so that a step need not wait for it.
    """

    def __init__(self, worker: Any) -> None:
        self._num_empty: list[torch.Tensor] = []
        begin = worker.model._dispatcher.begin

        def begun(num_tokens: Sequence[int]) -> None:
            begin(num_tokens)
            self._num_empty.append(torch.zeros((), dtype=torch.int64, device=worker.model.device))

        worker.model._dispatcher.begin = begun
        for experts in worker.model.experts.values():
            self._watch(experts.load)

    def _watch(self, load: Any) -> None:
        note = load.note

        def noted(local_NK: torch.Tensor) -> None:
            note(local_NK)
            self._num_empty[-1] += ~(local_NK < load.mine.size).any()

        load.note = noted

    @remote_method
    def start_counting(self) -> None:
        """Forget the steps so far."""
        self._num_empty.clear()

    @remote_method
    def empty_layers(self) -> list[int]:
        """Of each step, the layers of this rank that had nothing to compute."""
        return torch.stack(self._num_empty).tolist()


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


class Case(NamedTuple):
    """What is run."""

    shape: str
    device: str
    streams: int
    tensor_parallel_size: int
    data_parallel_size: int
    all2all_backend: str

    @property
    def is_tiny(self) -> bool:
        return self.shape == TINY

    def write(self, folder: Path) -> Path:
        if self.is_tiny:
            return write_checkpoint(folder, "mixtral", num_local_experts=2 * self.tensor_parallel_size)
        return write_large_checkpoint(folder, SHAPES[self.shape])

    def config(self, checkpoint: Path) -> Config:
        return Config.build(
            model=str(checkpoint),
            dtype="float32" if self.is_tiny else "bfloat16",
            device=self.device,
            tensor_parallel_size=self.tensor_parallel_size,
            data_parallel_size=self.data_parallel_size,
            enable_expert_parallel=True,
            all2all_backend=self.all2all_backend,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=self.streams,
            max_num_batched_tokens=max(64, self.streams),
            kv_cache_memory=4 << 20 if self.is_tiny else 2 << 30,
            worker_extension_cls=f"{Path(__file__).stem}:EmptyLayers",
            cuda_graphs=self.device != "cuda",  # the extension counts in Python, in each step
        )


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
@click.option("--shape", type=click.Choice([TINY, *SHAPES]), default=TINY, show_default=True, help="The model's.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
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
    steps: int, seed: int, is_comparison: bool, ranks: tuple[int, ...], rounds: int, short: bool, **case: Any
) -> None:
    """Run a mixture of experts in lockstep for so many steps, or measure what lockstep costs."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that engines and ranks are ended
    asked = Case(**case)
    if is_comparison:
        lengths = (16, 8) if short else (32, 64)
        compare(ranks, asked.all2all_backend, Load(asked.streams, *lengths), 1 if short else rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        began_at = time.monotonic()
        checkpoint = asked.write(Path(folder))
        click.echo(f"{asked.shape} model written in {time.monotonic() - began_at:.0f} s", err=True)
        try:
            clients = _run_for(asked, checkpoint, min(steps, SHORT_STEPS) if short else steps, seed)
        except PhalanxError as error:
            raise click.ClickException(str(error)) from error
        click.echo(f"computing {len(clients.finished)} of the requests with transformers", err=True)
        click.echo(_equal(checkpoint, clients) if asked.is_tiny else _nearly_equal(checkpoint, clients, asked.device))


def _run_for(case: Case, checkpoint: Path, steps: int, seed: int) -> Streams:
    config = case.config(checkpoint)
    began_at = time.monotonic()
    executor, capacity = start_executor(config, resolve(str(checkpoint)), lambda *_: None)
    click.echo(f"{executor.world_size} ranks started in {time.monotonic() - began_at:.0f} s", err=True)
    with executor:
        executor.collective_rpc("start_counting")
        counting = CountingExecutor(executor)
        brain = Brain(
            config, counting, num_blocks=capacity.num_blocks, max_model_len=capacity.max_model_len, eos_token_ids=()
        )
        clients = Streams(brain, case.streams, seed)
        took_s = _run(clients, counting, steps)
        num_empty: list[list[int]] = executor.collective_rpc("empty_layers")
    assert {len(steps) for steps in num_empty} == {counting.num_steps}, "a rank took another number of steps"
    num_with_an_empty_rank = sum(map(any, zip(*num_empty, strict=True)))
    click.echo(
        f"{counting.num_steps} steps in {took_s:.0f} s over {config.parallel.world_size} ranks: "
        f"{clients.num_done} requests, all complete, {clients.num_tokens} tokens\n"
        f"steps with a replica without a token: {counting.num_with_an_empty_replica}\n"
        f"steps in which a rank had no token for its experts of a layer: {num_with_an_empty_rank}\n"
        f"layers of steps in which it had none, by rank: {list(map(sum, num_empty))}"
    )
    return clients


def _run(clients: Streams, counting: CountingExecutor, steps: int) -> float:
    """Seconds that it took."""
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
    return time.monotonic() - began_at


def _equal(checkpoint: Path, clients: Streams) -> str:
    torch.set_num_threads(1)  # a model this small is slower with more
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for prompt, num_tokens, tokens in clients.finished:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            # One pass tells, instead of one a token; but it may choose another one of two that are equally likely.
            logits_TV = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
            if logits_TV.argmax(dim=1).tolist() == tokens:
                continue
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
            )
        assert out[0, len(prompt) :].tolist() == tokens, f"other tokens after {prompt}"
    return f"tokens of {len(clients.finished)} requests equal transformers'"


def _nearly_equal(checkpoint: Path, clients: Streams, device: str) -> str:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).to(device)
    num_likeliest, gaps = 0, []
    for prompt, _, tokens in clients.finished:
        with torch.inference_mode():
            logits_TV = model(torch.tensor([[*prompt, *tokens]], device=device)).logits[0, len(prompt) - 1 : -1].float()
        chosen_T = logits_TV.gather(1, torch.tensor(tokens, device=device)[:, None])[:, 0]
        gaps.append((logits_TV.max(dim=1).values - chosen_T).max().item())
        num_likeliest += int((logits_TV.argmax(dim=1) == torch.tensor(tokens, device=device)).sum())
    num_tokens = sum(len(tokens) for _, _, tokens in clients.finished)
    said = (
        f"{num_likeliest} of {num_tokens} tokens of {len(gaps)} requests are transformers' likeliest; "
        f"the others fall short of it by {max(gaps):.2f} at most"
    )
    assert max(gaps) < NEAR_TIE, said
    return said


if __name__ == "__main__":
    main()
