"""What a replica costs that computes with the weights of another one on its host, beside one that reads its own.

    python benchmarks/shared_weights.py --model PATH [--dtype bfloat16] [--rounds 3] [-tp 1] [--streams 0]

In turns a `phalanx serve` whose replicas share weights, and one whose replicas do not, each with one replica, which
becomes two. Seconds are those of the resize: until the new replica serves. Memory is that of all processes, what they
have in common counted once (PSS), after each replica has served a request; and the CPU time that the new engine's
processes have taken by then.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import click
import httpx
import psutil
from heal import await_serving
from scale import Streams
from serving import MODEL_NAME, REQUEST_TIMEOUT_S, Server, free_port, phalanx, running

RESIZE_TIMEOUT_S = 120.0
POLL_S = 0.02
NUM_REQUESTS = 8
OUTPUT_TOKENS = 16
MIB = 1 << 20


class Growth(NamedTuple):
    """From one replica to two."""

    took_s: float
    cpu_s: float
    before_mib: float
    after_mib: float


async def serve_some(client: httpx.AsyncClient, url: str) -> None:
    """Enough requests at a time for each replica to get some."""
    body = {"model": MODEL_NAME, "prompt": "Once upon a time,", "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
    answers = await asyncio.gather(*(client.post(f"{url}/v1/completions", json=body) for _ in range(NUM_REQUESTS)))
    for answer in answers:
        answer.raise_for_status()


async def grow(server: Server, num_streams: int) -> Growth:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, limits=limits) as client:
        await serve_some(client, server.url)
        before_mib, there = memory_mib(server), {process.pid for process in server.processes()}
        async with Streams(server.url, 400).flowing(client, num_streams):
            (await client.post(f"{server.url}/scale", json={"data_parallel_size": 2})).raise_for_status()
            expires_at = time.monotonic() + RESIZE_TIMEOUT_S
            while (told := (await client.get(f"{server.url}/scale")).json()["resize"])["state"] == "running":
                if time.monotonic() > expires_at:
                    raise click.ClickException(f"not done after {RESIZE_TIMEOUT_S:.0f} s: {told}")
                await asyncio.sleep(POLL_S)
            cpu_s = cpu_seconds([process for process in server.processes() if process.pid not in there])
        if told["state"] != "done":
            raise click.ClickException(str(told))
        await serve_some(client, server.url)
        return Growth(told["took_s"], cpu_s, before_mib, memory_mib(server))


def memory_mib(server: Server) -> float:
    return sum(num_bytes for _, num_bytes in server.memory()) / MIB


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--tensor-parallel-size", "-tp", "tp_size", default=1, show_default=True)
@click.option("--streams", default=0, show_default=True, help="That run meanwhile.")
def main(model: Path, dtype: str, rounds: int, tp_size: int, streams: int) -> None:
    """Measure replicas that join."""
    found: dict[str, list[Growth]] = {"never": [], "always": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for shares, growths in found.items():
                log, options = Path(folder) / "log", ["--threads-per-rank", "1", "--share-weights", shares]
                with running(phalanx(model, tp_size, dtype, free_port(), log, *options)) as server:
                    await_serving(server)
                    growths.append(asyncio.run(grow(server, streams)))
                    click.echo(f"{shares}: {growths[-1]}", err=True)
    for shares, growths in found.items():
        took, cpu, before, after = (statistics.median(column) for column in zip(*growths, strict=True))
        click.echo(
            f"--share-weights {shares:6} {took:5.2f} s [{max(one.took_s for one in growths):.2f}], CPU {cpu:5.2f} s; "
            f"memory {before:6.0f} MiB, with two replicas {after:6.0f}"
        )


if __name__ == "__main__":
    main()
