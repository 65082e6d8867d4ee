"""What the nodes of a Ray cluster have free, asked by way of a process that is there for nothing else."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, suppress

import msgspec

from phalanx.config import ClusterConfig
from phalanx.engine.child import EngineChild
from phalanx.errors import DeadlineError, PeerDiedError, StartError
from phalanx.executor.census import CensusAnswer, CensusQuestion
from phalanx.topology.placement import Node
from phalanx.transport.liveness import Party
from phalanx.transport.stream import AsyncStream

COMMAND = (sys.executable, "-m", "phalanx.executor.ray.census")
NAME = "the process that asks Ray's head what is free"
ANSWER_S = 20.0
"""It imports Ray first, and waits up to 5 s for a head that does not answer."""

_decode = msgspec.msgpack.Decoder(CensusAnswer).decode


class Census:
    """Has the process while it is asked from time to time. For one event loop, whose thread the process ends with."""

    def __init__(self, cluster: ClusterConfig, *, command: Sequence[str] = COMMAND) -> None:
        self._cluster = cluster
        self._command = command
        self._asking = asyncio.Lock()
        self._process: AsyncExitStack | None = None
        self.pid: int | None = None
        """Of the process, while there is one."""
        self._stream: AsyncStream | None = None
        self._frames: AsyncIterator[bytes] | None = None

    async def nodes(self, resource: str) -> Sequence[Node] | None:
        """The nodes that live, and what they have of `resource`; None if there is no cluster, as each engine starts a
        Ray of its own. Raises StartError if Ray cannot be asked, DeadlineError.
        """
        async with self._asking:
            try:
                async with asyncio.timeout(ANSWER_S):
                    answer = await self._ask_again(CensusQuestion(cluster=self._cluster, resource=resource))
            except TimeoutError:
                await self._end()
                raise DeadlineError("what is free", NAME, ANSWER_S) from None
            except PeerDiedError as error:
                await self._end()
                raise StartError(NAME, "asking", str(error)) from error
            except BaseException:  # an answer that nobody has read would be taken for the next one
                await self._end()
                raise
        if answer.error is not None:
            raise StartError(NAME, "asking", answer.error)
        return answer.nodes if answer.has_cluster else None

    async def close(self) -> None:
        """End the process. It may be asked again."""
        async with self._asking:
            await self._end()

    async def _ask_again(self, question: CensusQuestion) -> CensusAnswer:
        """A process that nobody asks for a while ends."""
        if self._stream is not None:
            with suppress(PeerDiedError):
                return await self._ask(question)
            await self._end()
        return await self._ask(question)

    async def _ask(self, question: CensusQuestion) -> CensusAnswer:
        if self._stream is None:
            await self._start()
        assert self._stream is not None and self._frames is not None
        await self._stream.send(msgspec.msgpack.encode(question))
        return _decode(await anext(self._frames))

    async def _start(self) -> None:
        child = EngineChild.spawn(self._command)
        self._process = process = AsyncExitStack()
        process.callback(child.kill)
        self.pid = child.pid
        self._stream = await AsyncStream.open(child.descriptor, Party(NAME, child.pid, start_time=0))
        process.push_async_callback(self._stream.close)
        self._frames = aiter(self._stream)

    async def _end(self) -> None:
        process, self._process, self._stream, self._frames = self._process, None, None, None
        self.pid = None
        if process is not None:
            await process.aclose()
