"""Whoever is to blame by PyTorch's Flight Recorders is named, rank 0 as well as any other."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from recorder import RecordedRank, program, write

from phalanx.ledger.after import Trace
from phalanx.ledger.flight_recorder import PREFIX, read
from phalanx.ledger.recorded import trace_of

CULPRITS = pytest.mark.parametrize("culprit", range(4))
BACKENDS = pytest.mark.parametrize("backend", ["nccl", "gloo"])
OPEN = "started"
STATUS = [f"last_{what}_collective" for what in ("enqueued", "started", "completed")]


def trace(directory: Path, ranks: Iterable[RecordedRank]) -> Trace:
    return trace_of(read(write(directory, list(ranks))))


@BACKENDS
def test_nothing_is_wrong(tmp_path: Path, backend: str) -> None:
    found = trace(tmp_path, program(4, backend))
    assert found.verdict is None and found.missing == ()
    assert found.notes == () or backend == "gloo"


@CULPRITS
@BACKENDS
def test_a_collective_that_one_rank_leaves_out(tmp_path: Path, culprit: int, backend: str) -> None:
    ranks = program(4, backend)
    for rank in ranks:
        if rank.rank != culprit:
            rank.collective("all_reduce", [8, 64], state=OPEN)
        rank.collective("_all_gather_base", [8, 32], state=OPEN)
    verdict = trace(tmp_path, ranks).verdict
    assert verdict is not None and (verdict.cause, verdict.culprits) == ("diverged", (culprit,))
    assert (verdict.group, verdict.sequence, verdict.step) == ("0:default_pg", 4, None)
    assert (verdict.theirs, verdict.peers) == (
        "_all_gather_base float32 [8, 32] -> float32 [32, 32]",
        "all_reduce float32 [8, 64]",
    )
    assert verdict.stacks[culprit] == ("train.py:13 in train",)
    assert str(verdict).startswith(f"rank {culprit} issued _all_gather_base")


@CULPRITS
@pytest.mark.parametrize("change", [{"shape": [8, 32]}, {"shape": [8, 64], "dtype": "BFloat16"}])
def test_a_collective_of_another_shape_or_dtype(tmp_path: Path, culprit: int, change: dict[str, str]) -> None:
    ranks = program(4)
    for rank in ranks:
        rank.collective("all_reduce", **(change if rank.rank == culprit else {"shape": [8, 64]}), state=OPEN)
    verdict = trace(tmp_path, ranks).verdict
    assert verdict is not None and (verdict.cause, verdict.culprits) == ("diverged", (culprit,))


@CULPRITS
@BACKENDS
def test_a_rank_that_does_not_come(tmp_path: Path, culprit: int, backend: str) -> None:
    ranks = program(4, backend)
    for rank in ranks:
        if rank.rank != culprit:  # Gloo retires what has failed
            rank.collective("all_reduce", [8, 64], state="completed" if backend == "gloo" else OPEN)
    verdict = trace(tmp_path, ranks).verdict
    assert verdict is not None and (verdict.cause, verdict.culprits) == ("late", (culprit,))
    assert verdict.sequence == 4 and len(verdict.waiting) == 3
    assert "has not come to all_reduce float32 [8, 64]: the last" in verdict.what


@CULPRITS
@BACKENDS
def test_a_rank_that_left_no_dump(tmp_path: Path, culprit: int, backend: str) -> None:
    ranks = program(4, backend)
    for rank in ranks:
        rank.collective("all_reduce", [8, 64], state="completed" if backend == "gloo" else OPEN)
    found = trace(tmp_path, [rank for rank in ranks if rank.rank != culprit])
    if backend == "gloo" and culprit == 3:  # nothing says that there was a rank 3
        assert found.missing == () and "do not say who is in group" in found.notes[0]
        return
    assert found.missing == (culprit,) and f"there is no dump of rank {culprit}" in found.notes
    assert found.verdict is not None and found.verdict.culprits == (culprit,)


@pytest.mark.parametrize("left", [0, 2])
def test_one_that_alone_has_left_a_dump_knows_of_the_others(tmp_path: Path, left: int) -> None:
    rank = program(3, "gloo")[left]
    rank.of_no_name = range(3)
    rank.collective("all_reduce", [8, 64], state=OPEN)
    found = trace(tmp_path, [rank])
    assert found.missing == tuple({0, 1, 2} - {left})
    assert found.verdict is not None and set(found.verdict.culprits) == {0, 1, 2} - {left}


def test_two_ranks_that_differ_cannot_be_told_apart(tmp_path: Path) -> None:
    ranks = program(2)
    ranks[0].collective("all_reduce", [8, 64], state=OPEN)
    ranks[1].collective("broadcast", [8], state=OPEN)
    verdict = trace(tmp_path, ranks).verdict
    assert verdict is not None and verdict.is_ambiguous and verdict.culprits == (0, 1)


def test_who_is_waited_for_is_followed_over_groups(tmp_path: Path) -> None:
    ranks = program(4)
    for rank in ranks:
        rank.join(str(1 + rank.rank // 2), "tp", [rank.rank // 2 * 2, rank.rank // 2 * 2 + 1])
    ranks[2].collective("all_reduce", [8, 64], group="2", state=OPEN)  # for rank 3, which is nowhere
    ranks[0].collective("all_reduce", [8, 64], state=OPEN)
    ranks[1].collective("all_reduce", [8, 64], state=OPEN)
    verdict = trace(tmp_path, ranks).verdict
    assert verdict is not None and (verdict.cause, verdict.culprits) == ("late", (3,))


def test_what_waits_behind_an_open_collective_is_not_what_is_waited_in(tmp_path: Path) -> None:
    ranks = program(2)
    for _ in range(3):
        ranks[0].collective("all_reduce", [8, 64], state=OPEN)
    verdict = trace(tmp_path, ranks).verdict
    assert verdict is not None and (verdict.culprits, verdict.sequence) == ((1,), 4)


def test_point_to_point(tmp_path: Path) -> None:
    ranks = program(4)
    for source, destination in ((0, 1), (1, 2), (2, 3)):
        ranks[source].send(destination, [8, 64])
        ranks[destination].receive(source, [8, 64])
    assert trace(tmp_path / "well", ranks).verdict is None
    ranks[3].receive(2, [8, 64], state=OPEN)
    verdict = trace(tmp_path / "waits", ranks).verdict
    assert verdict is not None and (verdict.culprits, verdict.group) == ((2,), "0:default_pg 2->3")
    ranks[2].send(3, [8, 32], state=OPEN)
    verdict = trace(tmp_path / "shape", ranks).verdict
    assert verdict is not None and verdict.cause == "diverged" and verdict.culprits == (2, 3)


def test_point_to_point_is_not_judged_without_its_beginning(tmp_path: Path) -> None:
    ranks = program(2)
    ranks[0].send(1, [8])
    ranks[0].send(1, [8])
    ranks[1].receive(0, [8])
    ranks[1].receive(0, [8], state=OPEN)
    ranks[0].first_record = 4
    found = trace(tmp_path, ranks)
    assert found.verdict is None and "of rank 0 are not judged" in found.notes[0]


def test_many_dumps_that_are_missing_are_told_of_in_a_line(tmp_path: Path) -> None:
    ranks = program(2, "gloo")
    ranks[1].rank = 99_999
    found = trace(tmp_path, ranks)
    assert found.missing == tuple(range(1, 99_999)) and "there is no dump of ranks 1 to 99998" in found.notes


def test_operations_that_are_issued_as_one(tmp_path: Path) -> None:
    ranks = program(2)
    for rank in ranks:
        rank.collective("_all_gather_base", [8, 32], state="scheduled")
        rank.collective("coalesced", [8, 32], state=OPEN if rank.rank else "completed")
        rank.entries[-1].update(collective_seq_id=4, input_sizes=[], input_dtypes=[], output_sizes=[], output_dtypes=[])
    look = trace(tmp_path, ranks).look
    assert look.ranks[0].awaits is None
    assert look.ranks[1].awaits is not None and look.ranks[1].awaits[1].sequence == 4


def test_what_may_differ_between_ranks(tmp_path: Path) -> None:
    ranks = program(2)
    for rank in ranks:
        rank.collective("all_to_all", [8 + rank.rank, 64], state=OPEN)
        rank.entries[-1]["retired"] = True
    found = trace(tmp_path, ranks)
    assert found.verdict is not None and (found.verdict.cause, found.verdict.culprits) == ("hung", ())
    assert str(found.verdict).startswith("ranks 0, 1 have all come to all_to_all float32 [8, 64]")


def test_ranks_that_are_on_their_way_are_not_to_blame(tmp_path: Path) -> None:
    ranks = program(2)
    ranks[0].collective("all_reduce", [8, 64], state=OPEN)
    for rank in ranks:
        for entry in rank.entries:
            entry["timeout_ms"] = 500
    assert trace(tmp_path, ranks).verdict is None


def test_groups_of_one_name(tmp_path: Path) -> None:
    ranks = program(4)
    for rank in ranks:
        first = rank.rank // 2 * 2
        rank.join("7", "tp", [first, first + 1])
        rank.collective("all_reduce", [8, 64 + first], group="7")
    look = trace(tmp_path, ranks).look
    assert look.groups["7:tp"] == (0, 1) and look.groups["7:tp of 2, 3"] == (2, 3)
    assert trace(tmp_path, ranks).verdict is None


def test_json_says_the_same(tmp_path: Path) -> None:
    ranks = program(4)
    for rank in ranks[1:]:
        rank.collective("all_reduce", [8, 64], state=OPEN)
    verdict = trace(tmp_path / "pickles", ranks).verdict
    (tmp_path / "json").mkdir()
    for rank in ranks:
        recording = rank.recording()
        recording["pg_status"] = {"0": dict.fromkeys(STATUS, "4")}
        for entry in recording["entries"]:
            entry["time_discovered_completed_ns"] = entry["time_discovered_completed_ns"] or 0
        (tmp_path / "json" / f"{PREFIX}{rank.rank}.json").write_text(json.dumps(recording))
    assert trace_of(read(tmp_path / "json")).verdict == verdict
    assert verdict is not None and verdict.culprits == (0,)
