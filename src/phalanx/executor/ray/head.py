"""Ray's head while a run depends on it.

Ranks need it no more once they run, but Ray ends every process of a cluster that has lost its head for a minute, the
engine's too, and nothing is cleaned up. So the run ends before that, with an error that says why.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import Self

import ray

from phalanx.errors import ConfigError, DeadlineError
from phalanx.executor.channel import Channel
from phalanx.executor.ray.probe import LOOK_S, is_gone
from phalanx.protocol.worker import Call, WorkerMessage

RAYS_PATIENCE_S = 60
RAYS_SETTING = "RAY_gcs_rpc_server_reconnect_timeout_s"
SHARE = 0.5
"""Of Ray's own patience. A head that is restarted meanwhile, as Ray can do it, is not missed."""
NUM_LOOKS = 6
"""At a head that is gone, before the run ends: what is only measured would include time in which we were stopped."""
CHECK_S = 1.0
"""How often who waits for a message looks whether there is still a head."""


class HeadWatch:
    """Looks from time to time whether Ray's head is there, in a thread."""

    def __init__(self, address: str, patience_s: float) -> None:
        self.failure: DeadlineError | None = None
        """Set once nobody was at the head's address for `patience_s`."""
        self._address = address
        self._patience_s = patience_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="phalanx-head-watch", daemon=True)
        self._thread.start()

    @classmethod
    def of_connection(cls) -> Self:
        """Of the head of the Ray that this process is connected to. Raises ConfigError."""
        return cls(ray.get_runtime_context().gcs_address, _rays_patience_s() * SHARE)

    def check(self) -> None:
        """Raises DeadlineError naming the head if it is gone."""
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Takes as long as one look."""
        self._closing.set()
        self._thread.join(2 * LOOK_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        num_missed = 0
        while num_missed < NUM_LOOKS:
            if self._closing.wait(self._patience_s / NUM_LOOKS):
                return
            num_missed = num_missed + 1 if is_gone(self._address) else 0
        self.failure = DeadlineError("a sign of life", f"Ray's head at {self._address}", self._patience_s)


def _rays_patience_s() -> int:
    told = os.environ.get(RAYS_SETTING, str(RAYS_PATIENCE_S))
    if not told.isascii() or not told.isdigit() or not int(told):
        raise ConfigError(RAYS_SETTING, told, "a whole number of seconds, at least 1, as Ray reads it")
    return int(told)


class WatchedChannel:
    """A channel whose run ends without Ray's head."""

    def __init__(self, channel: Channel, watch: HeadWatch) -> None:
        self._channel = channel
        self._watch = watch

    def put(self, message: Call, *, deadline_s: float) -> None:
        """As Channel. Raises DeadlineError also when the head is gone, of which ranks know nothing: they got it."""
        self._channel.put(message, deadline_s=deadline_s)
        self._watch.check()

    def get(self, *, timeout_s: float | None) -> tuple[int, WorkerMessage, Sequence[memoryview]] | None:
        """As Channel. What ranks have said comes before the error of a head that is gone."""
        expires_at = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while True:
            remaining_s = max(expires_at - time.monotonic(), 0.0)
            received = self._channel.get(timeout_s=min(remaining_s, CHECK_S))
            if received is not None:
                return received
            self._watch.check()
            if remaining_s <= CHECK_S:
                return None

    def forget(self, reader: int) -> None:
        """As Channel."""
        self._channel.forget(reader)

    def close(self) -> None:
        """As Channel."""
        self._channel.close()
