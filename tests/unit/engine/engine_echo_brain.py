"""A brain without a model: answers each prompt with its own tokens, over and over."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from phalanx.protocol.client import EngineStats, ReplicaStats, Submit, TokenBatch
from phalanx.protocol.columns import as_ints, ints
from phalanx.protocol.sampling import FinishReason
from phalanx.protocol.worker import CopyBlocks


class EchoBrain:
    """Has Brain's interface. `num_generated_tokens` of its stats counts cancellations: what tests want to know."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.running: dict[int, Submit] = {}
        self.num_done: dict[int, int] = {}
        self.cancelled: list[int] = []
        self.num_steps = 0
        self.num_resets = 0
        self.rewinds: list[tuple[int, bool, str | None]] = []
        self._finished: list[tuple[int, FinishReason]] = []

    def submit(self, request: Submit) -> None:
        self.running[request.request_id] = request
        self.num_done[request.request_id] = len(as_ints(request.output_token_ids))

    def cancel(self, request_ids: tuple[int, ...]) -> None:
        for request_id in request_ids:
            if self.running.pop(request_id, None) is not None:
                self.cancelled.append(request_id)
                self._finished.append((request_id, FinishReason.CANCELLED))

    def reset_prefix_cache(self) -> None:
        self.num_resets += 1

    copies: tuple[CopyBlocks, ...] = ()

    def rewind(
        self,
        epoch: int,
        *,
        keeps_cache: bool,
        failure: str | None = None,
        is_from_outside: bool = False,
        sets_aside: bool = False,
    ) -> bool:
        self.rewinds.append((epoch, keeps_cache, failure))
        return True

    def has_work(self) -> bool:
        return bool(self.running or self._finished)

    def step(self) -> TokenBatch | None:
        self.num_steps += bool(self.running)  # else it only tells of what has ended
        time.sleep(0)  # where a real step waits for its workers
        tokens = {}
        for request_id, request in list(self.running.items()):
            prompt = as_ints(request.prompt_token_ids)
            done = self.num_done[request_id]
            tokens[request_id] = int(prompt[done % len(prompt)])
            self.num_done[request_id] = done + 1
            if done + 1 == request.sampling.max_tokens:
                self._finished.append((request_id, FinishReason.LENGTH))
                del self.running[request_id]
        finished, self._finished = self._finished, []
        request_ids = np.array(list(tokens), dtype=np.int64).tobytes()
        return TokenBatch(request_ids, ints(list(tokens.values())), finished=tuple(finished))

    def stats(self) -> EngineStats:
        return EngineStats((ReplicaStats(len(self.running), 0, 0, 10, self.num_steps, 0, 0, 0, len(self.cancelled)),))
