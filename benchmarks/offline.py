"""Tokens per second through `phalanx.LLM`, without a server, against transformers' `generate` on the same batch.

    python benchmarks/offline.py [--model DIR | --shape qwen3-8b] [--streams 1 --streams 32] [--tensor-parallel-size 2]

Greedy, prompts of random tokens, no end before the last token. `--shape` writes a checkpoint of that shape with random
weights into a temporary folder. The systems run one after the other, each in a process of its own, so that each has the
device's memory to itself; transformers has one device (`--peer none` leaves it out). The figure is the median round.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import click

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-8b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 4096,
            "initializer_range": 0.02,
        },
    ),
}
SEED = 0


class Load(NamedTuple):
    """What both systems are asked for."""

    model: Path
    dtype: str
    streams: tuple[int, ...]
    input_len: int
    output_len: int
    rounds: int
    vocab_size: int
    tensor_parallel_size: int


class Figures(NamedTuple):
    """Of one system."""

    load_s: float
    seconds: tuple[float, ...]
    """For each number of streams."""


Generate = Callable[[Sequence[Sequence[int]]], object]
"""Blocks until every prompt has its output."""


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="A checkpoint directory.")
@click.option("--shape", type=click.Choice(list(SHAPES)), help="Random weights of this shape instead of --model.")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--streams", type=click.IntRange(1), multiple=True, default=(1, 32, 128), show_default=True)
@click.option("--input-len", type=click.IntRange(1), default=512, show_default=True, help="Tokens in.")
@click.option("--output-len", type=click.IntRange(1), default=128, show_default=True, help="Tokens out.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Timed, after one to warm up.")
@click.option("--tensor-parallel-size", type=click.IntRange(1), default=1, show_default=True)
@click.option("--peer", type=click.Choice(["transformers", "none"]), default="transformers", show_default=True)
def main(
    model: Path | None,
    shape: str | None,
    dtype: str,
    streams: tuple[int, ...],
    input_len: int,
    output_len: int,
    rounds: int,
    tensor_parallel_size: int,
    peer: str,
) -> None:
    """Time Phalanx and transformers on the same prompts."""
    if (model is None) == (shape is None):
        raise click.UsageError("give either --model or --shape")
    with tempfile.TemporaryDirectory() as folder:
        path = model or _in_a_process(_write, Path(folder), shape, dtype)
        vocab_size = _in_a_process(_vocab_size, path)
        load = Load(path, dtype, streams, input_len, output_len, rounds, vocab_size, tensor_parallel_size)
        ours: Figures = _in_a_process(_time_phalanx, load)
        theirs: Figures | None = _in_a_process(_time_transformers, load) if peer == "transformers" else None
    _report(load, ours, theirs)


def _report(load: Load, ours: Figures, theirs: Figures | None) -> None:
    click.echo(f"{load.input_len} tokens in, {load.output_len} out, {load.dtype}, TP {load.tensor_parallel_size}")
    click.echo(f"load: phalanx {ours.load_s:.1f} s" + (f", transformers {theirs.load_s:.1f} s" if theirs else ""))
    click.echo("streams | phalanx tok/s | transformers tok/s | ratio")
    for i, streams in enumerate(load.streams):
        tokens = streams * load.output_len
        row = f"{streams:7} | {tokens / ours.seconds[i]:13.1f} |"
        if theirs:
            row += f" {tokens / theirs.seconds[i]:18.1f} | {theirs.seconds[i] / ours.seconds[i]:.2f}"
        click.echo(row)


def _in_a_process(function: Callable[..., Any], *arguments: object) -> Any:
    """What `function` returns, run in a fresh process: nothing of it stays on the device."""
    processes = multiprocessing.get_context("spawn")
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=_run, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise click.ClickException(f"{function.__name__} failed, see above") from None
    finally:
        process.join()


def _run(sender: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    sender.send(function(*arguments))


def _write(folder: Path, shape: str, dtype: str) -> Path:
    import torch

    from phalanx.testing.checkpoints import write_checkpoint

    family, settings = SHAPES[shape]
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return write_checkpoint(folder, family, seed=SEED, dtype=dtype, **settings)


def _vocab_size(path: Path) -> int:
    """Of the token ids that both the model and its tokenizer have."""
    from transformers import AutoConfig, AutoTokenizer

    return min(int(AutoConfig.from_pretrained(path).vocab_size), len(AutoTokenizer.from_pretrained(path)))


def _time_phalanx(load: Load) -> Figures:
    from phalanx import LLM
    from phalanx.protocol.sampling import SamplingParams

    began_at = time.perf_counter()
    with LLM(
        str(load.model),
        dtype=load.dtype,
        tensor_parallel_size=load.tensor_parallel_size,
        max_model_len=load.input_len + load.output_len,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
    ) as llm:
        load_s = time.perf_counter() - began_at
        sampling = SamplingParams(temperature=0.0, max_tokens=load.output_len, ignore_eos=True)
        return Figures(load_s, _time_all(load, lambda prompts: llm.generate(list(prompts), sampling)))


def _time_transformers(load: Load) -> Figures:
    import torch
    from transformers import AutoModelForCausalLM

    began_at = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(load.model, dtype=getattr(torch, load.dtype)).to(device)
    load_s = time.perf_counter() - began_at

    def generate(prompts: Sequence[Sequence[int]]) -> object:
        input_ids = torch.tensor(prompts, device=device)
        exactly = {"max_new_tokens": load.output_len, "min_new_tokens": load.output_len}
        mask = torch.ones_like(input_ids)
        return model.generate(input_ids, attention_mask=mask, do_sample=False, pad_token_id=0, **exactly).cpu()

    with torch.inference_mode():
        return Figures(load_s, _time_all(load, generate))


def _time_all(load: Load, generate: Generate) -> tuple[float, ...]:
    rng = random.Random(SEED)
    medians = []
    for streams in load.streams:
        seconds = []
        for _ in range(1 + load.rounds):
            prompts = [[rng.randrange(load.vocab_size) for _ in range(load.input_len)] for _ in range(streams)]
            began_at = time.perf_counter()
            generate(prompts)
            seconds.append(time.perf_counter() - began_at)
        medians.append(statistics.median(seconds[1:]))
    return tuple(medians)


if __name__ == "__main__":
    main()
