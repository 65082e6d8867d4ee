"""What this host offers, found out without importing torch: the brain needs the answer, and torch takes seconds."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from phalanx.config import Config
from phalanx.errors import ConfigError


def num_cores() -> int:
    """CPU cores that this process may use: its affinity, or less where a control group sets a quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):  # no such control group, or version 1 of them
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def visible_gpus() -> list[str]:
    """NVIDIA GPUs that this process may see, each as CUDA_VISIBLE_DEVICES names it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip() not in ("", "-1")]
    return [str(number) for number in range(_num_device_files())]


def _num_device_files() -> int:
    return sum(1 for entry in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", entry.name))


def torch_has_cuda() -> bool:
    """Whether the installed torch was built with CUDA."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = (Path(spec.origin).parent / "version.py").read_text()
    built_with = re.search(r"^cuda\b[^=]*=\s*(.+)$", version, re.MULTILINE)
    return built_with is not None and built_with[1].strip() != "None"


def require_ray() -> None:
    """Raises ConfigError that says what to install when Ray, which is an optional extra, is not there."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("launcher", "ray", "Ray is not installed: pip install 'phalanx[ray]'")


def pick_device(config: Config) -> str:
    """`cpu` or `cuda` for this run. Raises ConfigError when CUDA is asked for and cannot be had."""
    wanted, parallel, ranks = config.executor.device, config.parallel, config.parallel.world_size
    gpus = len(visible_gpus()) if torch_has_cuda() else 0
    if wanted == "cuda" and gpus < ranks:
        reason = f"{ranks} GPUs are needed and {gpus} can be used" + (
            "" if torch_has_cuda() else " (torch has no CUDA)"
        )
        sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
        factors = [f"{size} ({getattr(parallel, size)})" for size in sizes if getattr(parallel, size) > 1]
        advice = f"use cpu, or lower {' or '.join(factors)}" if factors else "use cpu"
        raise ConfigError("device", "cuda", f"{reason}; {advice}")
    if wanted == "auto":
        return "cuda" if gpus >= ranks and gpus > 0 else "cpu"
    return wanted


def pick_threads(config: Config) -> int:
    """CPU threads of each rank. Raises ConfigError when more are asked for than there are cores."""
    cores = num_cores()
    asked = config.executor.threads_per_rank
    if asked is None:
        return max(1, cores // config.parallel.world_size)
    if asked > cores:
        raise ConfigError("threads_per_rank", asked, f"there are {cores} cores")
    return asked


def thread_environment(threads: int) -> dict[str, str]:
    """Variables that must stand before torch is imported.

    Waiting threads must not spin: with another process on the same cores a spinning OpenMP team has been measured 47
    times slower than one that sleeps.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",  # numpy's: it would start its threads at import, before the fork server forks
        "JE_ARROW_MALLOC_CONF": "background_thread:false",  # so would pyarrow, if it is there
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
    }
