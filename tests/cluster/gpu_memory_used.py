"""How much of a GPU's memory is in use, by all processes."""

from __future__ import annotations

import os
import subprocess


def used_bytes(number: int = 0) -> int:
    """Of this one of those that are to be seen."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    device = str(number) if visible is None else visible.split(",")[number]
    command = ["nvidia-smi", "-i", device, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) << 20
