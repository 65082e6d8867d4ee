"""How large a KV cache ranks can have, and its allocation on all of them."""

from __future__ import annotations

from collections.abc import Sequence

from phalanx.config import Config
from phalanx.errors import ConfigError
from phalanx.executor.deadline import Deadline
from phalanx.executor.executor import Executor
from phalanx.executor.line_plan import ALONE, Capacity, LinePlan
from phalanx.memory.held import HeldMemory, decode_held
from phalanx.models.checkpoint import Checkpoint
from phalanx.protocol.worker import AllocateCache, Allocated, Loaded, Measured, MeasureMemory, ReplyBody


def _measure(
    executor: Executor, config: Config, checkpoint: Checkpoint, loaded: Sequence[Loaded], deadline: Deadline
) -> Capacity:
    """As many KV cache blocks for every rank as the one with the least room can hold."""
    measured = [
        reply
        for reply in executor.submit(MeasureMemory(), deadline_s=deadline.remaining_s).result()
        if isinstance(reply, Measured)
    ]
    num_padding = max(rank.num_padding for rank in measured)
    num_blocks = max(min(rank.cache_bytes // rank.block_bytes for rank in measured) - num_padding, 0)
    block_bytes = max(rank.block_bytes for rank in measured)
    return Capacity(
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        max_model_len=fit_model_len(config, checkpoint, num_blocks, block_bytes, num_padding),
        world_size=executor.world_size,
        weight_bytes=tuple(rank.weight_bytes for rank in loaded),
        block_bytes=tuple(rank.block_bytes for rank in measured),
        device=loaded[0].device,
        dtype=loaded[0].dtype,
        gives_back=all(rank.gives_back for rank in loaded),
    )


def allocate_cache(
    executor: Executor,
    config: Config,
    checkpoint: Checkpoint,
    loaded: Sequence[Loaded],
    deadline: Deadline,
    line: LinePlan = ALONE,
) -> Capacity:
    """Give every rank its KV cache: as large as those of the lines before, or as it can be."""
    capacity = line.capacity
    if capacity is None:
        capacity = _measure(executor, config, checkpoint, loaded, deadline)
    elif config.executor.device == "cuda":  # ranks with GPUs find out what can be captured
        executor.submit(MeasureMemory(sizes_cache=False), deadline_s=deadline.remaining_s).result()
    # What an extension has put into the model meanwhile is to be in all graphs or in none.
    captures_later = line.is_awaited and config.executor.worker_extension_cls is None
    order = AllocateCache(capacity.num_blocks, capacity.max_model_len, captures_later)
    replies = executor.submit(order, deadline_s=deadline.remaining_s).result()
    if line.tell_memory is not None:
        line.tell_memory(told_memory(replies))
    return capacity


def told_memory(replies: Sequence[ReplyBody]) -> dict[int, HeldMemory]:
    """What all ranks have, in their order, as far as it can be held."""
    told = {rank: reply.held for rank, reply in enumerate(replies) if isinstance(reply, Allocated)}
    return {rank: decode_held(held) for rank, held in told.items() if held}


def fit_model_len(
    config: Config, checkpoint: Checkpoint, num_blocks: int, block_bytes: int, num_padding: int = 0
) -> int:
    """The length limit: the one asked for, or the model's own, shortened to what the cache can hold.

    Raises ConfigError when the cache cannot hold one request of the length that was asked for, or nothing at all.
    """
    room = num_blocks * config.cache.block_size
    asked = config.model.max_model_len
    if asked is not None and asked > room:
        needed = (-(-asked // config.cache.block_size) + num_padding) * block_bytes
        raise ConfigError(
            "max_model_len",
            asked,
            f"the KV cache has room for {room} tokens; lower it, or raise kv_cache_memory to {needed} bytes or more"
            " (on a GPU, gpu_memory_utilization does too)",
        )
    if num_blocks == 0:
        raise _no_room_for_a_block(config, (1 + num_padding) * block_bytes)
    return min(asked or checkpoint.max_model_len, room)


def _no_room_for_a_block(config: Config, block_bytes: int) -> ConfigError:
    asked = config.cache.kv_cache_memory
    if asked is None and config.executor.device == "cuda":
        share = config.cache.gpu_memory_utilization
        return ConfigError(
            "gpu_memory_utilization", share, f"beside all else it must hold one block of KV cache: {block_bytes} bytes"
        )
    return ConfigError("kv_cache_memory", asked, f"it must hold at least one block of {block_bytes} bytes")
