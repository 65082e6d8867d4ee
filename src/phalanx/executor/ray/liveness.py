"""Notices the end of actors: one thread that waits for their calls that last as long as they."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ray
from ray import ObjectRef

from phalanx.executor.ray.calls import Outcome, outcome

POLL_S = 0.2
"""How long a wait within Ray lasts: it must be over before Ray may be shut down."""
JOIN_DEADLINE_S = 5.0

log = logging.getLogger("phalanx.executor")


class ActorWatch:
    """Knows of each call whether it has ended and how. `close` it before Ray is shut down."""

    def __init__(self, calls: Mapping[ObjectRef[Any], str], on_end: Callable[[str, Outcome], None]) -> None:
        """`calls`: each with the name of its actor. `on_end` is told name and outcome, in the watch's thread."""
        self._calls = dict(calls)
        self._on_end = on_end
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="phalanx-actor-watch", daemon=True)
        self._thread.start()

    def wait_for(self, names: Collection[str], timeout_s: float) -> bool:
        """Whether the calls of these names have ended, at the latest after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not any(name in names for name in self._calls.values()), timeout_s)

    def close(self) -> None:
        self._is_closing = True
        self._thread.join(JOIN_DEADLINE_S)

    def _run(self) -> None:
        while self._calls and not self._is_closing:
            if not ray.is_initialized():
                self._end_all(Outcome("Ray was shut down", has_actor_ended=True))
                return
            try:
                ended, _ = ray.wait(list(self._calls), num_returns=1, timeout=POLL_S)
            except Exception as error:
                log.exception("Ray does not say any more how the workers are")
                self._end_all(Outcome(f"Ray does not say any more how it is: {error}", has_actor_ended=False))
                return
            for call in ended:
                self._end(call, outcome(call))

    def _end_all(self, end: Outcome) -> None:
        for call in list(self._calls):
            self._end(call, end)

    def _end(self, call: ObjectRef[Any], end: Outcome) -> None:
        with self._changed:
            self._on_end(self._calls.pop(call), end)
            self._changed.notify_all()
