"""`phalanx serve --launcher ray` against `--launcher local` on this host: tokens per second, and the start.

    python benchmarks/launchers.py --model DIRECTORY [--peer-python PATH] [--tensor-parallel-size 2] [--rounds 5]

First the starts, one at a time, from the command to the first token, and when rank 0 entered each phase: `local`, `ray`
with a Ray of its own, `ray` on a Ray that runs already, and vLLM where there is one. Then both launchers' servers take
turns under the same load; the one whose turn it is not is idle (Ray would take a stopped node for dead). The ratio is
that of the medians.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
from serving import Server, free_port, measure, phalanx, running, vllm, why_not

PHASE = re.compile(r"rank 0(?: on \S+)?: (\w+)")
LOOK_S = 0.02
RAY_NODE = """
import sys, ray
ray.init("local", num_cpus=int(sys.argv[1]), include_dashboard=False, log_to_driver=False, logging_level="error")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--peer-python", type=click.Path(path_type=Path), help="Python of a virtual environment with vLLM.")
@click.option("--tensor-parallel-size", "tp_size", default=2, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--streams", default="1,8,32", show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--prompt-tokens", default=128, show_default=True)
@click.option("--output-tokens", default=64, show_default=True)
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
    """Measure the Ray launcher beside the local one."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended on the way out
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        logs = Path(folder)
        with serving(model, "ray", tp_size, dtype, logs, "--ray-address", "local"):
            pass
        if peer_python is not None and peer_python.exists():
            _start_vllm(peer_python, model, tp_size, dtype, logs)
        local = stack.enter_context(serving(model, "local", tp_size, dtype, logs))
        address = stack.enter_context(running_ray(tp_size))
        ray = stack.enter_context(serving(model, "ray", tp_size, dtype, logs, "--ray-address", address))
        click.echo(f"{prompt_tokens} tokens in, {output_tokens} out, greedy, TP {tp_size}; medians of {rounds} rounds")
        for count in map(int, streams.split(",")):
            _compare(local, ray, count, rounds, prompt_tokens, output_tokens)


@contextlib.contextmanager
def serving(model: Path, launcher: str, tp_size: int, dtype: str, logs: Path, *options: str) -> Iterator[Server]:
    """A server that is ready; prints how long that took."""
    log, began_at = logs / f"{launcher}.log", time.monotonic()
    server = phalanx(model, tp_size, dtype, free_port(), log, "--launcher", launcher, *options, name=launcher)
    with running(server), _phases(log, began_at) as phases:
        ready_s = server.await_ready()
        steps = ", ".join(f"{phase} at {at_s:.1f}" for phase, at_s in phases.items())
        click.echo(f"{' '.join([launcher, *options])}: command to first token {ready_s:.1f} s ({steps})")
        yield server


@contextlib.contextmanager
def _phases(log: Path, began_at: float) -> Iterator[dict[str, float]]:
    """When rank 0 entered each phase, in seconds from `began_at`, as the log tells."""
    entered: dict[str, float] = {}
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(LOOK_S):
            for phase in PHASE.findall(log.read_text(errors="replace")) if log.exists() else ():
                entered.setdefault(phase, time.monotonic() - began_at)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield entered
    finally:
        is_over.set()
        thread.join()


def _start_vllm(python: Path, model: Path, tp_size: int, dtype: str, logs: Path) -> None:
    try:
        with running(vllm(python, model, tp_size, dtype, free_port(), logs / "vllm.log")) as peer:
            click.echo(f"vllm: command to first token {peer.await_ready():.1f} s")
    except click.ClickException as error:
        click.echo(f"vllm does not start: {why_not(error)}")


@contextlib.contextmanager
def running_ray(num_cpus: int) -> Iterator[str]:
    """The address of a Ray node on this host that outlives the servers."""
    command = [sys.executable, "-c", RAY_NODE, str(num_cpus)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as node:
        assert node.stdout is not None
        address = node.stdout.readline().strip()
        if not address:
            raise click.ClickException("Ray did not start")
        yield address  # leaving closes its standard input, which ends it


def _compare(local: Server, ray: Server, streams: int, rounds: int, prompt_tokens: int, output_tokens: int) -> None:
    rates: dict[str, list[float]] = {local.name: [], ray.name: []}
    for round_ in range(rounds + 1):
        for server in (local, ray) if round_ % 2 else (ray, local):
            load = asyncio.run(
                measure(
                    server.url,
                    streams=streams,
                    requests=streams,
                    prompt_tokens=prompt_tokens,
                    output_tokens=output_tokens if round_ else 4,
                )
            )
            if round_:  # the first one warms up
                rates[server.name].append(load.tokens_per_s)
    ours, theirs = statistics.median(rates[ray.name]), statistics.median(rates[local.name])
    click.echo(f"{streams:3} streams  ray {ours:6.1f} tok/s  local {theirs:6.1f} tok/s  ratio {ours / theirs:.3f}")


if __name__ == "__main__":
    main()
