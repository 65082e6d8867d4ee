"""A whole server in front of a fake engine, for tests that send it signals. Prints its URL when it is ready."""

from __future__ import annotations

import asyncio
import os
import sys

from server_fake_engine import FakeEngine

from phalanx.config import Config, ServerConfig
from phalanx.errors import PhalanxError, UserError
from phalanx.protocol.client import StartProgress
from phalanx.server.run import OnProgress, Served, run_server


class SleepingEngine(FakeEngine):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.asleep = 1

    async def until_settled(self) -> None:
        print("running", flush=True)
        await super().until_settled()


async def start_engine(config: Config, on_progress: OnProgress) -> FakeEngine:
    on_progress(StartProgress(0, "loading weights", 1, 2))
    if config.model.model == "endless":
        print(os.environ["LISTENS_AT"], flush=True)
        await asyncio.sleep(3600)
    engine = SleepingEngine("Hello") if config.model.model == "asleep" else FakeEngine("Hello")
    engine.pauses = config.model.model in ("pausing", "dying", "waiting")
    watch = asyncio.create_task(_follow(engine, config.model.model))
    engine.watch = watch  # the loop holds tasks weakly
    return engine


async def _follow(engine: FakeEngine, model: str) -> None:
    await engine.first_token_out.wait()
    print("running", flush=True)
    if model == "dying":
        engine.die("rank 3 was killed")
    if model == "waiting":
        while not await asyncio.to_thread(sys.stdin.readline):
            pass
        engine.go.set()


def main() -> int:
    model, port, shutdown_timeout_s = sys.argv[1:]
    server = ServerConfig(port=int(port), shutdown_timeout_s=float(shutdown_timeout_s))
    os.environ["LISTENS_AT"] = f"http://127.0.0.1:{port}"
    try:
        run_server(
            Config.build(model=model), server, on_progress=lambda _: None, on_ready=announce, start_engine=start_engine
        )
    except PhalanxError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


def announce(served: Served) -> None:
    print(served.url, flush=True)


if __name__ == "__main__":
    sys.exit(main())
