"""Which requests the next engine gets, and which of them is to blame."""

from __future__ import annotations

import random

import pytest

from phalanx.engine.condition import Condition
from phalanx.engine.history import History, without_engine
from phalanx.engine.restarts import WINDOW_S, Restarts
from phalanx.engine.trials import SLACK, Trials
from phalanx.protocol.client import BalanceStats, EngineStats, ReplicaStats


class Requests:
    """Their tokens, and what the engine is given of them."""

    def __init__(self, *request_ids: int) -> None:
        self.tokens: dict[int, int] = {}
        self.trials = Trials(self.tokens.__getitem__)
        for request_id in request_ids:
            self.add(request_id)

    def add(self, request_id: int) -> None:
        self.tokens[request_id] = 0
        self.trials.add(request_id)

    def go_on(self, *request_ids: int, by: int = SLACK + 1) -> None:
        for request_id in request_ids:
            self.tokens[request_id] += by

    def end(self, request_id: int) -> None:
        self.trials.drop(request_id)


def test_all_are_given_at_once_and_again_after_an_end() -> None:
    requests = Requests(1, 2)
    assert requests.trials.take_next() == [1, 2]
    requests.add(3)
    assert requests.trials.engine_ended() is None
    requests.add(4)
    assert requests.trials.take_next() == [1, 2, 3, 4]
    assert requests.trials.take_next() == []


def test_those_that_do_not_go_on_are_tried_one_at_a_time_and_first() -> None:
    requests = Requests(1, 2, 3)
    requests.trials.take_next()
    requests.trials.engine_ended()
    requests.trials.take_next()
    requests.go_on(2)
    assert requests.trials.engine_ended() is None, "1 or 3"
    assert requests.trials.take_next() == [3]
    assert requests.trials.take_next() == []
    requests.go_on(3, by=SLACK)
    assert requests.trials.take_next() == [], "what was under way at the end is made again"
    requests.go_on(3, by=1)
    assert requests.trials.take_next() == [1]
    assert requests.trials.engine_ended() == 1
    requests.end(1)
    assert requests.trials.take_next() == [2, 3]


def test_a_suspect_that_ends_is_none() -> None:
    requests = Requests(1, 2)
    for _ in range(2):
        requests.trials.take_next()
        requests.trials.engine_ended()
    assert requests.trials.take_next() == [2]
    requests.end(2)
    assert requests.trials.take_next() == [1]


def test_one_that_is_alone_is_known_at_the_third_end() -> None:
    requests = Requests(1)
    for _ in range(2):
        requests.trials.take_next()
        requests.go_on(1, by=1)
        assert requests.trials.engine_ended() is None
    requests.trials.take_next()
    assert requests.trials.engine_ended() == 1


def test_ends_between_which_it_goes_on_prove_nothing() -> None:
    requests = Requests(1)
    for _ in range(9):
        requests.trials.take_next()
        requests.go_on(1)
        assert requests.trials.engine_ended() is None


def test_ends_without_it_prove_nothing() -> None:
    requests = Requests(1)
    requests.trials.take_next()
    for _ in range(9):
        assert requests.trials.engine_ended() is None


def test_what_the_engine_does_not_have_needs_no_cancelling() -> None:
    requests = Requests(1, 2)
    assert not requests.trials.drop(1)
    requests.trials.take_next()
    assert requests.trials.drop(2)
    requests = Requests(1)
    requests.trials.take_next()
    requests.trials.engine_ended()
    assert not requests.trials.drop(1)


@pytest.mark.parametrize("seed", range(50))
def test_the_culprit_is_found_among_many_by_the_third_end_and_nobody_else_ends(seed: int) -> None:
    dice = random.Random(seed)
    requests = Requests(*range(dice.randint(1, 20)))
    culprit = dice.choice(list(requests.tokens))
    blamed = None
    for num_ends in range(1, 4):
        given: set[int] = set()
        while culprit not in given:
            given.update(requests.trials.take_next())
            if culprit not in given:
                requests.go_on(*given)
        blamed = requests.trials.engine_ended()
        assert (blamed is None) == (num_ends < 3)
    assert blamed == culprit


def test_restarts_have_a_limit_within_a_time_and_come_later_and_later() -> None:
    restarts = Restarts(4)
    assert [restarts.next_delay_s(float(now)) for now in range(5)] == [0.0, 1.0, 2.0, 4.0, None]
    assert restarts.num_recent == 4
    assert restarts.next_delay_s(WINDOW_S + 0.5) == 4.0
    assert restarts.next_delay_s(WINDOW_S + 0.6) is None
    assert restarts.next_delay_s(3 * WINDOW_S) == 0.0
    assert Restarts(0).next_delay_s(0.0) is None
    many = Restarts(100)
    assert max(many.next_delay_s(0.0) or 0.0 for _ in range(50)) == 30.0


def stats(number: int, num_moves: int | None = None) -> EngineStats:
    balance = None if num_moves is None else BalanceStats(1.5, 1.0, num_moves)
    return EngineStats((ReplicaStats(*range(number, number + 9)),), balance)


def test_what_was_counted_is_counted_on() -> None:
    history = History()
    assert history.stats_with(None) is None
    assert history.stats_with(stats(1)) == stats(1)
    history.add(stats(1, num_moves=3), Condition(pid=1, verdicts={"late": 1}))
    history.add(None, Condition(pid=1))
    history.add(stats(2), Condition(pid=1, verdicts={"late": 1, "stopped": 2}))
    assert history.num_restarts == 3
    now = history.stats_with(stats(5, num_moves=4))
    assert now is not None
    assert now.replicas == (ReplicaStats(5, 6, 7, 8, 5 + 6 + 9, 6 + 7 + 10, 7 + 8 + 11, 8 + 9 + 12, 9 + 10 + 13),)
    assert now.balance == BalanceStats(1.5, 1.0, 3 + 4)
    assert history.verdicts_with({"late": 5}) == {"late": 7, "stopped": 2}
    waiting = without_engine(now, 12).replicas[0]
    assert (waiting.num_running, waiting.num_waiting, waiting.num_blocks_used) == (0, 12, 0)
    assert waiting.num_steps == now.replicas[0].num_steps
