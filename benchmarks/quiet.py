"""The time without faults: every verdict is a false alarm.

    python benchmarks/quiet.py --model DIRECTORY [--minutes 60] [--tensor-parallel-size 2] [--dtype float32]

One `phalanx serve` after the other, each for ten minutes, so that models are loaded several times. Under each, in turns
drawn from a seed: many short requests, a few with long prompts, one stream alone, a client that does not read what it
asked for for a minute, and minutes in which nobody asks for anything. What the ledger says to the log is counted, and
shown. The exit code is 1 if there was any verdict, or if a request failed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

import click
import httpx
from serving import MODEL_NAME, REQUEST_TIMEOUT_S, free_port, measure, phalanx, running

SERVER_S = 600.0
PAUSE_S = 60.0
VERDICT = "verdict:"


class Mix(NamedTuple):
    """One kind of load."""

    name: str
    run: Callable[[str, random.Random, float], Coroutine[Any, Any, None]]
    """Of a server's address, with dice, until so many seconds are over at most."""


async def burst(url: str, dice: random.Random, left_s: float) -> None:
    """Many short requests at a time."""
    streams = dice.choice((2, 8, 16))
    await measure(url, streams=streams, requests=3 * streams, prompt_tokens=dice.randint(4, 64), output_tokens=48)


async def long_prompts(url: str, dice: random.Random, left_s: float) -> None:
    """Prompts that take far longer than the steps before them."""
    await measure(url, streams=2, requests=4, prompt_tokens=dice.randint(600, 1500), output_tokens=8)


async def single(url: str, dice: random.Random, left_s: float) -> None:
    """One stream."""
    await measure(url, streams=1, requests=3, prompt_tokens=dice.randint(1, 200), output_tokens=100)


async def paused_client(url: str, dice: random.Random, left_s: float) -> None:
    """A client that asks for much and does not read it for a minute."""
    body = {"model": MODEL_NAME, "prompt": [dice.randrange(100, 200) for _ in range(16)], "stream": True}
    body |= {"max_tokens": 400, "temperature": 0, "ignore_eos": True}
    async with (
        httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S) as client,
        client.stream("POST", f"{url}/v1/completions", json=body) as response,
    ):
        response.raise_for_status()
        lines = response.aiter_lines()
        await anext(lines)
        await asyncio.sleep(min(PAUSE_S, left_s))
        last = ""
        async for line in lines:
            last = line if line.startswith("data: {") else last
        if json.loads(last[6:])["choices"][0]["finish_reason"] != "length":
            raise click.ClickException(f"a stream that paused ended with {last}")


async def idle(url: str, dice: random.Random, left_s: float) -> None:
    """Nobody asks for anything."""
    await asyncio.sleep(min(PAUSE_S, left_s))


MIXES = (
    Mix("burst", burst),
    Mix("long prompts", long_prompts),
    Mix("single", single),
    Mix("paused client", paused_client),
    Mix("idle", idle),
)


def serve_for(
    seconds: float, model: Path, options: list[str], tp_size: int, dtype: str, dice: random.Random
) -> list[str]:
    """What the ledger said in the meantime."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with running(phalanx(model, tp_size, dtype, free_port(), log, *options)) as server:
            ready_s = server.await_ready()
            click.echo(f"ready after {ready_s:.1f} s", nl=False)
            made: Counter[str] = Counter()
            ends_at = time.monotonic() + seconds
            while (left_s := ends_at - time.monotonic()) > 0:
                mix = dice.choice(MIXES)
                asyncio.run(mix.run(server.url, dice, left_s))
                made[mix.name] += 1
            click.echo(": " + ", ".join(f"{count} {name}" for name, count in made.items()))
        return [line for line in log.read_text(errors="replace").splitlines() if VERDICT in line]


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--minutes", type=click.FloatRange(min=0.1), default=60.0, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--tensor-parallel-size", "tp_size", default=2, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.argument("options", nargs=-1)
def main(model: Path, minutes: float, seed: int, tp_size: int, dtype: str, options: tuple[str, ...]) -> None:
    """Serve without faults, and count verdicts. OPTIONS are for `phalanx serve`, after `--`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended on the way out
    dice, alarms, began_at = random.Random(seed), list[str](), time.monotonic()
    while (left_s := minutes * 60 - (time.monotonic() - began_at)) > 0:
        alarms += serve_for(min(SERVER_S, left_s), model, list(options), tp_size, dtype, dice)
    took_min = (time.monotonic() - began_at) / 60
    click.echo(f"{len(alarms)} false alarms in {took_min:.1f} minutes; load {os.getloadavg()[0]:.2f}")
    for alarm in alarms:
        click.echo(f"  {alarm}")
    sys.exit(1 if alarms else 0)


if __name__ == "__main__":
    main()
