"""A change of the engine's size as its process carries it out, between two turns of the brain."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import msgspec

from phalanx.config import Config
from phalanx.engine.ahead import Ahead
from phalanx.engine.balancing import Balancing
from phalanx.engine.brain import Brain
from phalanx.engine.scheduler import Scheduler
from phalanx.errors import UserError
from phalanx.executor.line_plan import Capacity
from phalanx.membership.formation import Formation, Resized
from phalanx.membership.resize import LineResize, Size
from phalanx.membership.resizer import NextLine
from phalanx.protocol.client import EngineMessage, EngineReady, Resize, ResizeBegun, ResizeEnded, StartProgress
from phalanx.protocol.columns import WrongSetting
from phalanx.worker.error_text import sendable

log = logging.getLogger("phalanx.engine")


def engine_ready(config: Config, capacity: Capacity) -> EngineReady:
    """What a client is told of the ranks that serve."""
    return EngineReady(
        max_model_len=capacity.max_model_len,
        num_blocks=capacity.num_blocks,
        block_size=capacity.block_size,
        world_size=capacity.world_size,
        device=capacity.device,
        dtype=capacity.dtype,
        num_replicas=config.parallel.data_parallel_size,
        tensor_parallel_size=config.parallel.tensor_parallel_size,
    )


def switch(formation: Formation, brain: Brain, scheduler: Scheduler | None = None) -> Resized:
    """Have the brain go on with the line that is ready: requests are computed again from their tokens, as far as they
    have not been under `scheduler`.
    """
    resized = formation.switch()
    config = resized.config
    brain.restructure(
        config,
        resized.epoch,
        num_blocks=resized.capacity.num_blocks,
        max_model_len=resized.capacity.max_model_len,
        balancing=Balancing(config, formation) if config.parallel.enable_eplb else None,
        scheduler=scheduler,
    )
    return resized


class EngineResizing:
    """Tells the client how the resize goes that it has asked for. It is to ask for one at a time."""

    def __init__(self, formation: Formation, brain: Brain, tell: Callable[[EngineMessage], None]) -> None:
        self._formation = formation
        self._brain = brain
        self._tell = tell
        self._number = -1
        self._resize: LineResize | None = None
        self._ahead: Ahead | None = None
        self._has_told_begin = False
        self._told: StartProgress | None = None

    @property
    def is_under_way(self) -> bool:
        return self._resize is not None

    def begin(self, asked: Resize) -> None:
        """Blocks for nobody. The client is told if it cannot be."""
        try:
            size = Size(asked.data_parallel_size, asked.tensor_parallel_size)
            resize = self._formation.begin_resize(size, self._next_pass)
        except UserError as error:
            setting = WrongSetting.of(error)
            self._tell(ResizeEnded(asked.number, "refused", sendable(str(error)), setting))
            return
        self._number, self._resize = asked.number, resize
        self._has_told_begin, self._told, self._ahead = False, None, None

    def cancel(self, number: int) -> None:
        """Undo it, if it is that which is under way."""
        if number == self._number:
            self._formation.cancel_resize()

    def follow(self) -> None:
        """Tell what is new, and switch to the new ranks when they are ready. To be called between turns."""
        resize = self._resize
        if resize is None:
            return
        self._formation.follow_resize()
        if resize.has_begun:
            self._tell_progress()
        if resize.state == "ready":
            self._switch()
            return
        self._brain.go_on()  # it may have been undone while the last step was awaited
        if resize.state == "failed":
            assert resize.error is not None
            reason = sendable(str(resize.error).partition("\n")[0] or type(resize.error).__name__)  # less the stacks
            ended = ResizeEnded(self._number, "failed" if resize.has_begun else "refused", reason)
            self._end(msgspec.structs.replace(ended, setting=WrongSetting.of(resize.error)))
        elif resize.state == "cancelled":
            self._end(ResizeEnded(self._number, "cancelled"))

    def _next_pass(self, taken: NextLine) -> Callable[[], None] | None:
        """What the new ranks are to compute before they take over, if anything."""
        sequences = self._brain.tokens_of_running()
        if not sequences or not taken.config.cache.enable_prefix_caching:
            return None
        if self._ahead is None:
            capacity = taken.capacity
            scheduler = self._brain.scheduler_for(
                taken.config,
                taken.line.epoch,
                num_blocks=capacity.num_blocks,
                max_model_len=capacity.max_model_len,
            )
            self._ahead = Ahead(scheduler)
        if self._ahead.is_enough:
            return None
        self._ahead.add(sequences)
        return partial(self._ahead.run, taken.line.executor)

    def _switch(self) -> None:
        """As soon as no step is under way: one that is dropped would be computed beside the new ranks' first one."""
        self._brain.hold()
        if not self._brain.is_between_steps:
            return
        resized = switch(self._formation, self._brain, self._ahead.scheduler if self._ahead is not None else None)
        self._brain.go_on()
        self._end(ResizeEnded(self._number, "done", ready=engine_ready(resized.config, resized.capacity)))

    def _tell_progress(self) -> None:
        if not self._has_told_begin:
            self._has_told_begin = True
            self._tell(ResizeBegun(self._number))
        told = self._formation.resize_progress
        if told is not None and told is not self._told:
            self._told = told
            self._tell(told)

    def _end(self, ended: ResizeEnded) -> None:
        self._resize = None
        self._tell(ended)
