"""Tokens per second of decoding on GPUs, with CUDA graphs and without, with the ledger and without.

    python benchmarks/decode_graphs.py [--shape llama-8b] [--tensor-parallel-size 2] [--streams 1 --streams 8]
        [--with eager --with graphs --with graphs+ledger] [--rounds 3]

The engines of all variants are up at the same time, on the same GPUs, and take turns; who waits for its turn sleeps.
The weights are random, in bfloat16, and written to a temporary folder first. A figure is the median over rounds of the
tokens that were made after every stream had its first one; the ratio is the median over rounds of that to the first
variant. Also says in how many streams the tokens are those of the first variant, up to the last: where rounding turns a
near tie, they part.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import click
from large_checkpoint import SHAPES, write_large_checkpoint

from phalanx.config import Config
from phalanx.engine.brain import Brain
from phalanx.executor.start import start_executor
from phalanx.models.checkpoint import resolve
from phalanx.protocol.client import Submit
from phalanx.protocol.columns import as_ints, ints
from phalanx.protocol.sampling import SamplingParams

VARIANTS: dict[str, dict[str, Any]] = {
    "eager": {"cuda_graphs": False, "ledger": False},
    "graphs": {"ledger": False},
    "eager+ledger": {"cuda_graphs": False, "ledger": True},
    "graphs+ledger": {"ledger": True},
}
SEED = 0


class Round(NamedTuple):
    """One load on one variant."""

    tokens_per_s: float
    outputs: list[list[int]]


class Engine:
    """A brain over ranks of its own."""

    def __init__(self, checkpoint: Path, stack: ExitStack, **settings: Any) -> None:
        config = Config.build(model=str(checkpoint), dtype="bfloat16", device="cuda", launcher="local", **settings)
        began_at = time.perf_counter()
        executor, capacity = start_executor(config, resolve(config.model.model), lambda *_: None)
        stack.push(executor)
        self.start_s = time.perf_counter() - began_at
        self._brain = Brain(
            config,
            executor,
            num_blocks=capacity.num_blocks,
            max_model_len=capacity.max_model_len,
            eos_token_ids=(),
        )
        self._next_id = 0

    def run(self, prompts: list[list[int]], output_len: int) -> Round:
        """Tokens per second from when each prompt has its first token."""
        sampling = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
        first_id = self._next_id
        self._next_id += len(prompts)
        for i, prompt in enumerate(prompts):
            self._brain.submit(Submit(first_id + i, ints(prompt), sampling))
        outputs: list[list[int]] = [[] for _ in prompts]
        began_at, num_before = 0.0, 0
        while self._brain.has_work():
            batch = self._brain.step()
            if batch is None:
                continue
            ids = memoryview(batch.request_ids).cast("q").tolist()
            for request_id, token in zip(ids, as_ints(batch.tokens).tolist(), strict=True):
                outputs[request_id - first_id].append(token)
            if not began_at and all(outputs):
                began_at, num_before = time.perf_counter(), sum(map(len, outputs))
        took_s = time.perf_counter() - began_at
        return Round((sum(map(len, outputs)) - num_before) / took_s, outputs)


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="llama-8b", show_default=True)
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), help="Use this one instead of --shape.")
@click.option("--tensor-parallel-size", "-tp", type=click.IntRange(1), default=1, show_default=True)
@click.option("--with", "variants", type=click.Choice(list(VARIANTS)), multiple=True, default=("eager", "graphs"))
@click.option("--streams", type=click.IntRange(1), multiple=True, default=(1, 8, 32), show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--input-len", type=click.IntRange(1), default=128, show_default=True)
@click.option("--output-len", type=click.IntRange(2), default=128, show_default=True)
@click.option("--max-num-seqs", type=click.IntRange(1), default=32, show_default=True)
def main(
    shape: str,
    checkpoint: Path | None,
    tensor_parallel_size: int,
    variants: tuple[str, ...],
    streams: tuple[int, ...],
    rounds: int,
    input_len: int,
    output_len: int,
    max_num_seqs: int,
) -> None:
    """Measure and print a table."""
    dice = random.Random(SEED)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        checkpoint = checkpoint or write_large_checkpoint(Path(folder), SHAPES[shape])
        engines = {}
        for name in variants:
            engines[name] = Engine(
                checkpoint,
                stack,
                tensor_parallel_size=tensor_parallel_size,
                max_model_len=2 * (input_len + output_len),
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=4096,
                kv_cache_memory=6 << 30,
                enable_prefix_caching=False,
                **VARIANTS[name],
            )
            click.echo(f"{name}: ready after {engines[name].start_s:.1f} s")
        for num_streams in streams:
            found: dict[str, list[Round]] = {name: [] for name in variants}
            for n in range(rounds + 1):
                prompts = [[dice.randrange(1000) for _ in range(input_len)] for _ in range(num_streams)]
                for name in variants if n % 2 else reversed(variants):
                    found[name].append(engines[name].run(prompts, output_len))
            for name in variants:
                _report(num_streams, name, found[name][1:], found[variants[0]][1:])


def _report(num_streams: int, name: str, found: list[Round], first: list[Round]) -> None:
    rate = statistics.median(one.tokens_per_s for one in found)
    pairs = list(zip(found, first, strict=True))
    ratio = statistics.median(one.tokens_per_s / other.tokens_per_s for one, other in pairs)
    same = sum(a == b for one, other in pairs for a, b in zip(one.outputs, other.outputs, strict=True))
    click.echo(
        f"{num_streams:4d} streams  {name:14s} {rate:9.1f} tokens/s  {1e3 * num_streams / rate:7.3f} ms a step"
        f"  ratio {ratio:.4f}  same tokens in {same} of {num_streams * len(found)}"
    )


if __name__ == "__main__":
    main()
