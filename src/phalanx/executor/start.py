"""From a configuration to workers that are ready to step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import msgspec

from phalanx.collectives.rendezvous import Rendezvous, open_rendezvous
from phalanx.collectives.spec import Backend, GroupSpec, pick_backend
from phalanx.config import Config
from phalanx.errors import ConfigError
from phalanx.executor.channel import Channel
from phalanx.executor.executor import Executor, OnProgress
from phalanx.executor.inline import InlineRank
from phalanx.executor.launcher import Launcher
from phalanx.executor.local import LocalLauncher
from phalanx.executor.platform import pick_device, pick_threads, thread_environment
from phalanx.models.checkpoint import Checkpoint
from phalanx.protocol import FIRST_EPOCH, AllocateCache, Call, Loaded, Measured, MeasureMemory, Progress, WorkerMessage
from phalanx.transport.queue import MessageQueue, QueueHandle
from phalanx.worker.spec import WorkerSpec

COLLECTIVE_TIMEOUT_SHARE = 0.75
"""Of a step's: ranks that wait for a peer give up, and say for which, before the brain, which knows of no peers."""


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What a started executor can hold."""

    num_blocks: int
    block_size: int
    max_model_len: int
    world_size: int
    weight_bytes: tuple[int, ...]
    """Of each rank."""
    block_bytes: tuple[int, ...]
    """Of one KV cache block on each rank."""
    device: str
    dtype: str


def start_executor(config: Config, checkpoint: Checkpoint, on_progress: OnProgress) -> tuple[Executor, Capacity]:
    """Start the workers, load the model into them and allocate the KV cache. Blocks until they are ready to step.

    Raises ConfigError or another UserError for the user's mistakes, StartError, WorkerError, PeerDiedError or
    DeadlineError naming the rank that failed. Nothing is left behind when it raises.
    """
    config = _settle(config, checkpoint)
    with ExitStack() as stack:
        executor = stack.enter_context(_launch(config, checkpoint, on_progress))
        loaded = executor.await_loaded(on_progress, config.executor.start_timeout_s)
        capacity = _allocate(executor, config, checkpoint, loaded)
        stack.pop_all()
        return executor, capacity


def _settle(config: Config, checkpoint: Checkpoint) -> Config:
    """Replace what is `auto` in the model and executor sections."""
    limit = checkpoint.max_model_len
    if config.model.max_model_len is not None and config.model.max_model_len > limit:
        raise ConfigError("max_model_len", config.model.max_model_len, f"this model goes up to {limit}")
    dtype = checkpoint.dtype if config.model.dtype == "auto" else config.model.dtype
    launcher = config.executor.launcher
    if launcher == "auto":
        launcher = "inline" if config.parallel.world_size == 1 else "local"
    settled = msgspec.structs.replace(
        config,
        model=msgspec.structs.replace(config.model, dtype=dtype),
        executor=msgspec.structs.replace(config.executor, device=pick_device(config), launcher=launcher),
    )
    settled.check()
    return settled


def _launch(config: Config, checkpoint: Checkpoint, on_progress: OnProgress) -> Executor:
    """Set the workers off, over the launcher and the channel that the configuration names."""
    world_size, threads = config.parallel.world_size, pick_threads(config)
    environment = thread_environment(threads)
    with ExitStack() as stack:
        group = stack.enter_context(_rendezvous(config)).spec
        launcher: Launcher
        channel: Channel
        if config.executor.launcher == "inline":
            launcher = channel = InlineRank(environment, threads, partial(_report_inline, on_progress))
            specs = _specs(config, checkpoint, group, [None])
        else:
            launcher = local = LocalLauncher(environment)
            stack.callback(local.close, 0.0)
            local.warm(str(checkpoint.path))
            queue: MessageQueue[Call, WorkerMessage] = MessageQueue.create(
                [f"rank {rank}" for rank in range(world_size)], command_type=Call, reply_type=WorkerMessage
            )
            channel = stack.enter_context(queue)
            specs = _specs(config, checkpoint, group, [queue.handle(rank) for rank in range(world_size)])
        launcher.start(specs)
        return Executor(launcher, channel, world_size, config.executor.step_timeout_s, resources=stack.pop_all())


def _rendezvous(config: Config) -> Rendezvous:
    world_size, asked = config.parallel.world_size, config.executor.collective_backend
    backend: Backend
    if asked == "auto" or world_size == 1:
        backend = pick_backend(config.executor.device, world_size, one_host=True)
    else:
        backend = asked
    timeout_s = config.executor.step_timeout_s * COLLECTIVE_TIMEOUT_SHARE
    return open_rendezvous("tp", backend, world_size, epoch=FIRST_EPOCH, timeout_s=timeout_s)


def _report_inline(on_progress: OnProgress, progress: Progress) -> None:
    on_progress(0, progress.phase, progress.done, progress.total)


def _specs(
    config: Config, checkpoint: Checkpoint, group: GroupSpec, queues: Sequence[QueueHandle | None]
) -> list[WorkerSpec]:
    return [
        WorkerSpec(
            rank=rank,
            local_rank=rank,
            ranks_on_host=len(queues),
            device=config.executor.device,
            config=config,
            checkpoint=str(checkpoint.path),
            epoch=FIRST_EPOCH,
            group=group,
            queue=queue,
        )
        for rank, queue in enumerate(queues)
    ]


def _allocate(executor: Executor, config: Config, checkpoint: Checkpoint, loaded: Sequence[Loaded]) -> Capacity:
    """Give every rank as many KV cache blocks as the one with the least room can hold."""
    deadline_s, block_size = config.executor.start_timeout_s, config.cache.block_size
    measured = [
        reply
        for reply in executor.submit(MeasureMemory(), deadline_s=deadline_s).result()
        if isinstance(reply, Measured)
    ]
    num_blocks = max(min(rank.cache_bytes // rank.block_bytes for rank in measured), 0)
    max_model_len = _fit_model_len(config, checkpoint, num_blocks, measured[0].block_bytes)
    executor.submit(AllocateCache(num_blocks, max_model_len), deadline_s=deadline_s).result()
    return Capacity(
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=max_model_len,
        world_size=executor.world_size,
        weight_bytes=tuple(rank.weight_bytes for rank in loaded),
        block_bytes=tuple(rank.block_bytes for rank in measured),
        device=loaded[0].device,
        dtype=loaded[0].dtype,
    )


def _fit_model_len(config: Config, checkpoint: Checkpoint, num_blocks: int, block_bytes: int) -> int:
    """The length limit: the one asked for, or the model's own, shortened to what the cache can hold.

    Raises ConfigError when the cache cannot hold one request of the length that was asked for.
    """
    room = num_blocks * config.cache.block_size
    asked = config.model.max_model_len
    if asked is not None and asked > room:
        needed = -(-asked // config.cache.block_size) * block_bytes
        raise ConfigError(
            "max_model_len",
            asked,
            f"the KV cache has room for {room} tokens; lower it, or raise kv_cache_memory to {needed} bytes or more"
            " (on a GPU, gpu_memory_utilization does too)",
        )
    if room < config.cache.block_size:
        raise ConfigError(
            "kv_cache_memory", num_blocks * block_bytes, f"it must hold at least one block of {block_bytes} bytes"
        )
    return min(asked or checkpoint.max_model_len, room)
