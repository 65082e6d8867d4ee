"""A layer's experts on a CPU in one call: sorting, both products, gate and sum, by the threads that torch has.

The weights are those that oneDNN has packed, read where they lie. LLVM makes the instructions for this processor when
the first layer asks (expert_kernel_llvm.py); teams of torch's own OpenMP run them. docs/decisions/0027.

Shape suffixes: N tokens, K experts of a token, S this rank's experts, I inputs, O outputs, D hidden size.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger("phalanx.moe")

TILE = 64
"""Outputs that lie side by side in a packed weight."""

RUN = 32
"""Inputs come in multiples of it."""

NUM_COUNTERS = 6
CACHE_LINE = 64

_MOST_PAIRS, _MOST_ROWS = 8192, 64
"""Of a token and an expert in one call, or, if these are more, for each expert: with them grows what lies between the
products."""

_BYTES_OF_A_THREAD = 256 * 1024
"""Of weights: with fewer it is not worth waking."""

_MOST_ROWS_BESIDE_MATRIX_UNITS = 8
"""For each expert in bfloat16, if the processor has units for products of matrices (AMX), which oneDNN uses and we do
not."""


class Instructions(NamedTuple):
    """What is used of a processor."""

    lanes: Literal[8, 16]
    """Floats in a register."""

    dots: bool
    """Whether it multiplies pairs of bfloat16 and adds them up in float32."""


class Call(NamedTuple):
    """What the compiled functions are told, as 64-bit integers in this order; `at_` are addresses."""

    at_hidden: int
    """[N, D], in the type of the weights."""

    at_local: int
    """[N, K], int64: places of experts. What is not below `num_experts` is another rank's."""

    at_weights: int
    """[N, K], float32."""

    at_out: int
    """[N, D], written."""

    num_tokens: int
    top_k: int
    num_experts: int
    hidden: int
    inner: int
    at_up: int
    """[S], addresses of packed weights: first the outputs to gate by, then as many others."""

    at_down: int
    at_numbers: int
    """Room for 64-bit integers: counters, three for each expert, three for each pair."""

    at_floats: int
    """Room for floats: each pair's outputs of both products."""


class ExpertKernel:
    """Computes one layer's experts: of one size, in one type, down(silu(gate) * up)."""

    def __init__(self, hidden: int, inner: int, dtype: torch.dtype, code: _Code) -> None:
        self._hidden, self._inner, self._dtype, self._code = hidden, inner, dtype, code
        self._expert_bytes = 3 * hidden * inner * dtype.itemsize

    def suits(self, local_NK: Tensor, num_experts: int) -> bool:
        """Whether a product for each expert would not be faster."""
        most_pairs = _MOST_ROWS_BESIDE_MATRIX_UNITS * num_experts
        if self._dtype == torch.float32 or not self._code.host.has_matrix_units or local_NK.numel() <= most_pairs:
            return True
        return int((local_NK < num_experts).sum()) <= most_pairs

    def __call__(
        self,
        hidden_ND: Tensor,
        local_NK: Tensor,
        weights_NK: Tensor,
        up_S: Tensor,
        down_S: Tensor,
    ) -> Tensor:
        """What these experts add to each token: [N, D]. `up_S` and `down_S` are packed weights' addresses, int64."""
        num_tokens, top_k = local_NK.shape
        most_tokens = max(_MOST_PAIRS, _MOST_ROWS * len(up_S)) // top_k
        if num_tokens > most_tokens:
            parts = [slice(start, start + most_tokens) for start in range(0, num_tokens, most_tokens)]
            return torch.cat([self(hidden_ND[i], local_NK[i], weights_NK[i], up_S, down_S) for i in parts])
        assert hidden_ND.dtype == self._dtype
        hidden_ND, local_NK = hidden_ND.contiguous(), local_NK.long().contiguous()
        weights_NK, out_ND = weights_NK.float().contiguous(), torch.empty_like(hidden_ND)
        num_pairs = num_tokens * top_k
        at_numbers, at_floats = _room.of(
            NUM_COUNTERS * CACHE_LINE // 8 + 3 * (len(up_S) + 1 + num_pairs),
            num_pairs * (2 * self._inner + self._hidden),
        )
        call = Call(
            at_hidden=hidden_ND.data_ptr(),
            at_local=local_NK.data_ptr(),
            at_weights=weights_NK.data_ptr(),
            at_out=out_ND.data_ptr(),
            num_tokens=num_tokens,
            top_k=top_k,
            num_experts=len(up_S),
            hidden=self._hidden,
            inner=self._inner,
            at_up=up_S.data_ptr(),
            at_down=down_S.data_ptr(),
            at_numbers=at_numbers,
            at_floats=at_floats,
        )
        num_threads = min(torch.get_num_threads(), 1 + num_pairs * self._expert_bytes // _BYTES_OF_A_THREAD)
        self._code.run(call, num_threads)
        return out_ND


def find_kernel(
    hidden: int, inner: int, dtype: torch.dtype, instructions: Instructions | None = None
) -> ExpertKernel | None:
    """One for experts whose weights oneDNN packs; None if these sizes, or this machine, have none, which the log says.

    The first one of a type compiles, some 0.2 s. By default it uses all instructions that this processor has.
    """
    host = _find_host()
    if host is None:
        return None
    if dtype not in (torch.float32, torch.bfloat16):
        return say_there_is_none(f"there is no kernel for {dtype}")
    if inner % RUN or hidden % TILE:
        return say_there_is_none(f"{hidden} by {inner} are no multiples of {TILE} by {RUN}")
    if not all(_lies_in_tiles(*shape, dtype) for shape in ((2 * inner, hidden), (hidden, inner))):
        return say_there_is_none(f"oneDNN packs {hidden} by {inner} in {dtype} otherwise than the kernel reads them")
    return ExpertKernel(hidden, inner, dtype, _compile(dtype, instructions or host.instructions))


class _Host(NamedTuple):
    """The processor, and torch's OpenMP."""

    instructions: Instructions
    has_matrix_units: bool
    start_team: Any
    at_barrier: int


@functools.cache
def say_there_is_none(reason: str) -> None:
    """Once for each reason, not for each layer."""
    log.info("a mixture's experts are multiplied one by one: %s", reason)


@functools.cache
def _find_host() -> _Host | None:
    try:
        import llvmlite.binding as llvm
    except ImportError:
        return say_there_is_none("llvmlite is not installed")
    except OSError as error:
        return say_there_is_none(f"llvmlite does not work: {error}")
    features = llvm.get_host_cpu_features()
    if not (features.get("avx2") and features.get("fma")):
        return say_there_is_none("the processor has no AVX2")
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        start_team, barrier = torch_cpu.GOMP_parallel, torch_cpu.GOMP_barrier
    except (AttributeError, OSError):
        return say_there_is_none("torch has no OpenMP with GNU's interface")
    start_team.argtypes, start_team.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    at_barrier = ctypes.cast(barrier, ctypes.c_void_p).value
    assert at_barrier is not None
    instructions = Instructions(16 if features.get("avx512f") else 8, bool(features.get("avx512bf16")))
    return _Host(instructions, bool(features.get("amx-bf16")), start_team, at_barrier)


class _Code:
    """Compiled functions, and how a team runs them."""

    def __init__(self, engine: Any, host: _Host) -> None:
        self._engine = engine  # which owns the functions' memory
        self.host = host
        self._sort = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("sort"))
        self._at_compute: int = engine.get_function_address("compute")

    def run(self, call: Call, num_threads: int) -> None:
        """Takes as long as it computes. Other threads of Python run meanwhile."""
        fields = (ctypes.c_int64 * len(call))(*call)
        at_call = ctypes.addressof(fields)
        self._sort(at_call)
        self.host.start_team(self._at_compute, at_call, num_threads, 0)


