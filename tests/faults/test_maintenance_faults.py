"""Reload, sleep and wake of two ranks, with requests under way, and with ranks that are killed in the midst of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_memory_used import used_bytes
from oracle import Oracle

from phalanx.config import Config
from phalanx.engine.brain import Brain
from phalanx.engine.maintenance import Maintenance
from phalanx.engine.succession import Succession
from phalanx.errors import PhalanxError
from phalanx.membership.formation import Formation, start_formation
from phalanx.memory.host import bytes_of_family
from phalanx.models.checkpoint import resolve
from phalanx.protocol.client import Maintained, MaintenanceOrder, Reload, Sleep, Submit, Wake
from phalanx.protocol.columns import as_ints, ints
from phalanx.protocol.sampling import SamplingParams
from phalanx.protocol.worker import CommandBody, FallAsleep, ReadWeights, TakeWeights, WakeUp
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.holdings import children_of

pytestmark = pytest.mark.slow
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")

PROMPT = tuple((7 * i) % 250 for i in range(40))
NUM_TOKENS = 24
MANY_TOKENS, AT_LEISURE_S = 300, 0.005
"""So many, and between two of them such a pause: they last longer than weights are read."""
WITHIN_S = 60.0


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("new"), seed=1)


class Served:
    """What an engine's loop does, without its process."""

    def __init__(self, checkpoint: Path, **settings: Any) -> None:
        config = Config.build(model=str(checkpoint), launcher="local", block_size=4, **settings)
        self.device = config.executor.device
        self._not_ours = set(children_of(os.getpid()))  # such as the Ray of other tests
        found = resolve(str(checkpoint))
        self.formation: Formation = start_formation(config, found, lambda _: None)
        capacity = self.formation.capacity
        self.brain = Brain(
            config,
            self.formation,
            num_blocks=capacity.num_blocks,
            max_model_len=capacity.max_model_len,
            eos_token_ids=(),
        )
        self.ranks = _Meddled(self.formation)
        self.maintenance = Maintenance(config, found, self.brain, self.ranks)
        self.outcome: Maintained | None = None
        self.tokens: list[int] = []
        self.pause_s = 0.0
        """Between two steps of a request while something else is under way."""
        self._num_requests = 0

    def submit(self, num_tokens: int = NUM_TOKENS) -> None:
        self.tokens = []
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        self.brain.submit(Submit(self._num_requests, ints(PROMPT), sampling))
        self._num_requests += 1

    def made(self) -> list[int]:
        """A request's output."""
        self.submit()
        self.until(lambda: len(self.tokens) == NUM_TOKENS)
        return self.tokens

    def maintain(self, order: MaintenanceOrder) -> Maintained:
        self.outcome = None
        self.maintenance.begin(order)
        self.until(lambda: self.outcome is not None)
        assert self.outcome is not None
        return self.outcome

    def until(self, is_over: Callable[[], bool]) -> None:
        expires_at = time.monotonic() + WITHIN_S
        while not is_over():
            assert time.monotonic() < expires_at
            try:
                self._turn()
            except PhalanxError as error:
                self._heal(error)

    def notice_and_heal(self) -> None:
        """A rank is dead, and nobody waits for it."""
        with pytest.raises(PhalanxError) as raised:
            self.formation.check_health()
        self._heal(raised.value)
        self.until(lambda: not self.maintenance.is_busy)

    def used_bytes(self) -> int:
        """Of the host by all that it has started, or of all GPUs by anybody."""
        if self.device == "cuda":
            return sum(used_bytes(number) for number in range(torch.cuda.device_count()))
        ours = set(children_of(os.getpid())) - self._not_ours
        return sum(map(bytes_of_family, ours))  # all that share memory: how many is no matter then

    def kill(self, rank: int) -> None:
        os.kill(self.pids()[rank], signal.SIGKILL)

    def pids(self) -> dict[int, int]:
        pids: dict[int, int] = self.formation._line.executor._launcher.pids()  # type: ignore[attr-defined]
        return pids

    def _turn(self) -> None:
        self.outcome = self.maintenance.turn() or self.outcome
        if self.brain.has_work() and (batch := self.brain.step()) is not None:
            self.tokens += as_ints(batch.tokens).tolist()
        self.formation.progressed()
        if self.maintenance.is_busy:
            time.sleep(self.pause_s)

    def _heal(self, error: PhalanxError) -> None:
        assert self.formation.heals(error), error
        Succession(self.brain, self.formation).go_on(self.formation.heal(error), error)
        self.outcome = self.maintenance.ranks_replaced() or self.outcome


class _Meddled:
    """A formation whose ranks something happens to before they get a certain command, once."""

    def __init__(self, formation: Formation) -> None:
        self._formation = formation
        self.meddle: tuple[type[CommandBody], Callable[[], None]] | None = None

    def submit(self, body: CommandBody, *, deadline_s: float) -> Any:
        if self.meddle is not None and isinstance(body, self.meddle[0]):
            meddle, self.meddle = self.meddle[1], None
            meddle()
        return self._formation.submit(body, deadline_s=deadline_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._formation, name)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=needs_two_gpus)])
