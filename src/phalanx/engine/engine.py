"""What a server needs of a model that runs: one engine, or several as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

import msgspec

from phalanx.engine.condition import Condition
from phalanx.engine.roster import Phase
from phalanx.engine.stream import OutputDelta
from phalanx.engine.tokenizer import Tokenizer
from phalanx.ledger.status import InstanceStatus
from phalanx.protocol.client import EngineReady, EngineStats, MaintenanceOrder
from phalanx.protocol.sampling import SamplingParams

DRAIN_TIMEOUT_S = 30.0
"""So long may requests of a replica that leaves still take there, before another one takes them over."""


class ReplicaState(msgspec.Struct, frozen=True, kw_only=True):
    """One replica of an engine, or of a fleet of them."""

    replica: int
    """Its number, which it keeps as long as it is there."""
    state: Phase
    num_requests: int
    """That are submitted to it and have not ended; of a replica in lockstep those of all."""
    phase: str | None = None
    """While it starts: what one of its ranks has begun last."""
    done: int = 0
    """Of `total` bytes, if that counts any."""
    total: int = 0


class Strength(msgspec.Struct, frozen=True, kw_only=True):
    """How many replicas there are of those that are wanted."""

    wanted: int
    """As many as an operator has asked for last, at the start or by a resize."""
    num_missing: int = 0
    """Of those, replicas that were lost with their places. While a resize is under way none counts as missing."""
    missing_because: str | None = None
    """Why the last of these was lost."""
    num_lost: int = 0
    """Ever."""
    num_grown: int = 0
    """That have come back by themselves."""
    grows: bool = False
    """Whether they do: `auto_grow`."""
    drained_nodes: tuple[str, ...] = ()
    """Nodes that no rank is to come to."""


class Engine(Protocol):
    """For one event loop."""

    info: EngineReady
    tokenizer: Tokenizer
    default_sampling: SamplingParams
    """For what a request leaves open: the checkpoint's advice (generation_config.json) over our defaults."""

    @property
    def stats(self) -> EngineStats | None:
        """The latest that was heard, of each of `replicas` in their order; None before."""

    @property
    def dead(self) -> str | None:
        """Why no more requests are taken; None while they are."""

    @property
    def down(self) -> str | None:
        """Why its processes are being started again, if none serves; requests wait meanwhile."""

    @property
    def num_running(self) -> int:
        """Requests that were submitted and have not ended."""

    def conditions(self) -> Sequence[Condition]:
        """How each of its processes is that drives ranks. Takes microseconds, whatever they do."""

    def replicas(self) -> Sequence[ReplicaState]:
        """What each replica is up to: they may come and go. Takes microseconds."""

    @property
    def strength(self) -> Strength:
        """Whether all replicas are there that are wanted. Takes microseconds."""

    def statuses(self) -> Sequence[InstanceStatus]:
        """How each rank is, of those on this host. Takes milliseconds; for any thread."""

    def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> AsyncGenerator[OutputDelta, None]:
        """Output of one request, until the delta with a `finish_reason`. It is submitted when iteration begins.

        Deltas that were not read merge. Closing the iterator early, or cancelling the task that reads it, cancels the
        request. Raises RequestError at once; EngineDeadError at once or from the iterator, as soon as it is dead.
        """

    async def begin_resize(
        self,
        data_parallel_size: int | None = None,
        *,
        tensor_parallel_size: int | None = None,
        leaving: Sequence[int] = (),
        drain_timeout_s: float = DRAIN_TIMEOUT_S,
    ) -> asyncio.Task[None]:
        """Begin what `resize` does. The task ends with it; cancelling that undoes the resize.

        Raises ConfigError when capacity is missing, RequestError for replicas that do not exist or cannot be named, and
        ResizeRefusedError (ResizeUnderWayError) when something else has to end first.
        """

    async def resize(
        self,
        data_parallel_size: int | None = None,
        *,
        tensor_parallel_size: int | None = None,
        leaving: Sequence[int] = (),
        drain_timeout_s: float = DRAIN_TIMEOUT_S,
    ) -> None:
        """Have so many replicas, or so many ranks share every layer, while requests go on; what is None stays. Returns
        when they serve, or those that leave are gone.

        Replicas in `leaving` leave first. One that leaves ends its requests, for up to `drain_timeout_s`; then others
        take them over and go on with the next token. Replicas in lockstep, and ranks of another TP size, are all
        replaced at once: others are started beside them, and take over everything. Raises what `begin_resize` does,
        and ResizeError if it fails: then, and when this is cancelled, all is as before. Once those that leave have no
        requests any more, or others have taken over, it cannot be undone.
        """

    async def begin_drain(self, node: str, *, drain_timeout_s: float = DRAIN_TIMEOUT_S) -> asyncio.Task[None]:
        """Begin to take all ranks off a node of the cluster, which `node` is the name, address or id of, and have none
        come there again. The task ends when no rank is there any more; cancelling that undoes it.

        Replicas that have ranks there leave, as in `resize`, after others have started on other nodes, as far as there
        is room; else there are fewer from then on. Replicas in lockstep are all replaced, by as many. Raises
        ConfigError if none would be left, or other nodes lack room for those in lockstep, RequestError for a node that
        is not there, and as `begin_resize`.
        """

    async def undo_drain(self, node: str) -> None:
        """Let ranks come to this node again. Raises RequestError for one that is not there."""

    @property
    def asleep(self) -> int:
        """The level of its sleep, in which requests wait; 0 while it is awake."""

    async def until_settled(self) -> None:
        """Wait until it is neither `down` nor `asleep`: it serves again, or is dead."""

    async def maintain(self, order: MaintenanceOrder) -> None:
        """Replace the weights, sleep or wake; returns when that is done. Cancelling this does not undo it.

        Raises NotNowError, other UserErrors for what is wrong in the order, MaintenanceError if it fails: then all is
        as it was before.
        """

    async def close(self, grace_s: float = 0.0) -> None:
        """Wait up to `grace_s` for running requests, cancel the rest, and end all processes. May be repeated."""
