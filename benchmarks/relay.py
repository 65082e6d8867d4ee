"""Round trip of a call to workers on a second host and back: Phalanx's relay against vLLM's MessageQueue, over TCP.

    python benchmarks/relay.py [--peer-python PATH] [--workers 4] [--short]          (as root)

The two hosts are network namespaces of this machine, joined by a veth pair, and share its cores. Phalanx's frames are
encrypted and authenticated, vLLM's are neither. Calls and columns as in control_plane.py; "wire" is what the brain's
interface has sent and received a call. The ratios are ours to vLLM's: of the medians' times, over the rounds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from control_plane import CASES, CONTESTANTS, Case, Contestant, Figures, over_rounds

ADDRESSES = ("10.123.0.1", "10.123.0.2")


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces with ADDRESSES, joined by a cable; the first one's interface is `eth0`."""
    names = (f"phalanx-brain-{os.getpid()}", f"phalanx-node-{os.getpid()}")
    with contextlib.ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "eth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def wire_bytes(namespace: str) -> int:
    """Bytes that went through the namespace's interface, both ways."""
    (link,) = json.loads(ip("-n", namespace, "-s", "-j", "link", "show", "eth0"))
    return int(link["stats64"]["tx"]["bytes"]) + int(link["stats64"]["rx"]["bytes"])


@contextlib.contextmanager
def contest(peer_python: Path | None, num_workers: int, hosts: tuple[str, str]) -> Iterator[list[Contestant]]:
    """Ours first, then vLLM if it takes part."""
    scripts = {"phalanx": (sys.executable, "phalanx_relay.py")}
    if peer_python is not None:
        scripts["vllm"] = (str(peer_python), "vllm_remote_queue.py")
    with contextlib.ExitStack() as stack:
        contestants = []
        for name, (python, script) in scripts.items():
            command = ["ip", "netns", "exec", hosts[0], python, str(CONTESTANTS / script)]
            more = (num_workers, *ADDRESSES, f"/run/netns/{hosts[1]}")
            contestants.append(Contestant(name, command, *more))
            stack.callback(contestants[-1].close)
        yield contestants


def measure(contestant: Contestant, case: Case, namespace: str) -> tuple[Figures, float]:
    """Times, and bytes on the wire a call (the few calls of the warm-up are counted as calls)."""
    before = wire_bytes(namespace)
    figures = contestant.measure(case)
    return figures, (wire_bytes(namespace) - before) / (case.num_calls + case.num_warm_up)


def report(case: Case, rounds: list[list[tuple[Figures, float]]], num_workers: int) -> None:
    """One line: ours, vLLM's if it took part, and the ratio of the two."""
    cells = []
    for column in zip(*rounds, strict=True):
        times = over_rounds([figures for figures, _ in column])
        wire = statistics.median(wire for _, wire in column)
        cells.append(f"{times.median_us:9.1f} {times.p99_us:9.1f} {times.cores:6.2f} {wire:11.0f}")
    if len(cells) == 2:
        ratios = [ours.median_us / theirs.median_us for (ours, _), (theirs, _) in rounds]
        cells.append(f"{statistics.median(ratios):6.2f}")
    pace = f"every {case.pace_s * 1e3:.0f} ms" if case.pace_s else "at once"
    click.echo(f"{num_workers:7} {case.payload:>6} {pace:>11} " + "  ".join(cells))


@click.command()
@click.option("--peer-python", type=click.Path(path_type=Path), help="Python of a virtual environment with vLLM.")
@click.option("--workers", type=click.IntRange(1, 64), multiple=True, default=(4,), show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--short", is_flag=True, help="A tenth of the calls: to see that it works.")
def main(peer_python: Path | None, workers: tuple[int, ...], rounds: int, short: bool) -> None:
    """Measure calls to workers on a second host. Times in microseconds."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the contestants, stopped ones too, are ended
    if os.geteuid() != 0:
        click.echo("skipped: making network namespaces needs root")
        return
    if peer_python is not None and not peer_python.exists():
        click.echo(f"skipped vLLM: there is no {peer_python}")
        peer_python = None
    elif peer_python is None:
        click.echo("skipped vLLM: give --peer-python to compare")
    header = f"{'median':>9} {'p99':>9} {'cores':>6} {'wire bytes':>11}"
    click.echo(f"workers   call        calls {header}  " + (f"{header}   ratio" if peer_python else ""))
    for num_workers in workers:
        with two_hosts() as hosts, contest(peer_python, num_workers, hosts) as contestants:
            for case in CASES:
                if short:
                    case = case._replace(num_calls=max(3, case.num_calls // 10))
                figures = [[measure(contestant, case, hosts[0]) for contestant in contestants] for _ in range(rounds)]
                report(case, figures, num_workers)


if __name__ == "__main__":
    main()
