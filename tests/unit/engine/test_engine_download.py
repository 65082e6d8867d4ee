"""A download that takes longer than a start may be silent: the client hears of it as long as bytes come."""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import msgspec
import pytest

import phalanx.engine.process as process
from phalanx.config import Config
from phalanx.engine.incarnation import _await_ready
from phalanx.errors import ConfigError
from phalanx.protocol.client import Begin, StartProgress
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.transport.liveness import Party
from phalanx.transport.stream import AsyncStream, Stream, stream_pair

SILENCE_S = 0.6
DOWNLOAD_S = 2 * SILENCE_S
NUM_CHUNKS = 12


@pytest.fixture
def slow_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path / "model")

    def snapshot_download(name: str, **options: Any) -> Any:
        if options["dry_run"]:
            return [SimpleNamespace(file_size=10 * NUM_CHUNKS, will_download=True)]
        if options["allow_patterns"] != ["config.json"]:
            bar = options["tqdm_class"](unit="B", total=0)
            for _ in range(NUM_CHUNKS):
                time.sleep(DOWNLOAD_S / NUM_CHUNKS)
                bar.update(10)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_the_client_waits_while_bytes_come(slow_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def start_formation(*_: object) -> None:
        raise ConfigError("model", "some/model", "this test goes no further")

    monkeypatch.setattr("phalanx.engine.core.start_formation", start_formation)
    seen: list[StartProgress] = []

    async def be_client(ours: int) -> None:
        stream = await AsyncStream.open(ours, Party("the engine", os.getpid(), start_time=0))
        await stream.send(msgspec.msgpack.encode(Begin(Config.build(model="some/model"))))
        child: Any = None  # it does not end
        try:
            await _await_ready(aiter(stream), child, seen.append, SILENCE_S)
        finally:
            await stream.close()

    ours, theirs = stream_pair()
    with ThreadPoolExecutor(1) as pool, Stream(theirs, Party.of("the server", os.getpid())) as stream:
        engine = pool.submit(process.serve, process.ClientLink(stream))
        with pytest.raises(ConfigError, match="this test goes no further"):
            asyncio.run(be_client(ours))
        engine.result(timeout=10)
    assert seen[0] == StartProgress(0, "downloading", 0, 0)
    assert seen[-1] == StartProgress(0, "downloading", 10 * NUM_CHUNKS, 10 * NUM_CHUNKS)
    assert len(seen) >= NUM_CHUNKS / 2
