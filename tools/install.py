"""Make the virtual environment and install Phalanx into it. Runs with the system's Python and needs nothing else.

Usage: python3 tools/install.py VENV_DIRECTORY

On a machine without an NVIDIA GPU it takes torch's CPU build: the default build brings several gigabytes of CUDA.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
OLDEST, NEWEST = (3, 11), (3, 13)


def main() -> int:
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        found = ".".join(map(str, sys.version_info[:2]))
        print(f"Phalanx needs Python 3.11 to 3.13, this is {found}: make setup PYTHON=python3.12", file=sys.stderr)
        return 2
    target = Path(sys.argv[1])
    say(f"[1/3] virtual environment in {target}")
    python = target / "bin" / "python"
    if not is_complete(python):  # a process that runs in it keeps it from being made anew
        venv.create(target, with_pip=True, upgrade_deps=False)
    say(f"[2/3] {TORCH} ({'default' if has_gpu() else 'CPU'} build)")
    pip(python, TORCH, *([] if has_gpu() else cpu_index()))
    say("[3/3] phalanx and what it needs")
    pip(python, "-e", ".[dev]")
    return 0


def is_complete(python: Path) -> bool:
    """Whether an environment is there already, of the same Python and with pip."""
    asked = [python, "-c", "import pip, sys; print(*sys.version_info[:2])"]
    found = subprocess.run(asked, capture_output=True, text=True).stdout.split() if python.exists() else []
    return found == [str(number) for number in sys.version_info[:2]]


def has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()


def cpu_index() -> list[str]:
    """Where torch's CPU builds are; they rank above PyPI's own build of the same version."""
    try:
        urllib.request.urlopen(f"{CPU_BUILDS}/torch/", timeout=10).close()
    except OSError as error:
        say(f"      {CPU_BUILDS} cannot be reached ({error}): taking what the package index has")
        return []
    return ["--extra-index-url", CPU_BUILDS]


def pip(python: Path, *arguments: str) -> None:
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--retries", "1", *arguments]
    if not sys.stdout.isatty():
        command += ["--progress-bar", "off", "--quiet"]
    subprocess.run(command, check=True)


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        print(f"failed: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        sys.exit(error.returncode)
