"""Every figure, one script after the other: `python -m benchmarks --model PATH [--peer-python PATH]`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

HERE = Path(__file__).parent


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path), required=True, help="For the serving figures.")
@click.option("--peer-python", type=click.Path(path_type=Path), help="Python of a virtual environment with vLLM.")
def main(model: Path, peer_python: Path | None) -> None:
    """Run all benchmarks; those with a peer print a ratio when it is given."""
    peer = ["--peer-python", str(peer_python)] if peer_python else []
    for script, options in (
        ("control_plane.py", peer),
        ("relay.py", peer),
        ("all_reduce.py", []),
        ("brain.py", peer),
        ("coordination.py", []),
        ("moe_layer.py", peer),
        ("lockstep.py", ["--compare"]),
        ("lockstep.py", ["--compare", "--all2all-backend", "alltoall"]),
        ("serving.py", ["--model", str(model), *peer]),
        ("serving.py", ["--model", str(model), "--tensor-parallel-size", "2", *peer]),
        ("pipeline.py", ["--model", str(model)]),
        ("launchers.py", ["--model", str(model), *peer]),
        ("offline.py", ["--model", str(model)]),
        ("scale.py", ["--model", str(model), "--dtype", "float32"]),
    ):
        click.echo(f"\n== {script} {' '.join(options)}")
        subprocess.run([sys.executable, str(HERE / script), *options], check=True)


if __name__ == "__main__":
    main()
