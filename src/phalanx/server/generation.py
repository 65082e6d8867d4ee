"""The outputs of one HTTP request: n for each of its prompts, all running at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from phalanx.engine.stream import OutputDelta
from phalanx.protocol.sampling import SamplingParams
from phalanx.server.api_error import ApiError
from phalanx.server.service import Service

Output = AsyncGenerator[OutputDelta, None]


class Generation:
    """Choice i belongs to prompt i // n. `num_*` are complete when `deltas` has ended."""

    def __init__(
        self, service: Service, prompts: Sequence[Sequence[int]], sampling: SamplingParams, num_choices: int
    ) -> None:
        """Nothing runs before `deltas` is read. Raises RequestError or EngineDeadError if the engine refuses it."""
        self._service = service
        self._num_choices = num_choices
        self._outputs = [self._output(prompt, sampling, choice) for prompt in prompts for choice in range(num_choices)]
        self.num_prompt_tokens = sum(map(len, prompts))
        self.num_output_tokens = 0
        self.num_cached_tokens = 0

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    async def deltas(self) -> AsyncGenerator[tuple[int, OutputDelta], None]:
        """(choice, delta) as they come. Closing it cancels what still runs. Raises ApiError when an output fails."""
        async with aclosing(merged(self._outputs)) as deltas:
            async for index, delta in deltas:
                if delta.finish_reason == "error":
                    raise ApiError(500, delta.error or "the engine could not finish the request", code="engine_error")
                if delta.finish_reason == "cancelled":
                    raise ApiError(503, "the engine cancelled the request", code="cancelled")
                self._count(index, delta)
                yield index, delta

    def _output(self, prompt: Sequence[int], sampling: SamplingParams, choice: int) -> Output:
        if sampling.seed is not None and choice > 0:  # the same seed would give the same output n times
            sampling = msgspec.structs.replace(sampling, seed=(sampling.seed + choice) % 2**63)
        return self._service.metrics.observe(self._service.engine.generate(prompt, sampling))

    def _count(self, index: int, delta: OutputDelta) -> None:
        self.num_output_tokens += len(delta.token_ids)
        if index % self._num_choices == 0:  # a prompt counts once, however many choices it has
            self.num_cached_tokens += delta.num_cached_tokens or 0


async def merged(sources: Sequence[Output]) -> AsyncGenerator[tuple[int, OutputDelta], None]:
    """(index of the source, item), whichever comes first. Ends with the last source, or with the first exception.

    At most one item of each source waits, so that a slow reader's unread items gather in the engine client, merged.
    """
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for item in only:
                yield 0, item
        return
    tasks = {asyncio.ensure_future(_next(source)): index for index, source in enumerate(sources)}
    try:
        while tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=tasks.__getitem__):
                index, found = tasks.pop(task), task.result()
                if found is not None:
                    tasks[asyncio.ensure_future(_next(sources[index]))] = index
                    yield index, found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(source.aclose() for source in sources))


async def _next(source: Output) -> OutputDelta | None:
    return await anext(source, None)
