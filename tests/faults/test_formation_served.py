"""A served model whose ranks are killed: its clients notice a pause, and whoever looks sees the ranks that compute."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from phalanx.testing.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

READY_WITHIN_S = 60.0
ASKED = {"prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": True, "stream": True, "temperature": 1.0, "seed": 3}


class Served:
    """`phalanx serve` with two ranks, and two that stand ready."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.log = folder / "log"
        command = [sys.executable, "-m", "phalanx", "serve", str(write_checkpoint(folder / "llama")), "--device", "cpu"]
        command += ["--port", str(port), "-tp", "2", "--max-num-seqs", "4", "--kv-cache-memory", "4MiB"]
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen([*command, "--standby", "1"], stdout=sink, stderr=sink)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)

    def status(self) -> Any:
        return self.client.get("/status.json").json()

    def await_standby(self) -> None:
        expires_at = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < expires_at:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/health").status_code == 200 and formation(self.status())["standby"] == "ready":
                    return
            time.sleep(0.02)
        raise AssertionError(self.log.read_text())

    def stream(self) -> Iterator[str]:
        with self.client.stream("POST", "/v1/completions", json=ASKED) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    piece = json.loads(line[6:])
                    assert "error" not in piece, (piece, self.log.read_text())
                    yield piece["choices"][0]["text"]


def formation(status: Any) -> dict[str, Any]:
    return status["engines"][0]["formation"] or {"standby": None}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    try:
        served.await_standby()
        yield served
    finally:
        served.client.close()
        served.process.kill()
        served.process.wait(10)


def test_a_killed_rank_is_a_pause(served: Served) -> None:
    expected = "".join(served.stream())
    (instance,) = served.status()["instances"]
    assert instance["epoch"] == 1
    text = ""
    for number, piece in enumerate(served.stream()):
        text += piece
        if number == 20:
            os.kill(instance["ranks"][1]["pid"], signal.SIGKILL)
    assert text == expected
    served.await_standby()
    status = served.status()
    (healed,) = status["instances"]
    assert healed["epoch"] == 2 and status["health"]["status"] == "ok"
    assert formation(status)["healed"] == {"standby": 1}
    assert not {rank["pid"] for rank in healed["ranks"]} & {rank["pid"] for rank in instance["ranks"]}
    metrics = served.client.get("/metrics").text
    assert 'phalanx_healing_tries_total{engine="0",outcome="healed",rung="standby"} 1.0' in metrics
    assert 'phalanx_faults_total{engine="0"} 1.0' in metrics and 'phalanx_formation_epoch{engine="0"} 2.0' in metrics
    assert 'phalanx_ledger_ranks_watched{engine="0"} 2.0' in metrics
    assert "faults 1" in served.client.get("/status").text
    family = psutil.Process(served.process.pid).children(recursive=True)
    served.process.terminate()
    assert served.process.wait(20) == 0
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
