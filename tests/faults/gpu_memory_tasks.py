"""Three processes and a GPU's memory: `holder` starts `fill`, kills it in the midst of kernels, and starts `take`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from phalanx.memory.held import decode_held, encode_held
from phalanx.memory.holder import Holder

NUM_TENSORS, TENSOR_BYTES = 160, 100 << 20


def holder() -> None:
    """Has no CUDA."""
    with Holder() as keeps:
        first = start("fill")
        told = decode_held(bytes.fromhex(line_of(first)))
        began_at = time.perf_counter()
        held = keeps.hold(0, told)
        took_ms = 1e3 * (time.perf_counter() - began_at)
        num_mib = sum(piece.size_bytes for piece in held.pieces) >> 20
        print(f"{len(held.pieces)} pieces, {num_mib} MiB: {took_ms:.1f} ms to hold")
        time.sleep(0.2)
        began_at = time.perf_counter()
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        print(f"its process was gone {1e3 * (time.perf_counter() - began_at):.0f} ms after SIGKILL")
        for _ in range(2):
            second = start("take", encode_held(held).hex())
            print(line_of(second))
            assert second.wait(60) == 0
    print("all right")


def start(task: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, __file__, task, *arguments], stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line, f"a process ended with {process.wait(60)}"
    return line


def fill() -> None:
    import torch

    from phalanx.memory.arena import Arena
    from phalanx.memory.cuda_driver import CudaDriver

    device = torch.device("cuda", 0)
    arena = Arena("memory of a task", device, driver=CudaDriver(0))
    arena.begin_part(NUM_TENSORS * TENSOR_BYTES)
    tensors = [arena.allocate(f"t{i}", (TENSOR_BYTES // 4,), torch.int32) for i in range(NUM_TENSORS)]
    for i, tensor in enumerate(tensors):
        tensor.copy_(torch.arange(tensor.numel(), dtype=torch.int32, device=device) + i)
    torch.cuda.synchronize()
    print(encode_held(arena.describe()).hex(), flush=True)
    while True:
        for tensor in tensors:
            tensor.bitwise_not_().bitwise_not_()


def take(message: str) -> None:
    import torch

    from phalanx.memory.arena import Arena
    from phalanx.memory.cuda_driver import CudaDriver

    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)
    torch.cuda.synchronize()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    began_at = time.perf_counter()
    arena = Arena("memory of a task", device, decode_held(bytes.fromhex(message)), driver=CudaDriver(0))
    took_ms = 1e3 * (time.perf_counter() - began_at)
    taken_bytes = free_bytes - torch.cuda.mem_get_info(device)[0]
    for i in range(NUM_TENSORS):
        tensor = arena.allocate(f"t{i}", (TENSOR_BYTES // 4,), torch.int32)
        expected = torch.arange(tensor.numel(), dtype=torch.int32, device=device) + i
        assert bool(((tensor == expected) | (tensor == ~expected)).all()), f"tensor {i} is not what it was"
        tensor.copy_(expected)
    print(f"taken over in {took_ms:.1f} ms, {taken_bytes >> 20} MiB of it anew", flush=True)


if __name__ == "__main__":
    task, *arguments = sys.argv[1:] or ["holder"]
    globals()[task](*arguments)
