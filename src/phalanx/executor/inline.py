"""One rank inside the brain's own process: no queue, no second process, no copy."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from phalanx.errors import DeadlineError
from phalanx.protocol.worker import Call, Progress, Reply, Step, WorkerMessage
from phalanx.worker.spec import WorkerSpec

if TYPE_CHECKING:
    from phalanx.worker.worker import Worker

POLL_S = 50e-6
"""How often a GPU is asked whether its step has ended: its own blocking wait has no deadline."""


class InlineRank:
    """Launcher and channel of a world of one. A call is carried out in the thread that makes it.

    So `put` returns only when it is done, but for a step on a GPU, which it sets going.
    """

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
        self._run(lambda: self._load(Worker(spec, self._report)))

    def exits(self) -> dict[int, str]:
        return {}

    def put(self, message: Call, *, deadline_s: float) -> None:
        assert self._worker is not None
        worker = self._worker
        if not isinstance(message.body, Step) and not self._end_steps(worker, deadline_s):
            return
        self._run(lambda: worker.accept(message))

    def get(self, *, timeout_s: float | None) -> tuple[int, WorkerMessage, Sequence[memoryview]] | None:
        expires_at = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        worker = self._worker
        while not self._messages and worker is not None and worker.is_busy:
            self._fetch(worker)
            if self._messages or time.monotonic() >= expires_at:
                break
            time.sleep(POLL_S)
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

    def _end_steps(self, worker: Worker, deadline_s: float) -> bool:
        """Wait for the steps under way, which the worker would do without a deadline. False if one has failed."""
        expires_at = time.monotonic() + deadline_s
        while worker.is_busy:
            num_messages = len(self._messages)
            if not self._fetch(worker):
                return False
            if len(self._messages) == num_messages:
                if time.monotonic() >= expires_at:
                    raise DeadlineError("the end of the steps under way", "rank 0", deadline_s)
                time.sleep(POLL_S)
        return True

    def _fetch(self, worker: Worker) -> bool:
        return self._run(lambda: self._take_reply(worker))

    def _take_reply(self, worker: Worker) -> None:
        reply = worker.next_reply(block=False)
        if reply is not None:
            self._messages.append(reply)

    def _run(self, action: Callable[[], None]) -> bool:
        """Whether it succeeded."""
        # The same Failure as from another process, so that the executor has one way to fail.
        from phalanx.worker.failure import describe

        try:
            action()
        except Exception as error:
            phase = self._worker.phase if self._worker is not None else "starting"
            self._messages.append(describe(phase, error))
            return False
        return True
