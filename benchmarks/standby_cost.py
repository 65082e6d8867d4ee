"""What a standby line costs: tokens per second while it stands ready, and while it is prepared again; time and memory.

    python benchmarks/standby_cost.py [--model PATH] [--dtype bfloat16] [--rounds 7] [--device cuda]

Two `phalanx serve` of the same model, one with a standby line, which are asked in turns by as many streams that never
pause; who is not asked rests. *Ready*: tokens per second with it, divided by those without, as the median over the
rounds. Then a rank of the line that stands ready is killed while streams run, and *prepared again* is their tokens per
second from the kill until the next one is ready, divided by those of the seconds before it. Memory is that of all
processes of each server (PSS), and on GPUs what the GPUs have in use when each server has started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import httpx
from heal import await_serving, await_standby, formation, ranks
from serving import MODEL_NAME, REQUEST_TIMEOUT_S, Server, free_port, phalanx, running

from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.holdings import used_of_gpus
from phalanx.testing.reach import Place, ThisHost

TURN_S = 4.0
SETTLE_S = 1.0
"""Of a turn, before its tokens count: all streams run by then."""
NOTICED_WITHIN_S = 10.0
"""That a standby line has lost a rank."""
LOOK_S = 0.02


class Again(NamedTuple):
    """Of one line that was prepared again."""

    took_s: float
    ratio: float
    """Of tokens per second meanwhile to those before."""


class Load:
    """Streams that ask for their next output as soon as one has ended, until they are stopped."""

    def __init__(self, url: str, num_streams: int, num_tokens: int) -> None:
        self._url = url
        self._num_streams = num_streams
        self._num_tokens = num_tokens
        self._came_at: list[float] = []

    async def __aenter__(self) -> Load:
        limits = httpx.Limits(max_connections=self._num_streams)
        self._client = httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, limits=limits)
        self._streams = [asyncio.create_task(self._stream(number)) for number in range(self._num_streams)]
        await asyncio.sleep(SETTLE_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        for stream in self._streams:
            stream.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)
        await self._client.aclose()

    def rate(self, begins_at: float, ends_at: float) -> float:
        """Tokens per second."""
        for stream in self._streams:
            if stream.done():
                stream.result()  # what went wrong
        return sum(begins_at <= at < ends_at for at in self._came_at) / (ends_at - begins_at)

    async def _stream(self, number: int) -> None:
        prompt = [10 + number, 20 + number, 30 + number, 40 + number]
        body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": self._num_tokens, "temperature": 0}
        while True:
            request = {**body, "ignore_eos": True, "stream": True}
            async with self._client.stream("POST", f"{self._url}/v1/completions", json=request) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line.startswith("data: {") and json.loads(line[6:]).get("choices"):
                        self._came_at.append(time.monotonic())


async def turn(server: Server, num_streams: int, num_tokens: int) -> float:
    """Tokens per second."""
    async with Load(server.url, num_streams, num_tokens) as load:
        began_at = time.monotonic()
        await asyncio.sleep(TURN_S)
        return load.rate(began_at, began_at + TURN_S)


async def again(server: Server, num_streams: int, num_tokens: int) -> Again:
    """Kill one of those that stand ready, and wait until others do."""
    serving = ranks(server.url)
    ready = ThisHost().ranks_beside(Place("", serving[0]))
    async with Load(server.url, num_streams, num_tokens) as load:
        await asyncio.sleep(TURN_S)
        (victim, *_) = sorted(place.pid for place in ready() if place.pid not in serving.values())
        killed_at = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        while formation(server.url)["standby"] == "ready":
            if time.monotonic() - killed_at > NOTICED_WITHIN_S:
                raise click.ClickException(f"nobody has noticed that process {victim} was killed")
            await asyncio.sleep(LOOK_S)
        await asyncio.to_thread(await_standby, server.url)
        ready_at = time.monotonic()
        before = load.rate(killed_at - TURN_S, killed_at)
        return Again(ready_at - killed_at, load.rate(killed_at, ready_at) / before)


def spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def memory_mb(server: Server) -> float:
    return sum(memory for _, memory in server.memory()) / 1e6


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="A tiny one is made by default.")
@click.option("--dtype", default="float32", show_default=True)
@click.option("--tensor-parallel-size", "tp_size", default=2, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--kv-cache-memory", default="64MiB", show_default=True)
@click.option("--streams", "num_streams", default=8, show_default=True)
@click.option("--tokens", "num_tokens", default=300, show_default=True, help="Of an output.")
@click.option("--rounds", default=7, show_default=True)
def main(
    model: Path | None,
    dtype: str,
    tp_size: int,
    device: str,
    kv_cache_memory: str,
    num_streams: int,
    num_tokens: int,
    rounds: int,
) -> None:
    """Measure what a standby line costs."""
    options: list[Any] = ["--device", device, "--kv-cache-memory", kv_cache_memory, "--max-num-seqs", num_streams]
    on_gpus = device == "cuda"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = model or write_checkpoint(Path(folder) / "model", max_position_embeddings=2048)
        servers = []
        for standby in (0, 1):
            used = used_of_gpus() if on_gpus else 0
            its_options = [*map(str, options), "--standby", str(standby)]
            log = Path(folder) / f"standby{standby}.log"
            server = stack.enter_context(running(phalanx(model, tp_size, dtype, free_port(), log, *its_options)))
            click.echo(f"--standby {standby}: ready to serve after {await_serving(server):.1f} s", nl=not standby)
            if standby:
                click.echo(f", the standby line another {await_standby(server.url):.1f} s later")
            servers.append(server)
            asyncio.run(turn(server, num_streams, num_tokens))
            of_gpus = f", of GPUs {(used_of_gpus() - used) >> 20} MiB" if on_gpus else ""
            click.echo(f"  memory {memory_mb(server):.0f} MB{of_gpus}")
        rates = [[asyncio.run(turn(server, num_streams, num_tokens)) for server in servers] for _ in range(rounds)]
        click.echo(
            f"tokens/s without {spread([one for one, _ in rates], 0)}, with {spread([two for _, two in rates], 0)}"
        )
        click.echo(f"ready: {spread([two / one for one, two in rates], 3)} of those without")
        found = [asyncio.run(again(servers[1], num_streams, num_tokens)) for _ in range(rounds)]
        click.echo(f"prepared again: {spread([one.ratio for one in found], 2)} of those before it")
        click.echo(f"  after {spread([one.took_s for one in found], 1)} s")


if __name__ == "__main__":
    main()