@functools.cache
def _compile(dtype: torch.dtype, instructions: Instructions) -> _Code:
    import llvmlite.binding as llvm

    from phalanx.moe.expert_kernel_llvm import BARRIER, make

    host = _find_host()
    assert host is not None
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.add_symbol(BARRIER, host.at_barrier)
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    module = llvm.parse_assembly(make("bfloat16" if dtype == torch.bfloat16 else "float32", instructions))
    _optimise(module, machine)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return _Code(engine, host)


def _optimise(module: Any, machine: Any) -> None:
    """No more than this: LLVM's usual passes take twice as long as all the rest, and find nothing to do."""
    import llvmlite.binding as llvm

    passes = llvm.create_new_module_pass_manager()
    passes.add_sroa_pass()
    passes.add_instruction_combine_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))


class _Room(threading.local):
    """What the calls of a thread have in common, as they come one after the other: memory that is there already."""

    def __init__(self) -> None:
        self._numbers = torch.empty(0, dtype=torch.int64)
        self._floats = torch.empty(0, dtype=torch.float32)

    def of(self, num_numbers: int, num_floats: int) -> tuple[int, int]:
        """Where they are."""
        if len(self._numbers) < num_numbers:
            self._numbers = torch.empty(num_numbers, dtype=torch.int64)
        if len(self._floats) < num_floats:
            self._floats = torch.empty(num_floats, dtype=torch.float32)
        return self._numbers.data_ptr(), self._floats.data_ptr()


_room = _Room()


@functools.cache
def _lies_in_tiles(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights as we read them: tiles of 64 outputs, with one input after the other, or two in
    bfloat16, of all of these. Its layout is not documented, so two weights are packed that tell rows and columns.
    """
    if max(num_outputs, num_inputs) >= _NUM_DISTINCT:
        return False
    step = 4 // dtype.itemsize
    numbers = [torch.arange(num_outputs)[:, None], torch.arange(num_inputs)[None, :]]
    weights_OI = [_as_finite(number).to(dtype).expand(num_outputs, num_inputs) for number in numbers]
    return all(_is_in_tiles(weight_OI.contiguous(), step) for weight_OI in weights_OI)


_NUM_DISTINCT = 0x7F80 - 0x80


def _as_finite(number: Tensor) -> Tensor:
    """A bfloat16 for each number below _NUM_DISTINCT, which no other has: from the first normal one on."""
    return (number + 0x80).to(torch.int16).view(torch.bfloat16)


def _is_in_tiles(weight_OI: Tensor, step: int) -> bool:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
    if torch.ops.mkldnn._nbytes(packed) != weight_OI.nbytes:
        return False
    num_outputs, num_inputs = weight_OI.shape
    tiles = weight_OI.view(num_outputs // TILE, TILE, num_inputs // step, step).transpose(1, 2).contiguous()
    at_packed: int = torch.ops.mkldnn.data_ptr(packed)
    return ctypes.string_at(at_packed, tiles.nbytes) == ctypes.string_at(tiles.data_ptr(), tiles.nbytes)
