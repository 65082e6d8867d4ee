"""Replicas that come and go while streams run: how long that takes, and the longest gap between tokens of a stream.

    python benchmarks/scale.py [--model DIRECTORY] [--rounds 5] [--streams 4] [--threads 1] [--expert-parallel]
                               [--device cuda --tensor-parallel-size 2]

One `phalanx serve` with one replica, and streams that never pause: each asks for its next output as soon as one has
ended. In each round it grows to two replicas, then the first replica leaves (in turns: its requests end there, or move
at once), and it grows again. Gaps are what the clients see, between two tokens of one output, of those that ran at some
time of the resize; beside them those of as long a time before it, when nothing happened. All outputs of a prompt have
to be the same, greedy: what ran alone, and what ran through resizes.

Without a model it is a tiny one with random weights. With `--expert-parallel` a mixture starts with two replicas in
lockstep, which become one and two again: all ranks are replaced at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import click
import httpx
from heal import await_serving
from serving import MODEL_NAME, REQUEST_TIMEOUT_S, free_port, phalanx, running

from phalanx.testing.checkpoints import write_checkpoint

RESIZE_TIMEOUT_S = 120.0
POLL_S = 0.02
SETTLE_S = 3.0


class Output(NamedTuple):
    """One output of a stream: its text, and when its tokens came."""

    prompt: int
    text: str
    times: list[float]


class Resize(NamedTuple):
    """What was done, and what clients saw of it."""

    kind: str
    took_s: float
    gap_ms: float
    """The longest while it was under way."""
    quiet_gap_ms: float
    """The longest in as long a time before, as far as nothing happened then."""
    token_ms: float
    """Median gap before."""


class Streams:
    """Clients that always have one output under way each."""

    def __init__(self, url: str, num_tokens: int) -> None:
        self._url = url
        self._num_tokens = num_tokens
        self._times: dict[int, list[float]] = {}
        """Of the outputs that are under way, and the last one of each prompt before."""
        self.gaps: list[tuple[float, float]] = []
        """When each ended, and its seconds."""
        self.outputs: list[Output] = []

    async def one(self, client: httpx.AsyncClient, prompt: int) -> Output:
        """One output, from its prompt."""
        body = {
            "model": MODEL_NAME,
            "prompt": f"Story number {prompt}. Once upon a time,",
            "stream": True,
            "max_tokens": self._num_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        text = ""
        times: list[float] = []
        async with client.stream("POST", f"{self._url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise click.ClickException(f"a stream failed: {event['error']['message']}")
                now = time.monotonic()
                if times:
                    self.gaps.append((now, now - times[-1]))
                times.append(now)
                text += event["choices"][0]["text"]
        output = Output(prompt, text, times)
        self.outputs.append(output)
        return output

    @contextlib.asynccontextmanager
    async def flowing(self, client: httpx.AsyncClient, count: int) -> AsyncIterator[None]:
        """So many at a time, while this is entered."""

        async def flow(prompt: int) -> None:
            while True:
                await self.one(client, prompt)

        tasks = [asyncio.create_task(flow(prompt)) for prompt in range(count)]
        try:
            yield
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def longest_gap_s(self, begin: float, end: float) -> float:
        """Of those that were at some time between the two."""
        return self.longest_gap(begin, end)[1]

    def longest_gap(self, begin: float, end: float) -> tuple[float, float]:
        """When it ended, and its seconds."""
        gaps = [(ended, gap) for ended, gap in self.gaps if ended >= begin and ended - gap <= end]
        return max(gaps, key=lambda one: one[1], default=(begin, 0.0))

    def median_gap_s(self, begin: float, end: float) -> float:
        return statistics.median(gap for ended, gap in self.gaps if begin <= ended <= end)


async def resize(client: httpx.AsyncClient, url: str, kind: str, streams: Streams, body: dict[str, object]) -> Resize:
    """Begin it and wait for its end."""
    began_at = time.monotonic()
    answer = await client.post(f"{url}/scale", json=body)
    if answer.status_code != 202:
        raise click.ClickException(answer.text)
    async with asyncio.timeout(RESIZE_TIMEOUT_S):
        while (told := (await client.get(f"{url}/scale")).json()["resize"])["state"] == "running":
            await asyncio.sleep(POLL_S)
    if told["state"] != "done":
        raise click.ClickException(f"{kind}: {told}")
    ended_at = time.monotonic()
    await asyncio.sleep(SETTLE_S)  # whoever was moved has its next token by now
    when, gap_s = streams.longest_gap(began_at, ended_at)
    click.echo(
        f"{kind}: {told['took_s']:.2f} s, {1e3 * gap_s:.0f} ms, "
        f"at {when - began_at:.2f} s of {ended_at - began_at:.2f}",
        err=True,
    )
    quiet_s = min(max(ended_at - began_at, SETTLE_S), 2 * SETTLE_S)  # since the one before
    return Resize(
        kind,
        told["took_s"],
        1e3 * streams.longest_gap_s(began_at, ended_at),
        1e3 * streams.longest_gap_s(began_at - quiet_s, began_at),
        1e3 * streams.median_gap_s(began_at - SETTLE_S, began_at),
    )


def apart(number: int) -> list[tuple[str, dict[str, object]]]:
    """Of a round: replicas that are engines of their own."""
    moves = number % 2 == 0
    kind = "down, requests move" if moves else "down, requests end there"
    down = {"data_parallel_size": 1, "leaving": [number % 2], "drain_timeout_s": 0 if moves else 60}
    return [("up", {"data_parallel_size": 2}), (kind, down)]


def in_lockstep(_: int) -> list[tuple[str, dict[str, object]]]:
    """Of a round: replicas that share experts."""
    return [("down, in lockstep", {"data_parallel_size": 1}), ("up, in lockstep", {"data_parallel_size": 2})]


async def measure(
    url: str, rounds: int, num_streams: int, num_tokens: int, *, shares_experts: bool
) -> tuple[list[Resize], Streams]:
    done: list[Resize] = []
    streams = Streams(url, num_tokens)
    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(streams.one(client, prompt) for prompt in range(num_streams)))  # nothing happens
        async with streams.flowing(client, num_streams):
            await asyncio.sleep(2 * SETTLE_S)
            for number in range(rounds):
                for kind, body in in_lockstep(number) if shares_experts else apart(number):
                    done.append(await resize(client, url, kind, streams, body))
                    await asyncio.sleep(2 * SETTLE_S)  # outputs end and begin: all replicas have some
    return done, streams


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="A tiny one is made by default.")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--rounds", default=6, show_default=True)
@click.option("--streams", default=4, show_default=True)
@click.option("--output-tokens", default=400, show_default=True)
@click.option("--threads", default=1, show_default=True, help="Threads of each rank.")
@click.option("--expert-parallel", is_flag=True, help="Replicas of a mixture that share its experts.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--tensor-parallel-size", "tp_size", default=1, show_default=True, help="Of each replica.")
@click.option("--kv-cache-memory", help="Of each rank; to be given for replicas in lockstep on GPUs.")
def main(
    model: Path | None,
    dtype: str,
    rounds: int,
    streams: int,
    output_tokens: int,
    threads: int,
    expert_parallel: bool,
    device: str,
    tp_size: int,
    kv_cache_memory: str | None,
) -> None:
    """Measure resizes of `phalanx serve`."""
    options = ["--threads-per-rank", str(threads), "--device", device]
    if expert_parallel:
        options += ["--data-parallel-size", "2", "--enable-expert-parallel"]
    if kv_cache_memory is not None:
        options += ["--kv-cache-memory", kv_cache_memory]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        family = "qwen3_moe" if expert_parallel else "llama"
        model = model or write_checkpoint(Path(folder) / "model", family, max_position_embeddings=2048)
        with running(phalanx(model, tp_size, dtype, free_port(), log, *options)) as server:
            await_serving(server)
            resizes, found = asyncio.run(
                measure(server.url, rounds, streams, output_tokens, shares_experts=expert_parallel)
            )
    click.echo(f"{streams} streams, greedy; {rounds} rounds; times are medians, and the largest in brackets")
    for kind in dict.fromkeys(one.kind for one in resizes):
        rows = [one for one in resizes if one.kind == kind]
        took, gap = [one.took_s for one in rows], [one.gap_ms for one in rows]
        quiet, token = [one.quiet_gap_ms for one in rows], [one.token_ms for one in rows]
        click.echo(
            f"{kind:26} takes {statistics.median(took):6.2f} s [{max(took):.2f}], longest gap "
            f"{statistics.median(gap):6.0f} ms [{max(gap):.0f}]; before it {statistics.median(quiet):6.0f} ms "
            f"[{max(quiet):.0f}], and a token every {statistics.median(token):.0f} ms"
        )
    texts: dict[int, set[str]] = {}
    for output in found.outputs:
        texts.setdefault(output.prompt, set()).add(output.text)
    short = sum(len(output.times) > output_tokens for output in found.outputs)
    differing = {prompt: len(several) for prompt, several in texts.items() if len(several) > 1}
    click.echo(f"outputs: {len(found.outputs)}; with too many tokens: {short}; prompts with other texts: {differing}")


if __name__ == "__main__":
    main()
