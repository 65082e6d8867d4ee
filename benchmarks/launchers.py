"""`phalanx serve --launcher ray` against `--launcher local` on this host: tokens per second, and the start.

    python benchmarks/launchers.py --model MODEL [--peer-python PATH] [--tensor-parallel-size 2] [--starts 3]
        [--rounds 5]

First the starts, one at a time and in turns, from the command to the first token, and when rank 0 entered each phase:
`local`, `ray` with a Ray of its own, `ray` on a Ray that runs already, and vLLM where there is one (on one rank, where
it refuses to divide the model by as many as are asked for). Their ratios are to the median of vLLM's. Then both
launchers' servers take turns under the same load; the one whose turn it is not is idle (Ray would take a stopped node
for dead). The ratio is that of the medians. A GGUF file is converted before anything is timed, and vLLM gets the
directory.
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
from typing import NamedTuple

import click
from serving import Server, free_port, measure, phalanx, running, vllm, why_not

from phalanx.models.checkpoint import resolve

PHASE = re.compile(r"^rank 0(?: on \S+)?: (\w+)", re.MULTILINE)
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
@click.option("--starts", type=click.IntRange(1), default=3, show_default=True, help="Of each kind.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--prompt-tokens", default=128, show_default=True)
@click.option("--output-tokens", default=64, show_default=True)
def main(
    model: Path,
    peer_python: Path | None,
    tp_size: int,
    dtype: str,
    streams: str,
    starts: int,
    rounds: int,
    prompt_tokens: int,
    output_tokens: int,
) -> None:
    """Measure the Ray launcher beside the local one."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended on the way out
    directory = resolve(str(model)).path
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        case = Case(model, directory, tp_size, dtype, Path(folder))
        _compare_starts(case, peer_python, starts)
        address = stack.enter_context(running_ray(tp_size))
        local = stack.enter_context(case.started("local"))
        ray = stack.enter_context(case.started("ray", "--ray-address", address))
        click.echo(f"{prompt_tokens} tokens in, {output_tokens} out, greedy, TP {tp_size}; medians of {rounds} rounds")
        for count in map(int, streams.split(",")):
            _compare(local, ray, count, rounds, prompt_tokens, output_tokens)


class Case(NamedTuple):
    """What is served."""

    model: Path
    directory: Path
    """The model, as vLLM reads it."""
    tp_size: int
    dtype: str
    logs: Path

    @contextlib.contextmanager
    def started(self, launcher: str, *options: str, took_s: list[float] | None = None) -> Iterator[Server]:
        """A server that is ready; prints how long that took, and adds it to `took_s`."""
        log, began_at = self.logs / f"{launcher}-{time.monotonic_ns()}.log", time.monotonic()
        server = phalanx(
            self.model, self.tp_size, self.dtype, free_port(), log, "--launcher", launcher, *options, name=launcher
        )
        with running(server), _phases(log, began_at) as phases:
            ready_s = server.await_ready()
            steps = ", ".join(f"{phase} at {at_s:.1f}" for phase, at_s in phases.items())
            click.echo(f"{' '.join([launcher, *options])}: command to first token {ready_s:.1f} s ({steps})")
            if took_s is not None:
                took_s.append(ready_s)
            yield server

    def start_peer(self, python: Path, tp_size: int) -> float:
        """Seconds from vLLM's command to its first token."""
        log = self.logs / f"vllm-{time.monotonic_ns()}.log"
        with running(vllm(python, self.directory, tp_size, self.dtype, free_port(), log)) as peer:
            ready_s = peer.await_ready()
        click.echo(f"vllm on {tp_size}: command to first token {ready_s:.1f} s")
        return ready_s


def _compare_starts(case: Case, peer_python: Path | None, starts: int) -> None:
    """Start everything in turns, `starts` times, and print the medians."""
    peers_size = None if peer_python is None or not peer_python.exists() else _peers_size(case, peer_python)
    took_s: dict[str, list[float]] = {"local": [], "ray that runs": [], "ray of its own": [], "vllm": []}
    for _ in range(starts):
        with case.started("local", took_s=took_s["local"]):
            pass
        with case.started("ray", "--ray-address", "local", took_s=took_s["ray of its own"]):
            pass
        with (
            running_ray(case.tp_size) as address,
            case.started("ray", "--ray-address", address, took_s=took_s["ray that runs"]),
        ):
            pass
        if peer_python is not None and peers_size is not None:
            took_s["vllm"].append(case.start_peer(peer_python, peers_size))
    for name, all_s in took_s.items():
        if all_s:
            median_s = statistics.median(all_s)
            ratio = f"  ratio {median_s / statistics.median(took_s['vllm']):.2f}" if took_s["vllm"] else ""
            click.echo(f"start {name:14} median of {len(all_s)}: {median_s:5.1f} s{ratio}")


def _peers_size(case: Case, python: Path) -> int | None:
    """How many ranks vLLM runs the model on: as many as are asked for, or one, or none."""
    for tp_size in sorted({case.tp_size, 1}, reverse=True):
        try:
            case.start_peer(python, tp_size)
        except click.ClickException as error:
            click.echo(f"vllm does not start on {tp_size}: {why_not(error)}")
        else:
            return tp_size
    return None


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
