"""vLLM's fused experts on a CPU. A contestant of moe_layer.py (vLLM's Python).

The second argument is a directory with a file for each dtype: weights and inputs. Each payload is a dtype and a number
of tokens. Beside each file it leaves what it made of the first input of each number of tokens, to be compared.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from contest import serve
from safetensors.torch import load_file, save_file
from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight  # type: ignore[import-not-found]
from vllm.platforms import current_platform  # type: ignore[import-not-found]


def instruction_set(dtype: torch.dtype) -> str:
    """What vLLM would take on this machine."""
    return "amx" if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else "vec"


def make_calls(path: Path) -> dict[str, Callable[[], None]]:
    tensors = load_file(path)
    gate_up, down = tensors.pop("gate_up_proj"), tensors.pop("down_proj")
    name = instruction_set(gate_up.dtype)
    gate_up, down = cpu_prepack_moe_weight(gate_up, name), cpu_prepack_moe_weight(down, name)
    sizes = sorted({int(key.split(".")[0]) for key in tensors})

    def compute(hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(hidden)
        cpu_fused_moe(out, hidden, gate_up, down, None, None, weights, indices, "silu", name)
        return out

    calls: dict[str, Callable[[], None]] = {}
    firsts = {}
    for size in sizes:
        inputs = [
            (
                tensors[f"{size}.{i}.hidden"],
                tensors[f"{size}.{i}.indices"].int(),
                tensors[f"{size}.{i}.weights"].float(),
            )
            for i in range(sum(key.startswith(f"{size}.") for key in tensors) // 3)
        ]
        firsts[str(size)] = compute(*inputs[0])
        calls[f"{path.stem} {size}"] = partial(_next, compute, itertools.cycle(inputs))
    save_file(firsts, path.with_suffix(".vllm"))
    return calls


def _next(compute: Callable[..., torch.Tensor], inputs: itertools.cycle[tuple[torch.Tensor, ...]]) -> None:
    compute(*next(inputs))


def main() -> None:
    current_platform.import_kernels()
    calls: dict[str, Callable[[], None]] = {}
    with torch.inference_mode():
        for path in sorted(Path(sys.argv[2]).glob("*.safetensors")):
            calls |= make_calls(path)
        serve(calls, [])


if __name__ == "__main__":
    main()