def served(request: pytest.FixtureRequest, old: Path) -> Iterator[Served]:
    cache_bytes = 1 << 24 if request.param == "cpu" else 1 << 28
    served = Served(old, device=request.param, kv_cache_memory=cache_bytes, tensor_parallel_size=2, standby=1)
    yield served
    served.formation.close()


@pytest.fixture(scope="module")
def of_old(old: Path) -> list[int]:
    return Oracle(old).greedy(PROMPT, NUM_TOKENS)


@pytest.fixture(scope="module")
def of_new(new: Path) -> list[int]:
    return Oracle(new).greedy(PROMPT, NUM_TOKENS)


def test_a_request_that_runs_gets_new_weights_on_the_way(
    served: Served, old: Path, new: Path, of_old: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    all_of_old = Oracle(old).greedy(PROMPT, MANY_TOKENS)
    served.submit(MANY_TOKENS)
    served.until(lambda: len(served.tokens) >= 5)
    monkeypatch.setattr(served, "pause_s", AT_LEISURE_S)
    assert served.maintain(Reload(str(new), "now", WITHIN_S)) == Maintained(has_new_weights=True, model=str(new))
    served.until(lambda: len(served.tokens) == MANY_TOKENS)
    num_old = next(i for i, (one, other) in enumerate(zip(served.tokens, all_of_old, strict=True)) if one != other)
    assert num_old >= 5
    oracle = Oracle(new)
    assert any(
        served.tokens[num:] == oracle.choices((*PROMPT, *all_of_old[:num]), served.tokens[num:])
        for num in range(num_old, 4, -1)
    )
    assert served.maintain(Reload(str(old), "idle", WITHIN_S)).error is None
    assert served.made() == of_old


def test_requests_end_with_the_old_weights_where_that_is_asked_for(
    served: Served, old: Path, new: Path, of_old: list[int], of_new: list[int]
) -> None:
    served.submit()
    served.until(lambda: len(served.tokens) >= 2)
    assert served.maintain(Reload(str(new), "idle", WITHIN_S)).error is None
    assert served.tokens == of_old
    served.kill(0)
    assert served.made() == of_new, "who comes after a fault has the new weights"
    assert served.maintain(Reload(str(old), "now", WITHIN_S)).error is None


def test_a_rank_that_is_killed_while_it_reads(served: Served, new: Path, of_old: list[int]) -> None:
    served.ranks.meddle = ReadWeights, lambda: served.kill(1)
    outcome = served.maintain(Reload(str(new), "now", WITHIN_S))
    assert outcome.error is not None and "the old ones serve" in outcome.error and not outcome.is_user_error
    served.until(lambda: not served.maintenance.is_busy)
    assert served.made() == of_old


def test_a_rank_that_is_killed_while_others_have_new_weights(
    served: Served, old: Path, new: Path, of_old: list[int], of_new: list[int]
) -> None:
    served.submit()
    pid = served.pids()[1]

    def stop() -> None:
        os.kill(pid, signal.SIGSTOP)
        kill_at = time.monotonic() + 0.2  # by then the other one has them
        pending = served.formation.submit(TakeWeights(), deadline_s=WITHIN_S)
        while time.monotonic() < kill_at:
            pending.done()
        os.kill(pid, signal.SIGKILL)

    served.ranks.meddle = TakeWeights, stop
    assert served.maintain(Reload(str(new), "idle", WITHIN_S)).error is None
    assert served.tokens == of_old
    assert served.formation.stats().healed["checkpoint"] >= 1  # type: ignore[union-attr]
    assert served.made() == of_new
    assert served.maintain(Reload(str(old), "now", WITHIN_S)).error is None
    assert served.made() == of_old


@pytest.mark.parametrize("level", [1, 2])
def test_ranks_that_are_killed_in_their_sleep(served: Served, of_old: list[int], level: int) -> None:
    served.submit()
    served.until(lambda: len(served.tokens) >= 5)
    served.ranks.meddle = FallAsleep, lambda: served.kill(1)
    assert served.maintain(Sleep(level)).error is None  # type: ignore[arg-type]
    num_tokens = len(served.tokens)
    assert num_tokens < NUM_TOKENS and not served.brain.has_work()
    served.kill(0)
    served.notice_and_heal()
    assert served.maintenance.is_asleep
    served.ranks.meddle = WakeUp, lambda: served.kill(1)
    assert served.maintain(Wake(None)).error is None
    served.until(lambda: len(served.tokens) == NUM_TOKENS)
    assert served.tokens == of_old


def test_memory_is_given_back(served: Served, old: Path, of_old: list[int]) -> None:
    assert served.made() == of_old
    sizes = []
    for level in (0, 1, 2):
        if level:
            assert served.maintain(Sleep(level)).error is None  # type: ignore[arg-type]
        sizes.append(served.used_bytes())
    assert served.maintain(Wake(None)).error is None
    assert served.made() == of_old
    weight_bytes = sum(served.formation.capacity.weight_bytes)
    assert sizes[0] > sizes[1] and sizes[1] - sizes[2] > 0.8 * weight_bytes
    if served.device == "cuda":
        assert sizes[0] - sizes[1] > 0.9 * 2 * (1 << 28), "all of the cache of both ranks"
