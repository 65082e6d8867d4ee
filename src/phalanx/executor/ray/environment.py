"""What of the driver's environment goes to the workers, and the environment that Ray makes for them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from phalanx.config import ClusterConfig

PREFIXES = ("PHALANX_", "NCCL_", "GLOO_", "UCX_", "HF_", "HUGGING_FACE_", "TRANSFORMERS_", "TORCH_", "TRITON_")

NOT_FOR_WORKERS = frozenset(
    {
        "PHALANX_API_KEY",  # a secret of the server's
        "NCCL_SOCKET_IFNAME",  # of one host: each node is told its own
        "GLOO_SOCKET_IFNAME",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",  # may turn off the watchdog that ends ranks whose peers do not come
        "NCCL_ASYNC_ERROR_HANDLING",  # its old name
    }
)

_NSIGHT = {
    "t": "cuda,cudnn,cublas",
    "o": "'worker_process_%p'",
    "cuda-graph-trace": "node",
    "trace-fork-before-exec": "true",  # ranks are forked, and execute nothing else
}


def environment_for_workers(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that workers get, unless their node has set them itself."""
    return {
        name: value for name, value in environment.items() if name.startswith(PREFIXES) and name not in NOT_FOR_WORKERS
    }


def runtime_env(cluster: ClusterConfig) -> dict[str, Any] | None:
    """Ray's runtime environment for workers; None if there is nothing in it, which saves seconds of the start."""
    merged = copy.deepcopy(cluster.ray_runtime_env or {})
    if cluster.ray_workers_use_nsight:
        merged.setdefault("nsight", _NSIGHT)
    return merged or None
