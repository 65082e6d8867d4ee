"""`phalanx serve --launcher ray` on the head of a cluster, and a client beside it."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from ray_cluster import RayCluster

_READY_WITHIN_S = 90.0
_ANSWER_WITHIN_S = 120.0
_SAID_WITHIN_S = 10.0


class ClusterServer:
    """One server. Ends with the `with` block, by SIGKILL if it still runs."""

    def __init__(self, cluster: RayCluster, checkpoint: Path, log: Path, *flags: str, port: int = 8000) -> None:
        self._host = cluster.head
        self._log = log
        command = [sys.executable, "-m", "phalanx", "serve", str(checkpoint), "--port", str(port), "--device", "cpu"]
        command += ["--launcher", "ray", "--ray-address", cluster.address]
        command += ["--max-num-seqs", "8", "--kv-cache-memory", "16MiB", "--threads-per-rank", "1"]
        command += ["--engine-restarts", "0", *flags]
        with log.open("wb") as sink:
            self.process = self._host.start(*command, env=cluster.environment, stdout=sink, stderr=sink)
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=_ANSWER_WITHIN_S)

    @property
    def log(self) -> str:
        """What it has printed until now."""
        return self._log.read_text()

    def await_ready(self) -> None:
        self._await(self._is_ready, "ready")

    def await_place(self) -> None:
        """Wait until all ranks have one: what others start now finds the rest."""
        self._await(lambda: "rank 0 is on " in self.log, "placed")

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        expires_at = time.monotonic() + _READY_WITHIN_S
        while not condition():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < expires_at, f"not {what} after {_READY_WITHIN_S} s: {self.log}"
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError), self._host.network():
            return self._client.get("/health").status_code == 200
        return False

    def await_log(self, text: str) -> None:
        """Wait until it has printed this."""
        expires_at = time.monotonic() + _SAID_WITHIN_S
        while text not in self.log:
            assert time.monotonic() < expires_at, self.log
            time.sleep(0.02)

    def metrics(self) -> str:
        with self._host.network():
            return self._client.get("/metrics").text

    def scale(self) -> dict[str, Any]:
        """Its replicas, and what is missing."""
        with self._host.network():
            return dict(self._client.get("/scale").json())

    def change(self, path: str, **asked: Any) -> httpx.Response:
        """Ask for another size, or for a node to be drained; returns when it has begun."""
        with self._host.network():
            return self._client.post(path, json=asked)

    def await_change(self) -> dict[str, Any]:
        """Wait for the end of what was begun, and tell how it ended."""
        expires_at = time.monotonic() + _READY_WITHIN_S
        while (last := self.scale()["resize"])["state"] == "running":
            assert time.monotonic() < expires_at, self.log
            time.sleep(0.05)
        return dict(last)

    def node_of(self, rank: int) -> str:
        """The name of the node that a rank runs on, by now."""
        found = re.findall(rf"rank {rank} is on (\w+)", self.log)
        assert found, self.log
        return str(found[-1])

    def complete(self, prompt: list[int], max_tokens: int) -> list[str]:
        """Greedy tokens, as the API names them."""
        with self._host.network():
            answer = self._client.post("/v1/completions", json=_asked(prompt, max_tokens))
        assert answer.status_code == 200, f"{answer.text}\n{self.log}"
        return list(answer.json()["choices"][0]["logprobs"]["tokens"])

    @contextlib.contextmanager
    def stream(self, prompt: list[int], max_tokens: int) -> Iterator[Iterator[dict[str, Any]]]:
        """The events of a stream, decoded."""
        body = {**_asked(prompt, max_tokens), "stream": True}
        with self._host.network():
            streaming = self._client.stream("POST", "/v1/completions", json=body)
            response = streaming.__enter__()
        try:
            yield (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {"))
        finally:
            streaming.__exit__(None, None, None)

    def stop(self) -> int:
        """End it in good order; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def __enter__(self) -> ClusterServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self.process.end()


def _asked(prompt: list[int], max_tokens: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, "logprobs": 0}
