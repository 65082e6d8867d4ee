"""One rank inside the brain's own process: no queue, no second process, no copy."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from phalanx.protocol import Call, Progress, Reply, WorkerMessage
from phalanx.worker.spec import WorkerSpec

if TYPE_CHECKING:
    from phalanx.worker.worker import Worker


class InlineRank:
    """Launcher and channel of a world of one. A call is carried out in the thread that makes it."""

    def __init__(self, environment: Mapping[str, str], threads: int, report: Callable[[Progress], None]) -> None:
        self._environment = environment
        self._threads = threads
        self._report = report
        self._worker: Worker | None = None
        self._messages: deque[WorkerMessage] = deque()

    def start(self, specs: Sequence[WorkerSpec]) -> None:
        """Load the model, here and now."""
        (spec,) = specs
        if "torch" not in sys.modules:
            os.environ.update(self._environment)
        import torch

        from phalanx.worker.worker import Worker

        torch.set_num_threads(self._threads)
        self._run(0, lambda: self._load(Worker(spec, self._report)))

    def exits(self) -> dict[int, str]:
        return {}

    def put(self, message: Call, *, deadline_s: float) -> None:
        assert self._worker is not None
        worker = self._worker
        self._run(message.call_id, lambda: worker.accept(message))

    def get(self, *, timeout_s: float | None) -> tuple[int, WorkerMessage, Sequence[memoryview]] | None:
        if not self._messages and self._worker is not None and self._worker.is_busy:
            worker = self._worker
            self._run(worker.call_id, lambda: self._fetch(worker, block=timeout_s != 0))
        return (0, self._messages.popleft(), ()) if self._messages else None

    def forget(self, reader: int) -> None:
        """Nothing to do: the one rank ends with this process."""

    def close(self, timeout_s: float = 0.0) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _load(self, worker: Worker) -> None:
        self._worker = worker
        self._messages.append(Reply(0, worker.load()))

    def _fetch(self, worker: Worker, *, block: bool) -> None:
        reply = worker.next_reply(block=block)
        if reply is not None:
            self._messages.append(reply)

    def _run(self, call_id: int, action: Callable[[], None]) -> None:
        # The same Failure as from another process, so that the executor has one way to fail.
        from phalanx.worker.failure import describe

        try:
            action()
        except Exception as error:
            phase = self._worker.phase if self._worker is not None else "starting"
            self._messages.append(describe(call_id, phase, error))
