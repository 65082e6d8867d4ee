"""What is particular to a line of ranks among others, and what it can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec

from phalanx.executor.launcher import Killable
from phalanx.executor.watching import ENDS_WITHOUT_HOPE
from phalanx.ledger.verdict import Cause
from phalanx.ledger.watch_order import WatchOrder
from phalanx.memory.held import HeldMemory
from phalanx.protocol.worker import FIRST_EPOCH

ShowOrder = Callable[[WatchOrder | None], None]


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
    gives_back: bool = True
    """Whether ranks can give their memory back in a sleep."""


class LinePlan(NamedTuple):
    """What is particular to a line among others of a formation; as it stands, one that is alone."""

    epoch: int = FIRST_EPOCH
    capacity: Capacity | None = None
    """What its KV cache is to hold; None to find out."""
    memory: Mapping[int, HeldMemory] = {}
    """What ranks find of the lines before."""
    keeps_memory: bool = False
    """Whether ranks are to make memory that lines after this one can have."""
    tell_memory: Callable[[Mapping[int, HeldMemory]], None] | None = None
    """Called, when all is allocated, with what ranks have that can be held."""
    ends_after_s: Mapping[Cause, float] = ENDS_WITHOUT_HOPE
    """How long verdicts of the ledger may stand before the ranks are killed for them."""
    show: ShowOrder | None = None
    """Called, before ranks start, with where their journals on this host are. Without it, this process shows the
    instance until the executor is closed."""
    timeout_s: float | None = None
    """For the whole start; the configuration's if None."""
    is_beside: bool = False
    """Whether another line computes on the same placement, and is not to notice anything."""
    is_awaited: bool = False
    """Whether requests wait for it: what its first steps can do without is left for later."""
    note: Callable[[Killable], None] = lambda ranks: None
    """Told, before there are any ranks, what ends them; the start then fails. Not of one in this process."""


ALONE = LinePlan()
