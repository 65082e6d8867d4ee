"""When ranks exchange experts: the load is measured every so many steps, and then layer after layer evened out.

Nothing waits for it: the answers come while steps go on, and each step comes after the exchange of one layer at most.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from phalanx.config import Config
from phalanx.executor.pending import Pending
from phalanx.moe.balance import first_placement, rank_loads, rebalance
from phalanx.protocol.client import BalanceStats
from phalanx.protocol.columns import ints
from phalanx.protocol.worker import FIRST_EPOCH, CommandBody, ExpertLoads, MeasureExperts, MoveExperts, ReplyBody
from phalanx.topology.grid import Grid

Tokens = NDArray[np.int64]
"""[EP ranks, experts]: what each rank has computed for each logical expert of a layer."""

log = logging.getLogger("phalanx.engine")


class CommandExecutor(Protocol):
    """Has every rank carry out commands, in the order of the calls, between steps."""

    def submit(
        self, body: CommandBody, *, ranks: Sequence[int] | None = None, deadline_s: float
    ) -> Pending[list[ReplyBody]]: ...


class _Layer:
    """Where a layer's experts are, and what came to them."""

    def __init__(self, placement: list[int], num_tokens: Tokens) -> None:
        self.placement = placement
        self.num_moves = 0
        self.num_tokens = num_tokens
        """Since the start, as last measured."""
        self.recent = num_tokens
        """Between the last two measurements."""

    def measured(self, num_tokens: Tokens) -> None:
        self.recent = num_tokens - self.num_tokens
        self.num_tokens = num_tokens


class _Ratio(NamedTuple):
    """Summed over layers."""

    busiest: float = 0.0
    mean: float = 0.0

    def plus(self, loads: Sequence[float]) -> _Ratio:
        return _Ratio(self.busiest + max(loads), self.mean + sum(loads) / len(loads))

    @property
    def value(self) -> float:
        return self.busiest / self.mean if self.mean else 1.0


class Balancing:
    """For the thread of the brain, which calls `before_step` before it sends one."""

    def __init__(self, config: Config, executor: CommandExecutor) -> None:
        self._executor = executor
        self._grid = Grid.of(config.parallel)
        self._num_redundant = config.parallel.num_redundant_experts
        self._interval_steps = config.parallel.eplb_interval_steps
        self._deadline_s = config.executor.step_timeout_s
        self._num_moves = 0
        self.stats: BalanceStats | None = None
        self.begin(FIRST_EPOCH)

    def begin(self, epoch: int) -> None:
        """There are new ranks: they have the experts where these are at first, and have counted nothing."""
        self._epoch = epoch
        self.begin_again()

    def begin_again(self) -> None:
        """The same ranks have other weights, in the same way."""
        self._layers: dict[str, _Layer] = {}
        self._steps_left = self._interval_steps
        self._measuring: Pending[list[ReplyBody]] | None = None
        self._due: deque[str] = deque()
        """Layers that are still to be looked at since the last measurement."""
        self._measured = self._expected = _Ratio()
        self._num_moved = 0
        """Layers, since the last measurement."""

    def before_step(self) -> Pending[list[ReplyBody]] | None:
        """Do what there is to do before a step. Gives the exchange that the step comes after, if there is one.

        Blocks for no rank. Raises what an executor raises.
        """
        self._steps_left -= 1
        if self._due:
            return self._balance(self._due.popleft())
        if self._measuring is not None:
            if self._measuring.done():
                self._take(self._measuring.result())
                self._measuring = None
        elif self._steps_left <= 0:
            self._steps_left = self._interval_steps
            self._measuring = self._executor.submit(MeasureExperts(), deadline_s=self._deadline_s)
        return None

    def _take(self, answers: Sequence[ReplyBody]) -> None:
        """What each rank, in rank order, has had to do."""
        found: dict[str, Tokens] = {}
        for rank, answer in enumerate(answers):
            assert isinstance(answer, ExpertLoads), answer
            for load in answer.layers:
                counts = np.frombuffer(load.num_tokens, dtype=np.int64)
                shape = (self._grid.expert_parallel_size, len(counts))
                found.setdefault(load.layer, np.zeros(shape, np.int64))[self._grid.expert_rank(rank)] = counts
        for name, num_tokens in found.items():
            if name in self._layers:
                self._layers[name].measured(num_tokens)
            else:
                placement = first_placement(num_tokens.shape[1], self._num_redundant)
                self._layers[name] = _Layer(placement, num_tokens)
        self._due.extend(found)
        self._measured = self._expected = _Ratio()
        self._num_moved = 0

    def _balance(self, name: str) -> Pending[list[ReplyBody]] | None:
        layer, num_ranks = self._layers[name], self._grid.expert_parallel_size
        loads = layer.recent.sum(axis=0).tolist()
        placement = rebalance(loads, layer.placement, num_ranks)
        self._measured = self._measured.plus(layer.recent.sum(axis=1).tolist())
        self._expected = self._expected.plus(rank_loads(loads, placement, num_ranks))
        moving = None
        if placement != layer.placement:
            layer.placement = placement
            layer.num_moves += 1
            self._num_moved += 1
            move = MoveExperts(self._epoch, name, layer.num_moves, ints(placement))
            moving = self._executor.submit(move, deadline_s=self._deadline_s)
        if not self._due:
            self._tell()
        return moving

    def _tell(self) -> None:
        """All layers have been looked at."""
        self._num_moves += self._num_moved
        self.stats = BalanceStats(self._measured.value, self._expected.value, self._num_moves)
        log.info(
            "load of experts, busiest rank over the mean: %.2f before, %.2f after those of %d of %d layers moved",
            self.stats.measured,
            self.stats.expected,
            self._num_moved,
            len(self._layers),
        )
