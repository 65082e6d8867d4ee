"""From a configuration to workers that are ready to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from phalanx.collectives.spec import GroupSpec
from phalanx.config import Config
from phalanx.errors import ConfigError, DeadlineError
from phalanx.executor.allocation import allocate_cache
from phalanx.executor.deadline import Deadline
from phalanx.executor.executor import Executor, OnProgress
from phalanx.executor.groups import describe_group, open_group
from phalanx.executor.guarding import Guarding, with_boards
from phalanx.executor.inline import InlineRank
from phalanx.executor.journals import dump_order, watch_order, who_is_ended, with_journals
from phalanx.executor.line_plan import ALONE, Capacity, LinePlan
from phalanx.executor.local import LocalLauncher
from phalanx.executor.placed import Placed
from phalanx.executor.platform import pick_device, pick_threads, require_ray, thread_environment
from phalanx.executor.presence import open_outlets, show_instance
from phalanx.executor.watching import start_watching
from phalanx.models.checkpoint import Checkpoint
from phalanx.protocol.client import StartProgress
from phalanx.protocol.worker import FIRST_EPOCH, Call, Progress, WorkerMessage
from phalanx.topology.grid import Grid
from phalanx.topology.sharding import ExpertShare
from phalanx.transport.queue import MessageQueue, QueueHandle
from phalanx.worker.spec import WorkerSpec

if TYPE_CHECKING:
    from phalanx.executor.ray.placement import RayPlacement

NewLauncher = Callable[[Mapping[str, str]], LocalLauncher]
"""Makes the launcher of local ranks; gets the environment that they are to have."""


def start_executor(
    config: Config,
    checkpoint: Checkpoint,
    on_progress: OnProgress,
    *,
    new_launcher: NewLauncher = LocalLauncher,
    placement: RayPlacement | None = None,
    line: LinePlan = ALONE,
) -> tuple[Executor, Capacity]:
    """Start the workers, load the model into them and allocate the KV cache. Blocks until they are ready to step.

    `new_launcher` is for local ranks; `placement`, for those of Ray, where lines before this one have been, if there
    were any.

    Raises ConfigError or another UserError for the user's mistakes, StartError, WorkerError, PeerDiedError or
    DeadlineError naming the rank that failed. Nothing is left behind when it raises.
    """
    config = settle(config, checkpoint)
    deadline = Deadline(line.timeout_s or config.executor.start_timeout_s)
    with ExitStack() as stack:
        launched = _launch(config, checkpoint, on_progress, deadline, new_launcher, placement, line)
        executor = stack.enter_context(launched)
        loaded = executor.await_loaded(on_progress, deadline.remaining_s)
        capacity = allocate_cache(executor, config, checkpoint, loaded, deadline, line)
        stack.pop_all()
        return executor, capacity


def settle(config: Config, checkpoint: Checkpoint) -> Config:
    """Replace what is `auto` in the model and executor sections. Raises ConfigError for what the model cannot do.

    What is settled stays as it is.
    """
    Grid.of(config.parallel).stage_layers(checkpoint.num_layers, stage=0)
    _check_experts(config, checkpoint)
    limit = checkpoint.max_model_len
    if config.model.max_model_len is not None and config.model.max_model_len > limit:
        raise ConfigError("max_model_len", config.model.max_model_len, f"this model goes up to {limit}")
    dtype = checkpoint.dtype if config.model.dtype == "auto" else config.model.dtype
    launcher = config.executor.launcher
    if launcher == "auto":
        launcher = "inline" if config.parallel.world_size == 1 else "local"
    device = config.executor.device if launcher == "ray" else pick_device(config)  # Ray knows the nodes' devices
    # One that computes a step while it is given to it has nobody to plan the next one for meanwhile.
    is_alone = launcher == "inline" and device == "cpu"
    runs_ahead = config.scheduler.async_scheduling and not is_alone
    settled = msgspec.structs.replace(
        config,
        model=msgspec.structs.replace(config.model, dtype=dtype),
        executor=msgspec.structs.replace(config.executor, device=device, launcher=launcher),
        scheduler=msgspec.structs.replace(config.scheduler, async_scheduling=runs_ahead),
    )
    settled.check()
    if config.model.dequantise_weights and device != "cpu" and not checkpoint.has_experts_in_four_bits:
        reason = f"{checkpoint.name} has no experts in AWQ or compressed-tensors"
        settled.warn_without_effect("dequantise_weights", reason)
    return settled


def _check_experts(config: Config, checkpoint: Checkpoint) -> None:
    """Raises ConfigError: there are no experts to share out, or too few."""
    if not config.parallel.enable_expert_parallel:
        return
    if not checkpoint.num_experts:
        raise ConfigError("enable_expert_parallel", True, f"{checkpoint.name} is no mixture of experts")
    num_redundant, is_even = config.parallel.num_redundant_experts, config.parallel.enable_eplb
    size = Grid.of(config.parallel).expert_parallel_size
    ExpertShare(0, size, num_redundant, is_even).span(checkpoint.num_experts)


def _launch(
    config: Config,
    checkpoint: Checkpoint,
    on_progress: OnProgress,
    deadline: Deadline,
    new_launcher: NewLauncher,
    placement: RayPlacement | None,
    line: LinePlan,
) -> Executor:
    """Set the workers off, over the launcher and the channel that the configuration names."""
    grid = Grid.of(config.parallel)
    with ExitStack() as stack:
        if config.executor.launcher == "inline":
            report = partial(_report_inline, on_progress, deadline)
            placed = _place_inline(config, checkpoint, grid, report, line, stack)
        elif config.executor.launcher == "ray":
            if placement is None:
                placement = stack.enter_context(open_placement(config, on_progress))
            from phalanx.executor.ray.place import place_on_ray

            placed = place_on_ray(placement, checkpoint, grid, on_progress, deadline, line, stack)
        else:
            placed = _place_local(config, checkpoint, grid, new_launcher, line, stack)
        guards = config.executor.collective_guard != "off" and grid.world_size > 1
        guarding = Guarding(placed.specs, stack) if guards else None
        watched = placed.watching.order if placed.watching is not None else None
        if line.show is not None:
            line.show(watched)
        else:
            stack.enter_context(show_instance(config, watched, line.epoch))
        placed.launcher.start(placed.specs)
        return Executor(
            placed.launcher,
            placed.channel,
            grid.world_size,
            config.executor.step_timeout_s,
            output_ranks=grid.output_ranks,
            resources=stack.pop_all(),
            watching=placed.watching,
            guarding=guarding,
            nodes=placed.nodes,
        )


def _place_inline(
    config: Config,
    checkpoint: Checkpoint,
    grid: Grid,
    report: Callable[[Progress], None],
    line: LinePlan,
    resources: ExitStack,
) -> Placed:
    """The one rank in this process."""
    threads = pick_threads(config)
    rank = InlineRank(thread_environment(threads), threads, report)
    groups = _open_groups(config, grid, resources, line.epoch)
    return Placed(rank, rank, _specs(config, checkpoint, groups, [None], line))


def _place_local(
    config: Config,
    checkpoint: Checkpoint,
    grid: Grid,
    new_launcher: NewLauncher,
    line: LinePlan,
    resources: ExitStack,
) -> Placed:
    """A process for each rank, all on this host."""
    groups = _open_groups(config, grid, resources, line.epoch)
    threads = pick_threads(config)
    launcher = new_launcher(thread_environment(threads))
    resources.callback(launcher.close, 0.0)
    line.note(launcher)
    launcher.warm(str(checkpoint.path), config.executor.device)
    queue: MessageQueue[Call, WorkerMessage] = MessageQueue(
        [f"rank {rank}" for rank in range(grid.world_size)], command_type=Call, reply_type=WorkerMessage
    )
    resources.enter_context(queue)
    handles = [queue.handle(rank) for rank in range(grid.world_size)]
    # The environment is that of all lines, and they may be of different sizes.
    specs = [
        msgspec.structs.replace(spec, threads=threads) for spec in _specs(config, checkpoint, groups, handles, line)
    ]
    if config.executor.collective_guard != "off":
        specs = with_boards(specs, range(grid.world_size), resources)
    if not config.executor.ledger:
        return Placed(launcher, queue, specs)
    specs = with_journals(specs, resources)
    order = watch_order(specs, dump_order(config))
    order = msgspec.structs.replace(order, outlets=open_outlets(config, resources))
    ending_of, ends_after_s = partial(_ending_of, launcher), who_is_ended(config, line.ends_after_s)
    end_ranks = partial(_end_ranks, launcher, queue)
    watching = start_watching(order, end_ranks, ending_of, ends_after_s) if order.ranks else None
    if watching is not None:
        resources.callback(watching.close)
    return Placed(launcher, queue, specs, watching)


def _end_ranks(launcher: LocalLauncher, queue: MessageQueue[Call, WorkerMessage]) -> None:
    """For a verdict. Who waits for them hears of it at once, and not when a GPU has their memory back."""
    launcher.kill()
    queue.give_up()


def _ending_of(launcher: LocalLauncher, rank: int) -> str | None:
    return launcher.exits().get(rank)


def open_placement(
    config: Config, on_progress: OnProgress, *, beside: RayPlacement | None = None, shares: bool = True
) -> RayPlacement:
    """Room for ranks on a Ray cluster. Raises ConfigError if Ray is not installed, and as RayPlacement.

    `beside` has the ranks that they are to take over from; with `shares` they may be in the same bundles.
    """
    require_ray()
    from phalanx.executor.ray.placement import RayPlacement

    return RayPlacement(config, on_progress, beside=beside.reservation.bundles if beside else (), shares=shares)


def _open_groups(config: Config, grid: Grid, resources: ExitStack, epoch: int = FIRST_EPOCH) -> list[GroupSpec]:
    """Every group of the grid, all of whose ranks are on this host."""
    described = [describe_group(config, members, one_host=True, epoch=epoch) for members in grid.groups()]
    return [resources.enter_context(open_group(group)).spec for group in described]


def _report_inline(on_progress: OnProgress, deadline: Deadline, progress: Progress) -> None:
    """Tell where the inline rank stands, and end its start when its time is over: nobody else can interrupt it."""
    on_progress(StartProgress(0, progress.phase, progress.done, progress.total))
    if not deadline.remaining_s:
        raise DeadlineError("the end of its start", "rank 0", deadline.waited_s)


def _specs(
    config: Config,
    checkpoint: Checkpoint,
    groups: Sequence[GroupSpec],
    queues: Sequence[QueueHandle | None],
    line: LinePlan = ALONE,
) -> list[WorkerSpec]:
    return [
        WorkerSpec(
            rank=rank,
            local_rank=rank,
            ranks_on_host=len(queues),
            device=config.executor.device,
            config=config,
            checkpoint=str(checkpoint.path),
            epoch=line.epoch,
            groups=tuple(group for group in groups if rank in group.ranks),
            queue=queue,
            held=line.memory.get(rank),
            keeps_memory=line.keeps_memory,
        )
        for rank, queue in enumerate(queues)
    ]
