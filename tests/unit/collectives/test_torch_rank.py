"""Which rank a process is to be is known before it is one, and said once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import pytest

from phalanx.collectives.torch_notes import CLAIMED, TorchNotes
from phalanx.collectives.torch_rank import RankPlace, ranks_here, told_by_launcher, told_to_init
from phalanx.ledger.journal_reader import read
from phalanx.ledger.program import JOINING, JOINING_INDEX
from phalanx.ledger.registry import VARIABLE, LaneNotice, NewcomerNotice, RankNotice, Registry

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("arguments", "environment", "place"),
    [
        ({}, TORCHRUN, (5, 8)),
        ({"backend": "gloo", "rank": -1, "world_size": -1}, TORCHRUN, (5, 8)),
        ({"init_method": "env://?rank=0&world_size=2"}, TORCHRUN, (0, 2)),
        ({"init_method": "tcp://127.0.0.1:5", "rank": 0, "world_size": 3}, {}, (0, 3)),
        ({"init_method": "tcp://127.0.0.1:5?rank=1&world_size=3"}, TORCHRUN, (1, 3)),
        ({"store": object(), "rank": 2, "world_size": 3}, TORCHRUN, (2, 3)),
        ({"init_method": "file:///a"}, TORCHRUN, None),
        ({"rank": 0, "world_size": 1}, {}, None),
        ({"rank": 3, "world_size": 2}, {}, None),
        ({}, {"RANK": "one", "WORLD_SIZE": "2"}, None),
        ({}, {}, None),
    ],
)
def test_what_init_process_group_is_told(
    arguments: Mapping[str, object], environment: Mapping[str, str], place: tuple[int, int] | None
) -> None:
    assert told_to_init(arguments, environment) == place


def test_what_a_launcher_says() -> None:
    place = told_by_launcher(TORCHRUN)
    assert place == (5, 8) and place is not None
    assert ranks_here(place, TORCHRUN) == (4, 5, 6, 7)
    assert ranks_here(RankPlace(2, 8), TORCHRUN) == (), "another rank than the environment's"
    assert told_by_launcher({}) is None and ranks_here(place, {"RANK": "5"}) == ()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.setenv(CLAIMED, "")  # so that it is restored
    monkeypatch.delenv(CLAIMED)
    with Registry() as found:
        for name, value in {**TORCHRUN, VARIABLE: found.place}.items():
            monkeypatch.setenv(name, value)
        yield found


def test_a_process_makes_itself_known_before_it_is_a_rank(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    TorchNotes().come()
    (newcomer,) = registry.news()
    assert isinstance(newcomer, NewcomerNotice) and (newcomer.rank, newcomer.pid) == (5, os.getpid())
    monkeypatch.setenv(CLAIMED, "1")  # its parent is the rank
    TorchNotes().come()
    assert registry.news() == []


def test_where_ranks_find_each_other_is_in_the_journal(registry: Registry) -> None:
    notes = TorchNotes()
    number = notes.join(RankPlace(5, 8))
    rank, lane = registry.news()
    assert isinstance(rank, RankNotice) and (rank.rank, rank.here) == (5, (4, 5, 6, 7))
    assert isinstance(lane, LaneNotice) and lane.ranks == tuple(range(8))
    assert (lane.index, lane.name) == (JOINING_INDEX, JOINING)
    record = read(notes.memory).records[-1]
    assert (record.group, record.sequence, record.is_done) == (JOINING_INDEX, 1, False)
    assert read(notes.memory).texts[record.digest] == "init_process_group of 8 ranks"
    notes.done(number)
    assert read(notes.memory).records[-1].is_done
    notes.join(RankPlace(5, 8))
    assert read(notes.memory).records[-1].sequence == 2 and registry.news() == []
