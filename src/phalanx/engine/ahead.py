"""What running requests have so far, computed on ranks that are to take over, while those before still serve.

Each goes as a prompt through the scheduler that the brain will go on with: so it then finds its blocks in the prefix
cache of a replica there, and has but the rest to compute.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from phalanx.engine.brain import StepExecutor
from phalanx.engine.request import Request
from phalanx.engine.scheduler import Scheduler
from phalanx.protocol import SamplingParams

ENOUGH_S = 0.5
"""After a pass that took no longer, what has come meanwhile is computed when the ranks have taken over."""

MOST_PASSES = 8
"""Requests may make tokens faster than the others compute them."""

_ONE_TOKEN = SamplingParams(temperature=0.0, max_tokens=1)
"""Which is for nobody: a request without one cannot be."""


class Ahead:
    """In passes, each over the tokens that there are by then. Belongs to one thread at a time."""

    def __init__(self, scheduler: Scheduler) -> None:
        """`scheduler` is that of the ranks that are to take over, and has no requests."""
        self.scheduler = scheduler
        self._request_ids = itertools.count()
        self._num_passes = 0
        self._took_s = float("inf")

    @property
    def is_enough(self) -> bool:
        """Whether another pass would make the pause no shorter."""
        return self._took_s <= ENOUGH_S or self._num_passes == MOST_PASSES

    def add(self, sequences: Sequence[NDArray[np.int32]]) -> None:
        """The tokens of requests, for the next pass."""
        for token_ids in sequences:
            request_id = next(self._request_ids)
            self.scheduler.add(
                Request(
                    request_id=request_id,
                    arrival=request_id,
                    token_ids=token_ids,
                    num_prompt=len(token_ids),
                    max_len=len(token_ids) + 1,
                    sampling=_ONE_TOKEN,
                    seed=0,
                    end_token_ids=(),
                )
            )

    def run(self, executor: StepExecutor) -> None:
        """Compute what is not computed yet. Blocks for as long as that takes; raises what the executor raises."""
        began_at = time.monotonic()
        while (planned := self.scheduler.plan()) is not None:
            self.scheduler.commit(planned, executor.step(planned.step).result())
        assert not len(self.scheduler), "tokens are left that can never be computed"
        self._num_passes += 1
        self._took_s = time.monotonic() - began_at
