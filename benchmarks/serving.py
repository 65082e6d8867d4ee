"""Tokens per second, time to first token and memory of `phalanx serve`, against vLLM's server on the same machine.

Both servers hold the same model; while one is measured the other is stopped (SIGSTOP), and they take turns. Prompts are
random token ids, so that no prefix cache helps; every request makes exactly the tokens it is asked for.

    python benchmarks/serving.py --model DIRECTORY [--peer-python PATH] [--tensor-parallel-size 2]
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import httpx
import psutil

START_TIMEOUT_S = 300.0
REQUEST_TIMEOUT_S = 600.0
MODEL_NAME = "sample"


class Load(NamedTuple):
    """One measurement of one server."""

    tokens_per_s: float
    first_token_ms: float
    """Median over the requests."""
    token_ms: float
    """Median time between tokens of one stream."""


class Server:
    """A server process and all that it started."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], port: int, log: Path) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        self._started_at = time.monotonic()
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdout=sink, stderr=sink, start_new_session=True
            )

    def await_ready(self) -> float:
        """Seconds from the command to the first token that it serves."""
        with httpx.Client(timeout=1.0) as client:
            while time.monotonic() - self._started_at < START_TIMEOUT_S:
                if self._process.poll() is not None:
                    raise click.ClickException(f"{self.name} ended: {self._log.read_text()[-2000:]}")
                with contextlib.suppress(httpx.TransportError):
                    if client.get(f"{self.url}/health").status_code == 200:
                        asyncio.run(measure(self.url, streams=1, requests=1, prompt_tokens=4, output_tokens=1))
                        return time.monotonic() - self._started_at
                time.sleep(0.1)
        raise click.ClickException(f"{self.name} was not ready after {START_TIMEOUT_S:.0f} s; its log is {self._log}")

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def processes(self) -> list[psutil.Process]:
        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]

    def pause(self) -> None:
        for process in self.processes():
            process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        for process in self.processes():
            process.send_signal(signal.SIGCONT)

    def memory(self) -> list[tuple[str, int]]:
        """Each process's own share of memory (PSS), largest first, as (command, bytes)."""
        rows = [(" ".join(p.cmdline())[:60] or p.name(), p.memory_full_info().pss) for p in self.processes()]
        return sorted(rows, key=lambda row: -row[1])

    def close(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.resume()
            family = self.processes()
            self._process.terminate()
            _, alive = psutil.wait_procs(family, timeout=20)
            for process in alive:
                process.kill()


def phalanx(
    model: Path, tp_size: int, dtype: str, port: int, log: Path, *options: str, name: str = "phalanx"
) -> Server:
    command = [sys.executable, "-m", "phalanx", "serve", str(model), "--port", str(port), "--dtype", dtype]
    command += ["--served-model-name", MODEL_NAME, "--tensor-parallel-size", str(tp_size), "--max-model-len", "2048"]
    return Server(name, [*command, *options], {}, port, log)


def vllm(python: Path, model: Path, tp_size: int, dtype: str, port: int, log: Path) -> Server:
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--served-model-name", MODEL_NAME, "--dtype", dtype, "--max-model-len", "2048", "--enforce-eager"]
    command += ["--tensor-parallel-size", str(tp_size), "--host", "127.0.0.1"]
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if tp_size > 1:
        command += ["--distributed-executor-backend", "mp"]
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(tp_size)))
    return Server("vllm", command, environment, port, log)


def why_not(error: click.ClickException) -> str:
    """The line of a server's log that names its error, of those that come last."""
    lines = [line.strip() for line in error.message.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "rror" in line), lines[-1])


async def measure(url: str, *, streams: int, requests: int, prompt_tokens: int, output_tokens: int) -> Load:
    """Run `requests` requests, `streams` at a time."""
    gate = asyncio.Semaphore(streams)
    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, limits=httpx.Limits(max_connections=streams)) as client:
        began = time.monotonic()
        results = await asyncio.gather(
            *(_request(client, gate, url, prompt_tokens, output_tokens) for _ in range(requests))
        )
        wall_s = time.monotonic() - began
    firsts = [first for first, _ in results]
    gaps = [(total - first) / max(output_tokens - 1, 1) for first, total in results]
    return Load(requests * output_tokens / wall_s, statistics.median(firsts) * 1e3, statistics.median(gaps) * 1e3)


