"""What clients see of a fault: the longest gap between two tokens, per kind of fault, with and without a standby line.

    python benchmarks/heal.py [--model DIRECTORY] [--faults 20] [--tensor-parallel-size 2] [--device cpu]
                              [--launcher ray] [--peer-python PATH]
    python benchmarks/heal.py --device cuda --replicas 2 --standby 1 --kind kill --faults 50

`phalanx serve` streams to several clients at a time, some greedy and some with seeds; then one rank is killed, stopped,
raises an exception or leaves a collective out, at a random moment. The gap is the longest of any stream, and is shown
beside the longest of runs without a fault. Every stream is compared with that of such a run, token for token. With a
standby line, the next fault comes when the next one is ready, and how long that takes is told as well. Ray is one
of its own on this host.

With `--replicas` it is a mixture whose replicas share its experts, in lockstep.

With `--logs` the servers' logs are kept: they tell how long each pause was for the engine, without the client's part.

With a peer, a rank is killed under the same load in both, of the same model: how many clients hear of an error and
when, how long streams are silent, when a request that is sent after the kill is answered, whether the server ends, and
what is left of it then.
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
from serving import MODEL_NAME, START_TIMEOUT_S, Server, free_port, phalanx, running, vllm

from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.faults import Fault, Kind
from phalanx.testing.holdings import shared_files
from phalanx.testing.mailbox import Mailbox

KINDS: tuple[Kind, ...] = ("kill", "stop", "error", "skip")
REQUEST_TIMEOUT_S = 120.0
READY_WITHIN_S = 60.0
LOOK_S = 0.02
EARLIEST, LATEST = 0.1, 0.7
"""When a fault comes, as shares of the time that the streams take without one."""
PEER_AFTER_S = 0.3
PEER_SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
"""Such as both run on two ranks."""
PEER_KILLS = 2
"""It has to be started anew after each."""
HEADS = "| a rank is killed (s) | kills | streams that failed | told after | silence | answers again | ends | left |"
SERVES_AGAIN_S = 45.0
"""So long is waited for an answer after a kill."""


class Stream(NamedTuple):
    """What one client has seen."""

    text: str
    gap_s: float
    """The longest between two pieces of text."""
    error: str | None
    ended_at: float


class Killed(NamedTuple):
    """What clients and operator see of one killed rank, in seconds from the kill."""

    num_failed: int
    """Streams."""
    told_s: float
    """Until the last of those heard of it."""
    gap_s: float
    """The longest between two pieces of any stream, or to its error."""
    again_s: float | None
    """Until a request was answered that was sent after it; None if none was."""
    gone_s: float | None
    """Until the server had ended; None if it had not."""
    left: list[str]
    """Of a server that has ended."""


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
    ended_at = time.monotonic()
    return Stream(text, max(gap_s, ended_at - last if error and last else 0.0), error, ended_at)


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


def await_serving(server: Server) -> float:
    began_at, url = time.monotonic(), server.url
    while server.is_running:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=1.0).status_code == 200:
                return time.monotonic() - began_at
        if time.monotonic() - began_at > START_TIMEOUT_S:
            raise click.ClickException(f"{url} was not ready after {START_TIMEOUT_S:.0f} s")
        time.sleep(LOOK_S)
    raise click.ClickException(f"{server.name} ended before it was ready")


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


async def answered_after(server: Server, since: float) -> float | None:
    """Seconds from `since` to the answer of a request that is sent from now on; None if the server has ended."""
    body = {"model": MODEL_NAME, "prompt": [1, 2, 3], "max_tokens": 1}
    async with httpx.AsyncClient(timeout=SERVES_AGAIN_S) as client:
        while time.monotonic() - since < SERVES_AGAIN_S:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.post(f"{server.url}/v1/completions", json=body)).status_code == httpx.codes.OK:
                    return time.monotonic() - since
            if not server.is_running:
                return None
            await asyncio.sleep(LOOK_S)
    return None


async def killed(server: Server, victim: int, num_streams: int, num_tokens: int, files: set[str]) -> Killed:
    """Kill one rank while streams run. `files`: in /dev/shm, before the server was started."""
    family = server.processes()
    running_streams = asyncio.create_task(streams(server.url, num_streams, num_tokens))
    await asyncio.sleep(PEER_AFTER_S)
    os.kill(victim, signal.SIGKILL)
    since = time.monotonic()
    again_s = await answered_after(server, since)
    gone_s = None if server.is_running else time.monotonic() - since
    found = await running_streams
    left: list[str] = []
    if gone_s is not None:
        await asyncio.sleep(1.0)
        alive, others = [one for one in family if one.is_running()], sorted(shared_files() - files)
        left = [f"{len(alive)} processes"] * bool(alive) + [f"{len(others)} files in /dev/shm"] * bool(others)
        for one in alive:
            one.kill()
    failed = [one for one in found if one.error is not None]
    told_s = max((one.ended_at - since for one in failed), default=0.0)
    return Killed(len(failed), told_s, max(one.gap_s for one in found), again_s, gone_s, left)


def kills_row(name: str, num_streams: int, seen: Sequence[Killed]) -> str:
    """Markdown."""

    def longest(values: Sequence[float | None]) -> str:
        there = sorted(value for value in values if value is not None)
        return f"{statistics.median(there):.2f}, longest {there[-1]:.2f}" if there else "never"

    failed = [one for one in seen if one.num_failed]
    cells = (
        name,
        len(seen),
        f"{sum(one.num_failed for one in seen)} of {num_streams * len(seen)}",
        longest([one.told_s for one in failed]) if failed else "none",
        longest([one.gap_s for one in seen]),
        longest([one.again_s for one in seen]),
        longest([one.gone_s for one in seen]),
        ", ".join(sorted({thing for one in seen for thing in one.left})) or "nothing",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def side_by_side(
    ours: Server,
    name: str,
    num_streams: int,
    num_tokens: int,
    num_kills: int,
    dice: random.Random,
    files: set[str],
    *,
    standby: bool,
) -> str:
    """A row of the table."""
    seen = []
    for _ in range(num_kills):
        if standby:
            await_standby(ours.url)
        victim = dice.choice(sorted(ranks(ours.url).values()))
        seen.append(asyncio.run(killed(ours, victim, num_streams, num_tokens, files)))
    return kills_row(name, num_streams, seen)


def peer_killed(python: Path, model: Path, tp_size: int, num_streams: int, num_tokens: int, log: Path) -> Killed:
    """One worker of vLLM, in a server of its own."""
    files = shared_files()
    with running(vllm(python, model, tp_size, "float32", free_port(), log)) as server:
        click.echo(f"vLLM: ready to serve after {await_serving(server):.1f} s")
        asyncio.run(streams(server.url, num_streams, num_tokens))
        workers = sorted(server.processes(), key=lambda one: -one.memory_info().rss)[:tp_size]
        return asyncio.run(killed(server, workers[-1].pid, num_streams, num_tokens, files))


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
@click.option("--replicas", default=1, show_default=True, help="Of a mixture, with its experts over all ranks.")
@click.option("--standby", "standbys", multiple=True, type=click.IntRange(0, 1), default=(0, 1), show_default=True)
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
    replicas: int,
    standbys: tuple[int, ...],
    logs: Path | None,
) -> None:
    """Measure the gaps that clients see."""
    num_bad, rows, dice, files = 0, [], random.Random(seed), shared_files()
    with tempfile.TemporaryDirectory() as folder:
        family = "llama" if replicas == 1 else "qwen3_moe"
        shape = PEER_SHAPE if peer_python is not None else {}
        model, logs = model or write_checkpoint(Path(folder) / "model", family, **shape), logs or Path(folder)
        logs.mkdir(exist_ok=True)
        click.echo(f"{'longest gap of any stream (ms)':34} {'faults':>6} {'median':>9} {'p99':>9} {'longest':>9}")
        for standby in standbys:
            log = logs / f"standby{standby}.log"
            options = ["--allow-chaos", "--standby", str(standby), "--device", device, "--max-model-len", "512"]
            options += ["--max-num-seqs", "8", "--kv-cache-memory", kv_cache_memory, "--launcher", launcher]
            options += ["--ray-address", "local"] if launcher == "ray" else []
            if replicas > 1:
                options += ["--data-parallel-size", str(replicas), "--enable-expert-parallel"]
            with running(phalanx(model, tp_size, dtype, free_port(), log, *options)) as server:
                click.echo(f"--standby {standby}: ready to serve after {await_serving(server):.1f} s")
                num_bad += measure(
                    server, kinds, num_streams, num_tokens, num_faults, has_standby=bool(standby), seed=seed + standby
                )
                if peer_python is not None:
                    name = f"Phalanx, `--standby {standby}`"
                    rows.append(
                        side_by_side(
                            server, name, num_streams, num_tokens, num_faults, dice, files, standby=bool(standby)
                        )
                    )
        if peer_python is not None:
            seen = [
                peer_killed(peer_python, model, tp_size, num_streams, num_tokens, logs / f"vllm{number}.log")
                for number in range(PEER_KILLS)
            ]
            rows.append(kills_row("vLLM", num_streams, seen))
            click.echo("\n".join(["", HEADS, "|---" * 8 + "|", *rows]))
    sys.exit(1 if num_bad else 0)


if __name__ == "__main__":
    main()
