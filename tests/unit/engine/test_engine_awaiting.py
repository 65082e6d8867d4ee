"""Who is cancelled while something has just begun leaves nothing of it behind."""

from __future__ import annotations

import asyncio

from phalanx.engine.awaiting import begun


def test_what_has_begun_is_undone_when_its_beginning_is_cancelled() -> None:
    told: list[str] = []
    beginnings: list[asyncio.Task[asyncio.Task[None]]] = []

    async def work() -> None:
        told.append("begun")
        beginnings[0].cancel()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0.01)
            told.append("undone")
            raise

    async def run() -> None:
        beginning = asyncio.create_task(begun(work()))
        beginnings.append(beginning)
        await asyncio.wait((beginning,))
        told.append("cancelled" if beginning.cancelled() else "not cancelled")

    asyncio.run(run())
    assert told == ["begun", "undone", "cancelled"]
