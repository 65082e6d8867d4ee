"""How much memory steps take besides weights and cache, found by running the largest one and making some graphs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from phalanx.config import SchedulerConfig
from phalanx.models.attention_batch import AttentionBatch
from phalanx.models.model import CausalLM
from phalanx.worker.cuda_capture import waiting_is_an_error
from phalanx.worker.decode_graphs import DecodeGraphs
from phalanx.worker.kv_cache import allocate_cache
from phalanx.worker.sampler import Sampler
from phalanx.worker.slots import SlotTable

NUM_GRAPHS_TRIED = 4
"""Made, besides the largest one, to see what one more takes."""

FEW_TOKENS = 64
"""Of a step that only has to have every kernel loaded."""


@torch.inference_mode()
def peak_activation_bytes(model: CausalLM, scheduler: SchedulerConfig, block_size: int, num_replicas: int = 1) -> int:
    """Bytes of activations in the largest step that the limits allow; 0 on a CPU, whose cache leaves room enough.

    Every rank of a stage must call it, as it runs the step's collectives. Stages do not wait for each other.
    """
    if model.device.type != "cuda":
        return 0
    num_tokens, num_rows = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
    _bind_scratch(model, -(-num_tokens // block_size), block_size)
    torch.cuda.synchronize(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    before_bytes = torch.cuda.memory_allocated(model.device)
    _compute(model, num_tokens, num_rows, block_size, num_replicas)
    torch.cuda.synchronize(model.device)
    peak_bytes = torch.cuda.max_memory_allocated(model.device) - before_bytes
    model.bind_cache([])
    torch.cuda.empty_cache()
    return peak_bytes


@torch.inference_mode()
def compute_little(model: CausalLM, scheduler: SchedulerConfig, block_size: int, num_replicas: int) -> None:
    """A step such that later ones find kernels compiled and loaded. To be called like `peak_activation_bytes`."""
    if model.device.type != "cuda":
        return
    num_tokens = min(FEW_TOKENS, scheduler.max_num_batched_tokens)
    _bind_scratch(model, -(-num_tokens // block_size), block_size)
    _compute(model, num_tokens, 1, block_size, num_replicas)
    model.bind_cache([])


def _compute(model: CausalLM, num_tokens: int, num_rows: int, block_size: int, num_replicas: int) -> None:
    """A prompt of so many tokens, and so many samples of what comes after it."""
    if model.is_first:
        inputs = torch.zeros(num_tokens, dtype=torch.int64, device=model.device)
    else:
        inputs = torch.zeros(num_tokens, model.hidden_size, dtype=model.dtype, device=model.device)
    positions_T = torch.arange(num_tokens, device=model.device)
    batch = AttentionBatch.of_one_row(num_tokens, block_size, model.device)
    hidden_TD = model.hidden_states(inputs, positions_T, batch, [num_tokens] * num_replicas)
    if model.is_last:
        _sample(model.logits(hidden_TD[torch.zeros(num_rows, dtype=torch.int64, device=model.device)]))


@torch.inference_mode()
def graph_bytes(
    model: CausalLM, new_graphs: Callable[[int], DecodeGraphs], block_size: int, *, makes_some: bool = True
) -> int:
    """Bytes that all graphs take, about, with the memory that their steps compute in.

    `new_graphs(null_block)` makes none. Unless it `makes_some` it is only seen whether they can be made, and 0 is
    given. Every rank of a stage must call it, like `peak_activation_bytes`. Raises WaitsForGpuError if the model's
    steps cannot be captured, on every rank of the stage.
    """
    _bind_scratch(model, 1, block_size)
    graphs = new_graphs(0)
    graphs.run(graphs.sizes[0])
    with waiting_is_an_error():
        graphs.run(graphs.sizes[0])
    found_bytes = _bytes_of_graphs(model, graphs) if makes_some else 0
    del graphs
    model.bind_cache([])
    torch.cuda.empty_cache()
    return found_bytes


def _bytes_of_graphs(model: CausalLM, graphs: DecodeGraphs) -> int:
    first, *others = reversed(graphs.sizes)
    sampled = others[:NUM_GRAPHS_TRIED]
    before_bytes = _free_bytes(model.device)
    graphs.capture(first)
    after_first_bytes = _free_bytes(model.device)
    for size in sampled:
        graphs.capture(size)
    after_bytes = _free_bytes(model.device)
    each_bytes = (after_first_bytes - after_bytes) / max(len(sampled), 1)
    return graphs.static_bytes + before_bytes - after_first_bytes + int(each_bytes * len(others))


def _bind_scratch(model: CausalLM, num_blocks: int, block_size: int) -> None:
    def zeros(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=model.device)

    model.bind_cache(allocate_cache(model.cache_layers, num_blocks, block_size, model.dtype, zeros))


def _free_bytes(device: torch.device) -> int:
    """Of the GPU, counting what torch keeps and does not use."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _sample(logits_RV: Tensor) -> None:
    """Choose tokens in the way that takes most: every row has a limit and asks for log-probabilities."""
    num_rows, vocab_size = logits_RV.shape
    slots = SlotTable(max_num_seqs=num_rows, max_model_len=1, block_size=1, num_blocks=1)
    slots.sampling_S["is_limited"] = True
    slots.sampling_S["temperature"] = 1.0
    slots.sampling_S["top_p"] = 0.5
    slots.sampling_S["num_logprobs"] = 1
    sampler = Sampler(slots, vocab_size, logits_RV.device)
    sampler.sample(logits_RV, np.arange(num_rows), np.zeros(num_rows, dtype=np.int64))
