"""How much memory a step takes besides weights and cache, found by running the largest one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from phalanx.config import SchedulerConfig
from phalanx.models.attention_batch import AttentionBatch
from phalanx.models.model import CausalLM
from phalanx.worker.kv_cache import allocate_cache
from phalanx.worker.sampler import Sampler
from phalanx.worker.slots import SlotTable


@torch.inference_mode()
def peak_activation_bytes(model: CausalLM, scheduler: SchedulerConfig, block_size: int, num_replicas: int = 1) -> int:
    """Bytes of activations in the largest step that the limits allow; 0 on a CPU, whose cache leaves room enough.

    Every rank of a stage must call it, as it runs the step's collectives. Stages do not wait for each other.
    """
    if model.device.type != "cuda":
        return 0
    num_tokens, num_rows = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
    num_blocks = -(-num_tokens // block_size)

    def zeros(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=model.device)

    model.bind_cache(allocate_cache(model.cache_layers, num_blocks, block_size, model.dtype, zeros))
    torch.cuda.synchronize(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    before_bytes = torch.cuda.memory_allocated(model.device)
    if model.is_first:
        inputs = torch.zeros(num_tokens, dtype=torch.int64, device=model.device)
    else:
        inputs = torch.zeros(num_tokens, model.hidden_size, dtype=model.dtype, device=model.device)
    positions_T = torch.arange(num_tokens, device=model.device)
    batch = AttentionBatch.of_one_row(num_tokens, block_size, model.device)
    hidden_TD = model.hidden_states(inputs, positions_T, batch, [num_tokens] * num_replicas)
    if model.is_last:
        _sample(model.logits(hidden_TD[torch.zeros(num_rows, dtype=torch.int64, device=model.device)]))
    torch.cuda.synchronize(model.device)
    peak_bytes = torch.cuda.max_memory_allocated(model.device) - before_bytes
    model.bind_cache([])
    torch.cuda.empty_cache()
    return peak_bytes


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
