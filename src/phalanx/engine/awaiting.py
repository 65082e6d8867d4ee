"""Tasks that may be cancelled while others wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


async def begun(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task that has begun: one that is cancelled before does nothing at all. If this is cancelled, so is the task,
    and what it has begun is undone by then."""
    task = asyncio.create_task(work)
    try:
        await asyncio.sleep(0)
    except asyncio.CancelledError:
        task.cancel()
        await end_of(task)
        raise
    return task


async def end_of(task: asyncio.Task[Any]) -> None:
    """Wait for the end of a task that was cancelled, also if this one is cancelled as well."""
    try:
        await asyncio.wait((task,))
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise
