"""What vLLM's data-parallel ranks do before every step, with torch alone; a contestant of coordination.py.

As `_run_ar` in `vllm/v1/worker/dp_utils.py` of 0.32 has it: each rank writes its column of a [4, ranks] int32 tensor
(tokens, padded tokens, whether to split the batch, graph mode) and all sum it over Gloo; then the columns are read.
The ranks other than the first wait in the next call: its time is that of ranks that come to it together.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from datetime import timedelta
from functools import partial
from pathlib import Path

# Threads that spin take the cores from the ranks; set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import torch
import torch.distributed as dist
from contest import num_workers, serve

TIMEOUT = timedelta(minutes=20)
NUM_TOKENS = 32


def join(store: str, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=TIMEOUT)


def agree(rank: int, size: int) -> list[int]:
    """Tokens of every rank, padded."""
    tensor = torch.zeros(4, size, dtype=torch.int32)
    tensor[0][rank] = NUM_TOKENS
    tensor[1][rank] = NUM_TOKENS
    tensor[2][rank] = 0
    tensor[3][rank] = 1
    dist.all_reduce(tensor)
    torch.all(tensor[2] == 1).item()
    tensor[3].min().item()
    padded: list[int] = tensor[1].tolist()
    return padded


def work(store: str, rank: int, size: int) -> None:
    """Take part in one call after the other, until the first rank is gone."""
    join(store, rank, size)
    while True:
        try:
            agree(rank, size)
        except RuntimeError:
            return


def main() -> None:
    size = num_workers()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        spawn = multiprocessing.get_context("spawn")
        workers = [spawn.Process(target=work, args=(store, rank, size), daemon=True) for rank in range(1, size)]
        for worker in workers:
            worker.start()
        join(store, 0, size)
        assert agree(0, size) == [NUM_TOKENS] * size
        serve({"turn": partial(_turn, size)}, [worker.pid for worker in workers if worker.pid])
        for worker in workers:
            worker.kill()
            worker.join()


def _turn(size: int) -> None:
    agree(0, size)


if __name__ == "__main__":
    main()
