"""Sleep and wake where this process lacks descriptors for what ranks have: they sleep on, and can be woken again."""

from __future__ import annotations

import errno
import os
from collections import deque
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from phalanx.config import Config
from phalanx.engine.maintenance import Maintenance
from phalanx.errors import DeadlineError, PhalanxError, RequestError
from phalanx.membership.formation import Formation
from phalanx.protocol.client import Maintained, MaintenanceOrder, Sleep, Wake
from phalanx.protocol.worker import CommandBody, FallAsleep, WakeUp

MAX_TURNS = 100
TOO_MANY_OPEN = OSError(errno.EMFILE, os.strerror(errno.EMFILE))


class Ranks:
    """What two ranks of GPUs answer, and how the attempts end to hold what they have."""

    def __init__(self) -> None:
        self.told: list[CommandBody] = []
        self.failures: deque[Exception | None] = deque()
        config = Config.build(model="m", device="cuda", tensor_parallel_size=2)
        recovery: Any = SimpleNamespace(
            follow=self._follow,
            rest_standby=lambda: None,
            renew_standby=lambda: None,
            end_change=lambda: None,
            shares_weights=False,
        )
        capacity: Any = SimpleNamespace(gives_back=True)
        line: Any = None
        self.formation = Formation(config, line, capacity, ExitStack(), recovery)
        self.formation.submit = self._submit  # type: ignore[method-assign, assignment]
        self.is_held = False
        brain: Any = SimpleNamespace(
            hold=lambda: setattr(self, "is_held", True),
            go_on=lambda: setattr(self, "is_held", False),
            recompute=lambda: None,
            is_between_steps=True,
        )
        checkpoint: Any = None
        self.maintenance = Maintenance(config, checkpoint, brain, self.formation)

    def carry_out(self, order: MaintenanceOrder) -> Maintained:
        self.maintenance.begin(order)
        for _ in range(MAX_TURNS):
            if (outcome := self.maintenance.turn()) is not None:
                return outcome
        raise AssertionError("it does not end")

    def _submit(self, body: CommandBody, *, deadline_s: float) -> Any:
        self.told.append(body)
        return SimpleNamespace(done=lambda: True, result=list)

    def _follow(self, told: object) -> None:
        if self.failures and (failure := self.failures.popleft()) is not None:
            raise failure


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


@pytest.mark.parametrize("again", [None, TOO_MANY_OPEN], ids=["once", "also when they lie down"])
def test_ranks_that_cannot_be_held_when_they_wake_sleep_on(ranks: Ranks, again: Exception | None) -> None:
    assert ranks.carry_out(Sleep(1)).error is None
    ranks.failures.extend((TOO_MANY_OPEN, again))
    outcome = ranks.carry_out(Wake(None))
    assert outcome.error is not None and not outcome.is_user_error
    assert "Too many open files" in outcome.error and outcome.error.endswith(": the engine is still asleep")
    assert ranks.maintenance.is_asleep and ranks.is_held
    assert ranks.told == [FallAsleep(1), WakeUp(), FallAsleep(1)]
    assert ranks.carry_out(Wake(None)).error is None
    assert not ranks.maintenance.is_asleep and not ranks.is_held


def test_ranks_that_cannot_be_held_when_they_lie_down_sleep_all_the_same(
    ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    ranks.failures.append(TOO_MANY_OPEN)
    assert ranks.carry_out(Sleep(1)).error is None
    assert ranks.maintenance.is_asleep
    assert "Too many open files" in caplog.text


def test_errors_that_say_more_stay_what_they_are(ranks: Ranks) -> None:
    late = DeadlineError("descriptors", "rank 1", 5.0)
    ranks.failures.append(late)
    with pytest.raises(PhalanxError) as raised:
        ranks.formation.hold(())
    assert raised.value is late


def test_ranks_that_are_replaced_before_another_order_to_sleep_has_begun_lie_down(ranks: Ranks) -> None:
    assert ranks.carry_out(Sleep(1)).error is None
    ranks.maintenance.begin(Sleep(1))
    assert ranks.maintenance.ranks_replaced() is None
    while ranks.maintenance.turn() is None:
        pass
    assert ranks.told == [FallAsleep(1), FallAsleep(1)]
    assert ranks.carry_out(Sleep(1)).error is None
    assert ranks.told == [FallAsleep(1), FallAsleep(1)], "they sleep"


def test_there_is_no_other_level(ranks: Ranks) -> None:
    with pytest.raises(RequestError, match="level"):
        ranks.maintenance.begin(Sleep(3))  # type: ignore[arg-type]
