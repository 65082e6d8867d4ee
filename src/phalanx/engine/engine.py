"""What a server needs of a model that runs: one engine, or several as one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from phalanx.engine.condition import Condition
from phalanx.engine.stream import OutputDelta
from phalanx.engine.tokenizer import Tokenizer
from phalanx.ledger.status import InstanceStatus
from phalanx.protocol import EngineReady, EngineStats, SamplingParams


class Engine(Protocol):
    """For one event loop."""

    info: EngineReady
    tokenizer: Tokenizer
    default_sampling: SamplingParams
    """For what a request leaves open: the checkpoint's advice (generation_config.json) over our defaults."""

    @property
    def stats(self) -> EngineStats | None:
        """The latest that was heard; None before."""

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

    def statuses(self) -> Sequence[InstanceStatus]:
        """How each rank is, of those on this host. Takes milliseconds; for any thread."""

    def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> AsyncGenerator[OutputDelta, None]:
        """Output of one request, until the delta with a `finish_reason`. It is submitted when iteration begins.

        Deltas that were not read merge. Closing the iterator early, or cancelling the task that reads it, cancels the
        request. Raises RequestError at once; EngineDeadError at once or from the iterator, as soon as it is dead.
        """

    async def until_settled(self) -> None:
        """Wait until it is not `down`: it serves again, or is dead."""

    async def close(self, grace_s: float = 0.0) -> None:
        """Wait up to `grace_s` for running requests, cancel the rest, and end all processes. May be repeated."""
