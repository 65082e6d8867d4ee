"""What running requests have so far, computed on ranks that are to take over, while those before still serve.

Each goes as a prompt through the scheduler that the brain will go on with: so it then finds its blocks in the prefix
cache of a replica there, and has but the rest to compute.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from phalanx.engine.brain import StepExecutor
from phalanx.engine.request import Request
from phalanx.engine.scheduler import Scheduler
from phalanx.protocol.sampling import SamplingParams

FEW_TOKENS = 2
"""After a pass with no more for each request, what has come meanwhile is computed when the ranks have taken over. So it
is after one with no fewer than the one before had: it goes no faster.
"""

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
        self._num_requests = 0
        """Of the latest pass."""
        self._computed: list[int] = []
        """Tokens in each pass."""

    @property
    def is_enough(self) -> bool:
        """Whether another pass would make the pause no shorter."""
        if not self._computed:
            return False
        *before, latest = self._computed
        is_no_shorter = bool(before) and latest >= before[-1]
        return latest <= FEW_TOKENS * self._num_requests or is_no_shorter or len(self._computed) == MOST_PASSES

    def add(self, sequences: Sequence[NDArray[np.int32]]) -> None:
        """The tokens of requests, for the next pass."""
        self._num_requests = len(sequences)
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
                    is_rehearsal=True,
                )
            )

    def run(self, executor: StepExecutor) -> None:
        """Compute what is not computed yet. Blocks for as long as that takes; raises what the executor raises."""
        num_computed = 0
        while (planned := self.scheduler.plan()) is not None:
            num_computed += int(planned.num_tokens_R.sum())
            self.scheduler.commit(planned, executor.step(planned.step).result())
        assert not len(self.scheduler), "tokens are left that can never be computed"
        self._computed.append(num_computed)
