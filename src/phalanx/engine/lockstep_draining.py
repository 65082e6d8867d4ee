"""Takes the ranks of replicas in lockstep off a node of the cluster, for its maintenance.

None of them can leave alone, so all are replaced, as in a resize: others start where ranks may be by now, in the same
bundles as far as these are on other nodes, and take over everything between two steps.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from phalanx.config import Config
from phalanx.engine.asked_resize import AskedResizes
from phalanx.engine.awaiting import begun
from phalanx.engine.census import Census, node_called, nodes_for_resize
from phalanx.errors import ConfigError, ResizeError, ResizeRefusedError
from phalanx.topology.placement import Node

if TYPE_CHECKING:
    from phalanx.engine.client import EngineClient

LOOK_S = 0.05
"""How often it is looked whether the engine has said so."""

log = logging.getLogger("phalanx.engine")


class LockstepDraining:
    """Of one engine. For one event loop."""

    def __init__(
        self, config: Config, client: EngineClient, resizes: AskedResizes, check_now: Callable[[], None]
    ) -> None:
        """`check_now` raises if nothing may be resized now."""
        self._has_cluster = config.executor.launcher == "ray"
        self._census = Census(config.cluster)
        self._client = client
        self._resizes = resizes
        self._check_now = check_now

    async def begin(self, node: str) -> asyncio.Task[None]:
        """As Engine.begin_drain."""
        self._check_now()
        name = (await self._find(node)).name
        self._check_now()  # finding it takes a second
        if not self._client.nodes:
            raise ResizeRefusedError("the engine has just begun and has not told yet where its ranks are")
        is_news = name not in self._avoided
        self._client.avoid((*self._others(name), name))
        try:
            moving = await self._begin_to_move(name)
            return await begun(self._see_through(name, moving, is_news=is_news))
        except BaseException:
            self._restore(name, is_news)
            raise

    async def undo(self, node: str) -> None:
        """Let ranks come to a node again. Raises RequestError, ResizeRefusedError."""
        self._check_now()
        if node in self._avoided:  # it may not be in the cluster any more
            self._client.avoid(self._others(node))
        else:
            found = await self._find(node)
            self._client.avoid(tuple(known for known in self._avoided if not found.is_called(known)))
        log.info("node %s is of use again", node)

    async def close(self) -> None:
        """Keep no process for it."""
        await self._census.close()

    async def _begin_to_move(self, name: str) -> asyncio.Task[None] | None:
        """None if no rank is there. Raises ConfigError if other nodes have no room for all."""
        if name not in self._client.nodes:
            return None
        try:
            return await self._resizes.begin(self._client.size, self._client.size, moves=True)
        except ConfigError as error:
            raise ConfigError("node", name, f"other nodes have no room for all ranks: {error.allowed}") from error

    async def _see_through(self, name: str, moving: asyncio.Task[None] | None, *, is_news: bool) -> None:
        """If it fails, or is cancelled, all is as before."""
        try:
            await (self._until_avoided(name) if moving is None else moving)
        except BaseException:
            self._restore(name, is_news)
            raise
        log.info("node %s is drained: no rank is there any more", name)

    async def _until_avoided(self, name: str) -> None:
        """Wait until the engine says that no rank is there, nor comes: some that are just being healed may have got
        places before it was told. Raises ResizeError if they have, and if that is undone meanwhile."""
        while not self._client.has_left(name):
            if name not in self._avoided:
                raise ResizeError(f"ranks may come to node {name} again: its drain was undone")
            if name in self._client.nodes:
                raise ResizeError(f"ranks that were being healed have just come to node {name}: drain it again")
            await asyncio.sleep(LOOK_S)

    async def _find(self, node: str) -> Node:
        """Raises RequestError, ResizeRefusedError."""
        return node_called(node, await nodes_for_resize(self._census, "CPU") if self._has_cluster else None)

    def _restore(self, name: str, is_news: bool) -> None:
        """Let ranks come there again, if they might before."""
        if is_news:
            self._client.avoid(self._others(name))

    def _others(self, name: str) -> tuple[str, ...]:
        return tuple(known for known in self._avoided if known != name)

    @property
    def _avoided(self) -> tuple[str, ...]:
        return self._client.strength.drained_nodes
