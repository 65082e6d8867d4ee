"""torchfrtrace itself reads what we export, and finds in it what is there."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from ledger_ranks import WritingRank, look_at
from recorder import program
from recorder import write as write_recorded

from phalanx.ledger import flight_recorder
from phalanx.ledger.after import Trace
from phalanx.ledger.flight_recorder_export import recordings_of
from phalanx.ledger.journal_layout import NUM_RECORDS
from phalanx.ledger.judge import judge

GROUPS = {"tp@0": (0, 1, 2), "pp@0": (0, 1)}
STEP = (
    ("tp@0", "all_reduce float32 [3, 72]"),
    ("tp@0", "all_gather bfloat16 [3, 130] dim=1"),
    ("tp@0", "reduce_scatter float32 [6, 72]"),
    ("tp@0", "all_to_all float32 [72]"),
    ("tp@0", "broadcast int64 [4] src=1"),
    ("tp@0", "barrier"),
    ("pp@0", "all_gather float32 [3, 72]"),
)


def ranks_after(steps: int) -> list[WritingRank]:
    ranks = [WritingRank(rank, ["tp@0", "pp@0"]) for rank in range(3)]
    for rank in ranks:
        for number in range(1, steps + 1):
            rank.begin(number)
            for group, what in STEP:
                if rank.rank in GROUPS[group]:
                    rank.collective(group, what)
            rank.end()
    return ranks


def trace_of(ranks: list[WritingRank]) -> Trace:
    look = look_at(ranks, GROUPS)
    return Trace("phalanx", look, 10**18, judge(look), (), ())


def torch_says(directory: Path, caplog: pytest.LogCaptureFixture) -> str:
    """What torchfrtrace prints."""
    from torch.distributed.flight_recorder import fr_trace

    caplog.clear()
    try:
        fr_trace.main([str(directory)])
    finally:
        gc.enable()  # which it disables
    return caplog.text


def exported(trace: Trace, directory: Path) -> Path:
    recordings, left_out = recordings_of(trace)
    assert left_out == 0
    flight_recorder.write(directory, recordings)
    return directory


def test_nothing_is_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = torch_says(exported(trace_of(ranks_after(3)), tmp_path), caplog)
    assert "mismatch" not in said.lower() and "Not all ranks" not in said, said


def test_rings_that_have_lost_their_beginning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trace = trace_of(ranks_after(NUM_RECORDS // 6))  # rank 2 writes less than the others, so it has lost less
    firsts = {one.entries.records[0].step for one in trace.look.ranks.values()}
    assert len(firsts) > 1
    said = torch_says(exported(trace, tmp_path), caplog)
    assert "mismatch" not in said.lower() and "Not all ranks" not in said, said


def test_what_is_wrong_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ranks = ranks_after(2)
    for rank in ranks:
        rank.begin(3)
        rank.issue("tp@0", "all_reduce float32 [3, 72]" if rank.rank != 2 else "all_reduce float32 [3, 36]")
    said = torch_says(exported(trace_of(ranks), tmp_path), caplog)
    assert "Collective sequence number: 13 has errors" in said, said
    assert "Culprit rank 2" in said and "group info: tp@0" in said


def test_a_rank_that_did_not_come_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ranks = ranks_after(2)
    for rank in ranks[1:]:
        rank.begin(3)
        rank.issue("tp@0", "all_reduce float32 [3, 72]")
    said = torch_says(exported(trace_of(ranks), tmp_path), caplog)
    assert "Not all ranks joining collective, sequence number: 13" in said and "missing ranks: {0}" in said, said


def test_what_torch_has_no_name_for_is_left_out_and_counted() -> None:
    ranks = ranks_after(1)
    for rank in ranks:
        rank.begin(2)
        rank.collective("tp@0", "a graph of 5 collectives")
    recordings, left_out = recordings_of(trace_of(ranks))
    assert left_out == 3 and all(len(one.entries) in (6, 7) for one in recordings.values())


def test_the_programs_of_our_other_tests_are_such_as_torch_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = program(4)
    for rank in ranks:
        rank.collective("all_reduce", [8, 64] if rank.rank else [8, 32], state="started")
    said = torch_says(write_recorded(tmp_path, ranks), caplog)
    assert "Collective sequence number: 4 has errors" in said
    assert "Culprit rank 0" not in said, "torchfrtrace finds culprit 0 now: say so in docs/ledger.md"
