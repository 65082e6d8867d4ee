"""Two stages (PP 2) against one rank (TP 1) and two ranks that share every layer (TP 2): tokens per second on a CPU.

    python benchmarks/pipeline.py [--model DIRECTORY] [--streams 1 --streams 8] [--rounds 3]

All layouts hold the same model, side by side in one run; they take turns, and who waits for its turn sleeps. All have
their ranks in processes of their own, and share out the same cores: TP 1 has the threads of both. Besides, for each
rank, the share of the time in which it ran layers or head (`StageClock`), the share in which both ranks did so at once,
and the memory of weights and KV cache. Greedy, random prompts, no end before the last token. Without --model a random
Llama of 24 layers is made.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import click

from phalanx.config import Config
from phalanx.engine.brain import Brain
from phalanx.executor.start import start_executor
from phalanx.models.checkpoint import resolve
from phalanx.protocol.client import Submit
from phalanx.protocol.columns import ints
from phalanx.protocol.sampling import SamplingParams
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.stage_clock import EXTENSION, Spans, both, total_s

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 1": {},
    "TP 2": {"tensor_parallel_size": 2},
    "PP 2": {"pipeline_parallel_size": 2},
    "PP 2, one step at a time": {"pipeline_parallel_size": 2, "async_scheduling": False},
}
SYNTHETIC: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "initializer_range": 0.02,
}
SEED = 0
MIB = 1 << 20


class Run(NamedTuple):
    """One load, served by one layout."""

    seconds: float
    spans: list[Spans]
    """Of each rank."""

    def shares(self) -> list[float]:
        """Of the time, how much each rank computed."""
        return [total_s(spans) / self.seconds for spans in self.spans]

    def overlap(self) -> float:
        """Of the time, how much the first two ranks computed at once."""
        return total_s(both(*self.spans[:2])) / self.seconds if len(self.spans) > 1 else 0.0


class Contestant:
    """One layout, ready to serve."""

    def __init__(self, model: Path, layout: dict[str, Any], dtype: str, length: int, stack: ExitStack) -> None:
        config = Config.build(
            model=str(model),
            dtype=dtype,
            device="cpu",
            launcher="local",
            max_model_len=length,
            max_num_seqs=64,
            enable_prefix_caching=False,
            worker_extension_cls=EXTENSION,
            **layout,
        )
        self.executor, self.capacity = start_executor(config, resolve(config.model.model), lambda *_: None)
        stack.push(self.executor)
        self._brain = Brain(
            config,
            self.executor,
            num_blocks=self.capacity.num_blocks,
            max_model_len=self.capacity.max_model_len,
            eos_token_ids=(),
        )

    def run(self, prompts: Sequence[Sequence[int]], output_len: int) -> Run:
        """Blocks until every prompt has its output."""
        sampling = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        self.executor.collective_rpc("take_spans")
        began_at = time.perf_counter()
        for request_id, prompt in enumerate(prompts):
            self._brain.submit(Submit(request_id, ints(prompt), sampling))
        while self._brain.has_work():
            self._brain.step()
        seconds = time.perf_counter() - began_at
        return Run(seconds, self.executor.collective_rpc("take_spans"))


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="A checkpoint directory or GGUF file.")
@click.option("--dtype", default="float32", show_default=True)
@click.option("--streams", type=click.IntRange(1, 64), multiple=True, default=(1, 8, 32), show_default=True)
@click.option("--input-len", type=click.IntRange(1), default=64, show_default=True, help="Tokens in.")
@click.option("--output-len", type=click.IntRange(1), default=64, show_default=True, help="Tokens out.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Timed, after one to warm up.")
def main(
    model: Path | None, dtype: str, streams: tuple[int, ...], input_len: int, output_len: int, rounds: int
) -> None:
    """Time the layouts in turns; figures are medians over the rounds."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = model or write_checkpoint(Path(folder), "llama", seed=SEED, **SYNTHETIC)
        length = input_len + output_len
        contestants = {name: Contestant(path, layout, dtype, length, stack) for name, layout in LAYOUTS.items()}
        vocab_size = resolve(str(path)).vocab_size
        _report_memory(contestants)
        for count in streams:
            _report(
                count * output_len, count, _take_turns(contestants, count, vocab_size, input_len, output_len, rounds)
            )


def _take_turns(
    contestants: dict[str, Contestant], count: int, vocab_size: int, input_len: int, output_len: int, rounds: int
) -> dict[str, list[Run]]:
    rng = random.Random(SEED)
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    for _ in range(1 + rounds):
        prompts = [[rng.randrange(vocab_size) for _ in range(input_len)] for _ in range(count)]
        for name, contestant in contestants.items():
            runs[name].append(contestant.run(prompts, output_len))
    return {name: timed for name, (_, *timed) in runs.items()}


def _report_memory(contestants: dict[str, Contestant]) -> None:
    click.echo("layout                   | MiB of weights, each rank | KiB of KV cache for 16 tokens, each rank")
    for name, contestant in contestants.items():
        weights = " ".join(f"{size / MIB:.0f}" for size in contestant.capacity.weight_bytes)
        blocks = " ".join(f"{size / 1024:.0f}" for size in contestant.capacity.block_bytes)
        click.echo(f"{name:24} | {weights:>25} | {blocks:>40}")


def _report(num_tokens: int, count: int, runs: dict[str, list[Run]]) -> None:
    click.echo(f"\n{count} streams            | tokens/s | against TP 1 | each rank computes | both at once")
    base_s = statistics.median(run.seconds for run in runs["TP 1"])
    for name, timed in runs.items():
        seconds = statistics.median(run.seconds for run in timed)
        middle = min(timed, key=lambda run: abs(run.seconds - seconds))
        shares = " ".join(f"{share:.0%}" for share in middle.shares())
        overlap = f"{middle.overlap():.0%}" if len(middle.spans) > 1 else ""
        click.echo(f"{name:24} | {num_tokens / seconds:8.1f} | {base_s / seconds:12.2f} | {shares:>18} | {overlap:>12}")


if __name__ == "__main__":
    main()