async def _request(
    client: httpx.AsyncClient, gate: asyncio.Semaphore, url: str, prompt_tokens: int, output_tokens: int
) -> tuple[float, float]:
    """Seconds to the first and to the last token."""
    body = {
        "model": MODEL_NAME,
        "prompt": [random.randrange(100, 20_000) for _ in range(prompt_tokens)],
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with gate:
        began = time.monotonic()
        first = made = 0.0
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                first = first or time.monotonic()
                usage = json.loads(line[6:]).get("usage")
                made = usage["completion_tokens"] if usage else made
        if made != output_tokens:
            raise click.ClickException(f"{url} made {made} tokens instead of {output_tokens}")
        return first - began, time.monotonic() - began


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    try:
        yield server
    finally:
        server.close()


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--peer-python", type=click.Path(path_type=Path), help="Python of a virtual environment with vLLM.")
@click.option("--tensor-parallel-size", "tp_size", default=1, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--streams", default="1,8,32", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--prompt-tokens", default=128, show_default=True)
@click.option("--output-tokens", default=128, show_default=True)
def main(
    model: Path,
    peer_python: Path | None,
    tp_size: int,
    dtype: str,
    streams: str,
    rounds: int,
    prompt_tokens: int,
    output_tokens: int,
) -> None:
    """Measure `phalanx serve`, and vLLM's server beside it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended on the way out
    with tempfile.TemporaryDirectory() as logs, contextlib.ExitStack() as stack:
        ours = stack.enter_context(running(phalanx(model, tp_size, dtype, free_port(), Path(logs) / "phalanx.log")))
        click.echo(f"phalanx TP {tp_size} {dtype}: command to first token {ours.await_ready():.1f} s")
        servers = [ours]
        if peer_python is None or not peer_python.exists():
            click.echo("no peer: give --peer-python PATH (a virtual environment with vLLM) for ratios")
        else:
            ours.pause()
            peer = vllm(peer_python, model, tp_size, dtype, free_port(), Path(logs) / "vllm.log")
            stack.enter_context(running(peer))
            try:
                click.echo(f"vllm    TP {tp_size} {dtype}: command to first token {peer.await_ready():.1f} s")
            except click.ClickException as error:  # it does not run every layout
                click.echo(why_not(error))
            else:
                peer.pause()
                servers.append(peer)
        click.echo(f"{prompt_tokens} tokens in, {output_tokens} out, greedy; medians of {rounds} rounds")
        for count in map(int, streams.split(",")):
            compare(servers, count, rounds, prompt_tokens, output_tokens)
        for server in servers:
            for command, size in server.memory()[:6]:
                click.echo(f"memory {server.name:8} {size / 2**20:7.0f} MiB  {command}")


def compare(servers: list[Server], streams: int, rounds: int, prompt_tokens: int, output_tokens: int) -> None:
    loads: dict[str, list[Load]] = {server.name: [] for server in servers}
    for round_ in range(rounds + 1):
        for server in servers:
            server.resume()
            load = asyncio.run(
                measure(
                    server.url,
                    streams=streams,
                    requests=streams,
                    prompt_tokens=prompt_tokens,
                    output_tokens=output_tokens if round_ else 4,
                )
            )
            if len(servers) > 1:
                server.pause()
            if round_:  # the first one warms up
                loads[server.name].append(load)
    medians = {name: Load(*map(statistics.median, zip(*rows, strict=True))) for name, rows in loads.items()}
    line = f"{streams:3} streams"
    for name, load in medians.items():
        line += (
            f"  {name} {load.tokens_per_s:6.1f} tok/s, first {load.first_token_ms:6.0f} ms,"
            f" then {load.token_ms:5.1f} ms a token;"
        )
    if "vllm" in medians:
        line += f"  ratio {medians['phalanx'].tokens_per_s / medians['vllm'].tokens_per_s:.2f}"
    click.echo(line)


if __name__ == "__main__":
    main()
