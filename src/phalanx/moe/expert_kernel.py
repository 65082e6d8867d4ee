"""A layer's experts on a CPU in one call: sorting, both products, gate and sum, by the threads that torch has.

The weights are the ones that oneDNN has packed, read where they lie. LLVM makes the instructions for this processor
when the first layer asks (expert_kernel_llvm.py); a team of torch's own OpenMP runs them. docs/decisions/0027.

Shape suffixes: N tokens, K experts of a token, S this rank's experts, I inputs, O outputs, D hidden size.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_log = logging.getLogger(__name__)

_TILE, _RUN = 64, 32
"""Outputs that lie side by side, and what inputs come in multiples of."""

_MOST_PAIRS = 8192
"""Of a token and an expert in one call, or 64 of each expert: room for what is between the products grows with them."""


class ExpertKernel:
    """Computes one layer's experts, which have one hidden and one inner size, one type, and silu as a gate."""

    def __init__(self, hidden: int, inner: int, dtype: torch.dtype, code: _Code) -> None:
        self._hidden, self._inner, self._dtype, self._code = hidden, inner, dtype, code

    def __call__(
        self, hidden_ND: Tensor, local_NK: Tensor, weights_NK: Tensor, at_up: NDArray[np.int64], at_down: NDArray[np.int64]
    ) -> Tensor:
        """What these experts add to each token: [N, D]. `at_` are the addresses of their packed weights: [S]."""
        num_tokens, top_k = local_NK.shape
        most_tokens = max(_MOST_PAIRS, 64 * len(at_up)) // top_k
        if num_tokens > most_tokens:
            parts = zip(*(tensor.split(most_tokens) for tensor in (hidden_ND, local_NK, weights_NK)), strict=True)
            return torch.cat([self(*part, at_up, at_down) for part in parts])
        hidden_ND, local_NK, weights_NK = hidden_ND.contiguous(), local_NK.contiguous(), weights_NK.float().contiguous()
        out_ND = torch.empty_like(hidden_ND)
        sizes = num_tokens, top_k, len(at_up), self._hidden, self._inner
        at_numbers, at_floats = _room.of(*self._code.room(*sizes))
        call = np.array(
            [
                hidden_ND.data_ptr(),
                local_NK.data_ptr(),
                weights_NK.data_ptr(),
                out_ND.data_ptr(),
                *sizes,
                at_up.ctypes.data,
                at_down.ctypes.data,
                at_numbers,
                at_floats,
            ],
            np.int64,
        )
        self._code.run(call)
        return out_ND


def find_kernel(hidden: int, inner: int, dtype: torch.dtype) -> ExpertKernel | None:
    """One for experts whose weights oneDNN has packed, if these sizes, this processor and what is installed have one.

    The first time in a process it compiles for a tenth of a second.
    """
    if dtype not in (torch.float32, torch.bfloat16) or inner % _RUN or hidden % _TILE:
        return None
    code = _compile(dtype)
    if code is None or not all(_lies_in_tiles(*shape, dtype) for shape in ((2 * inner, hidden), (hidden, inner))):
        return None
    return ExpertKernel(hidden, inner, dtype, code)


class _Room(threading.local):
    """What a thread's calls, one after the other, have in common: memory that is there already."""

    def __init__(self) -> None:
        self._numbers = torch.empty(0, dtype=torch.int64)
        self._floats = torch.empty(0, dtype=torch.float32)

    def of(self, num_numbers: int, num_floats: int) -> tuple[int, int]:
        """Addresses."""
        if len(self._numbers) < num_numbers:
            self._numbers = torch.empty(num_numbers, dtype=torch.int64)
        if len(self._floats) < num_floats:
            self._floats = torch.empty(num_floats, dtype=torch.float32)
        return self._numbers.data_ptr(), self._floats.data_ptr()


_room = _Room()


class _Code:
    """Compiled instructions."""

    def __init__(self, engine: Any, room: Callable[..., tuple[int, int]], start_team: Any) -> None:
        self._engine = engine  # which owns their memory
        self.room = room
        self._sort = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("sort"))
        self._compute = ctypes.c_void_p(engine.get_function_address("compute"))
        self._start_team = start_team

    def run(self, call: NDArray[np.int64]) -> None:
        address = ctypes.c_void_p(call.ctypes.data)
        self._sort(address)
        self._start_team(self._compute, address, torch.get_num_threads(), 0)


@functools.cache
def _compile(dtype: torch.dtype) -> _Code | None:
    """None, said once in the log, if there is something that this needs and has not."""
    try:
        import llvmlite.binding as llvm

        from phalanx.moe import expert_kernel_llvm as instructions
    except ImportError:
        _log.info("experts are computed product by product: llvmlite is not installed")
        return None
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    if not (features.get("avx2") and features.get("fma")):
        _log.info("experts are computed product by product: the processor has no AVX2")
        return None
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    try:
        start_team, barrier = torch_cpu.GOMP_parallel, torch_cpu.GOMP_barrier
    except AttributeError:
        _log.info("experts are computed product by product: torch's OpenMP is not GNU's")
        return None
    start_team.argtypes, start_team.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    llvm.add_symbol(instructions.BARRIER, ctypes.cast(barrier, ctypes.c_void_p).value)
    kind = instructions.Instructions(16 if features.get("avx512f") else 8, bool(features.get("avx512bf16")))
    module = llvm.parse_assembly(instructions.make("bfloat16" if dtype == torch.bfloat16 else "float32", kind))
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3
    )
    passes = llvm.create_new_module_pass_manager()
    passes.add_sroa_pass()
    passes.add_instruction_combine_pass()
    passes.run(module, llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options()))
    engine = llvm.create_mcjit_compiler(module, target)
    engine.finalize_object()
    return _Code(engine, instructions.room, start_team)


@functools.cache
def _lies_in_tiles(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> bool:
    """Whether oneDNN packs such a weight as the kernel reads it: for 64 outputs, all their inputs, one or two at a time."""
    step = 2 if dtype == torch.bfloat16 else 1
    places_OI = [
        torch.arange(size).view(shape).expand(num_outputs, num_inputs)
        for size, shape in ((num_outputs, (-1, 1)), (num_inputs, (1, -1)))
    ]
    return all(_is_in_tiles(_as_finite(place_OI).to(dtype), step) for place_OI in places_OI)


def _as_finite(number: Tensor) -> Tensor:
    """A bfloat16 for each, which no other has: those from the first normal number on."""
    return (number + 0x80).to(torch.int16).view(torch.bfloat16)


def _is_in_tiles(weight_OI: Tensor, step: int) -> bool:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous())
    if torch.ops.mkldnn._nbytes(packed) != weight_OI.nbytes:
        return False
    num_outputs, num_inputs = weight_OI.shape
    tiles = weight_OI.reshape(num_outputs // _TILE, _TILE, num_inputs // step, step).transpose(1, 2).contiguous()
    return ctypes.string_at(torch.ops.mkldnn.data_ptr(packed), tiles.nbytes) == ctypes.string_at(
        tiles.data_ptr(), tiles.nbytes
    )
