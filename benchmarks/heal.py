"""What clients see of a fault: the longest gap between two tokens, per kind of fault, with and without a standby line.

    python benchmarks/heal.py [--model DIRECTORY] [--faults 20] [--tensor-parallel-size 2] [--device cpu]
                              [--launcher ray] [--peer-python PATH]

`phalanx serve` streams to several clients at a time, some greedy and some with seeds; then one rank is killed, stopped,
raises an exception or leaves a collective out, at a random moment. The gap is the longest of any stream, and is shown
beside the longest of runs without a fault. Every stream is compared with that of such a run, token for token. With a
standby line, the next fault comes when the next one is ready, and how long that takes is told as well. Ray is one
of its own on this host.

With `--logs` the servers' logs are kept: they tell how long each pause was for the engine, without the client's part.

With a peer, one of vLLM's workers is killed under the same load: when its clients hear of it, and what.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import httpx
import psutil
from serving import MODEL_NAME, START_TIMEOUT_S, Server, free_port, phalanx, running, vllm

from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.faults import Fault, Kind
from phalanx.testing.mailbox import Mailbox

KINDS: tuple[Kind, ...] = ("kill", "stop", "error", "skip")
REQUEST_TIMEOUT_S = 120.0
READY_WITHIN_S = 60.0
LOOK_S = 0.02
EARLIEST, LATEST = 0.1, 0.7
"""When a fault comes, as shares of the time that the streams take without one."""
PEER_AFTER_S = 0.3


class Stream(NamedTuple):
    """What one client has seen."""

    text: str
    gap_s: float
    """The longest between two pieces of text."""
    error: str | None


class Seen(NamedTuple):
    """Of one fault."""

    gap_s: float
    num_wrong: int
    """Streams that are not those of a run without faults."""
    errors: tuple[str, ...]
    again_s: float | None
    """From the fault to a standby line that is ready again."""


async def stream(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Stream:
    text, gap_s, last, error = "", 0.0, 0.0, None
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                piece, now = httpx.Response(200, text=line[6:]).json(), time.monotonic()
                if "error" in piece:
                    error = str(piece["error"].get("message", piece["error"]))
                    break
                gap_s, last = max(gap_s, now - last if last else 0.0), now
                text += piece["choices"][0]["text"] if piece["choices"] else ""
    except httpx.HTTPError as failure:
        error = f"{type(failure).__name__}: {failure}"
    return Stream(text, max(gap_s, time.monotonic() - last if error and last else 0.0), error)


async def streams(url: str, num_streams: int, num_tokens: int) -> list[Stream]:
    """The same requests each time."""
    limits = httpx.Limits(max_connections=num_streams)
    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, limits=limits) as client:
        bodies = [
            {
                "model": MODEL_NAME,
                "prompt": [10 + i, 20 + i, 30 + i, 40 + i],
                "max_tokens": num_tokens,
                "ignore_eos": True,
                "stream": True,
                **({"temperature": 0} if i % 2 else {"temperature": 1.0, "seed": i}),
            }
            for i in range(num_streams)
        ]
        return await asyncio.gather(*(stream(client, url, body) for body in bodies))


def ranks(url: str) -> dict[int, int]:
    """The processes of the ranks that compute."""
    (instance,) = httpx.get(f"{url}/status.json").json()["instances"]
    return {rank["rank"]: rank["pid"] for rank in instance["ranks"]}


def formation(url: str) -> dict[str, Any]:
    (engine,) = httpx.get(f"{url}/status.json").json()["engines"]
    return dict(engine["formation"] or {"standby": "none", "num_faults": 0})  # before it has told anything


def await_standby(url: str) -> float:
    began_at = time.monotonic()
    while formation(url)["standby"] != "ready":
        if time.monotonic() - began_at > READY_WITHIN_S:
            raise click.ClickException(f"no standby line after {READY_WITHIN_S:.0f} s")
        time.sleep(LOOK_S)
    return time.monotonic() - began_at


def await_serving(url: str) -> float:
    began_at = time.monotonic()
    while True:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=1.0).status_code == 200:
                return time.monotonic() - began_at
        if time.monotonic() - began_at > START_TIMEOUT_S:
            raise click.ClickException(f"{url} was not ready after {START_TIMEOUT_S:.0f} s")
        time.sleep(LOOK_S)


def harm(pid: int, kind: Kind, rank: int) -> None:
    if kind == "kill":
        os.kill(pid, signal.SIGKILL)
    elif kind == "stop":
        os.kill(pid, signal.SIGSTOP)
    else:
        with Mailbox(pid) as mailbox:
            mailbox.send(Fault(kind=kind, rank=rank))


async def with_fault(
    url: str,
    kind: Kind,
    expected: Sequence[Stream],
    num_tokens: int,
    at_s: float,
    dice: random.Random,
    *,
    has_standby: bool,
) -> Seen:
    rank, pid = dice.choice(sorted(ranks(url).items()))
    num_faults = formation(url)["num_faults"]
    running_streams = asyncio.create_task(streams(url, len(expected), num_tokens))
    await asyncio.sleep(at_s)
    harm(pid, kind, rank)
    harmed_at = time.monotonic()
    found = await running_streams
    again_s = None
    if formation(url)["num_faults"] != num_faults + 1:
        raise click.ClickException(f"the {kind} of rank {rank} did not happen while there were requests")
    if has_standby:
        await asyncio.to_thread(await_standby, url)
        again_s = time.monotonic() - harmed_at
    wrong = sum(one.text != right.text for one, right in zip(found, expected, strict=True))
    return Seen(max(one.gap_s for one in found), wrong, tuple(one.error for one in found if one.error), again_s)


def row(name: str, gaps_s: Sequence[float]) -> str:
    ordered = sorted(gaps_s)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))]
    return (
        f"{name:34} {len(ordered):6d} {statistics.median(ordered) * 1e3:9.0f} {p99 * 1e3:9.0f} {ordered[-1] * 1e3:9.0f}"
    )


def measure(
    server: Server,
    kinds: Sequence[Kind],
    num_streams: int,
    num_tokens: int,
    num_faults: int,
    *,
    has_standby: bool,
    seed: int,
) -> int:
    """Prints a line for each kind of fault; gives how many streams were wrong or failed."""
    dice, url = random.Random(seed), server.url
    if has_standby:
        click.echo(f"  standby ready after another {await_standby(url):.1f} s")
    clean, took_s = [], []
    for _ in range(3):
        began_at = time.monotonic()
        clean.append(asyncio.run(streams(url, num_streams, num_tokens)))
        took_s.append(time.monotonic() - began_at)
    expected = clean[-1]
    click.echo(row("  no fault", [max(one.gap_s for one in run) for run in clean]))
    bad, errors, again_s = 0, Counter[str](), []
    for kind in kinds:
        seen = [
            asyncio.run(
                with_fault(
                    url,
                    kind,
                    expected,
                    num_tokens,
                    min(took_s) * dice.uniform(EARLIEST, LATEST),
                    dice,
                    has_standby=has_standby,
                )
            )
            for _ in range(num_faults)
        ]
        click.echo(row(f"  {kind}", [one.gap_s for one in seen]))
        bad += sum(one.num_wrong for one in seen)
        errors.update(error for one in seen for error in one.errors)
        again_s += [one.again_s for one in seen if one.again_s is not None]
    if again_s:
        click.echo(f"  next standby line ready after {statistics.median(again_s):.2f} s (median, after the streams)")
    told = formation(url)
    click.echo(f"  faults {told['num_faults']}, streams that differ {bad}, errors {dict(errors) or 'none'}")
    rss = sum(memory for _, memory in server.memory()) / 1e6
    click.echo(f"  memory of all processes (PSS) {rss:.0f} MB")
    return bad + errors.total()


def measure_peer(server: Server, num_streams: int, num_tokens: int, num_ranks: int) -> None:
    """One worker of vLLM is killed."""
    url = server.url
    asyncio.run(streams(url, num_streams, num_tokens))
    workers = sorted(server.processes(), key=lambda one: -one.memory_info().rss)[:num_ranks]

    async def run() -> list[Stream]:
        task = asyncio.create_task(streams(url, num_streams, num_tokens))
        await asyncio.sleep(PEER_AFTER_S)
        workers[-1].kill()
        return await task

    began_at = time.monotonic()
    found = asyncio.run(run())
    heard_s = time.monotonic() - began_at - PEER_AFTER_S
    with contextlib.suppress(httpx.HTTPError, psutil.Error):
        for _ in range(100):
            time.sleep(0.2)
            if not server.processes() or httpx.get(f"{url}/health", timeout=1.0).status_code != 200:
                break
    failed = [one.error for one in found if one.error is not None]
    click.echo(f"  vLLM: {len(failed)} of {len(found)} streams failed, {heard_s:.1f} s after the kill: {failed[:1]}")


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="A tiny one is made by default.")
@click.option("--peer-python", type=click.Path(path_type=Path), help="Python of a virtual environment with vLLM.")
@click.option("--tensor-parallel-size", "tp_size", default=2, show_default=True)
@click.option("--streams", "num_streams", default=4, show_default=True)
@click.option("--tokens", "num_tokens", default=300, show_default=True)
@click.option("--faults", "num_faults", default=20, show_default=True, help="Of each kind.")
@click.option("--launcher", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--kv-cache-memory", default="16MiB", show_default=True)
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), default=KINDS, show_default=True)
@click.option("--logs", type=click.Path(path_type=Path), help="Directory for the servers' logs.")
def main(
    model: Path | None,
    peer_python: Path | None,
    tp_size: int,
    num_streams: int,
    num_tokens: int,
    num_faults: int,
    launcher: str,
    seed: int,
    device: str,
    dtype: str,
    kv_cache_memory: str,
    kinds: tuple[Kind, ...],
    logs: Path | None,
) -> None:
    """Measure the gaps that clients see."""
    num_bad = 0
    with tempfile.TemporaryDirectory() as folder:
        model, logs = model or write_checkpoint(Path(folder) / "model"), logs or Path(folder)
        logs.mkdir(exist_ok=True)
        click.echo(f"{'longest gap of any stream (ms)':34} {'faults':>6} {'median':>9} {'p99':>9} {'longest':>9}")
        for standby in (0, 1):
            log = logs / f"standby{standby}.log"
            options = ["--allow-chaos", "--standby", str(standby), "--device", device, "--max-model-len", "512"]
            options += ["--max-num-seqs", "8", "--kv-cache-memory", kv_cache_memory, "--launcher", launcher]
            options += ["--ray-address", "local"] if launcher == "ray" else []
            with running(phalanx(model, tp_size, dtype, free_port(), log, *options)) as server:
                click.echo(f"--standby {standby}: ready to serve after {await_serving(server.url):.1f} s")
                num_bad += measure(
                    server, kinds, num_streams, num_tokens, num_faults, has_standby=bool(standby), seed=seed + standby
                )
        if peer_python is not None:
            with running(vllm(peer_python, model, tp_size, "float32", free_port(), Path(folder) / "vllm")) as server:
                click.echo(f"vLLM: ready to serve after {await_serving(server.url):.1f} s")
                measure_peer(server, num_streams, num_tokens, tp_size)
    sys.exit(1 if num_bad else 0)


if __name__ == "__main__":
    main()
