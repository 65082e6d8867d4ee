"""How much memory a step takes besides weights and cache, found by running the largest one."""

from __future__ import annotations

import torch

from phalanx.config import SchedulerConfig
from phalanx.models.attention_batch import AttentionBatch
from phalanx.models.model import CausalLM
from phalanx.worker.kv_cache import allocate_cache


@torch.inference_mode()
def peak_activation_bytes(model: CausalLM, scheduler: SchedulerConfig, block_size: int) -> int:
    """Bytes of activations in the largest step that the limits allow; 0 on a CPU, whose cache leaves room enough.

    Every rank of the group must call it, as it runs the step's collectives.
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
    token_ids_T = torch.zeros(num_tokens, dtype=torch.int64, device=model.device)
    positions_T = torch.arange(num_tokens, device=model.device)
    hidden_TD = model.hidden_states(
        token_ids_T, positions_T, AttentionBatch.of_one_row(num_tokens, block_size, model.device)
    )
    model.logits(hidden_TD[torch.zeros(num_rows, dtype=torch.int64, device=model.device)])
    torch.cuda.synchronize(model.device)
    peak_bytes = torch.cuda.max_memory_allocated(model.device) - before_bytes
    model.bind_cache([])
    torch.cuda.empty_cache()
    return peak_bytes
