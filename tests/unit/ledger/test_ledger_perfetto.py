"""What ui.perfetto.dev is given: tracks with names, slices within them, flows between slices."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from typing import Any

import msgspec
from ledger_ranks import WritingRank, look_at

from phalanx.ledger.after import Trace
from phalanx.ledger.judge import judge
from phalanx.ledger.perfetto import perfetto

GROUPS = {"tp@0": (0, 1), "pp@0": (0, 1)}


def hung() -> Trace:
    """Both sum up in tp and gather in pp; then rank 0 has gone on alone."""
    ranks = [WritingRank(rank, ["tp@0", "pp@0"]) for rank in range(2)]
    for rank in ranks:
        rank.begin(1)
        rank.collective("tp@0", "all_reduce float32 [3, 72]")
        rank.collective("pp@0", "all_gather float32 [3, 72] dim=1")
    ranks[1].issue("tp@0", "all_reduce float32 [3, 72]")
    look = look_at(ranks, GROUPS)
    return Trace("phalanx", look, 0, judge(look), (), ())


def events(trace: Trace) -> list[dict[str, Any]]:
    found = json.loads(perfetto(trace))["traceEvents"]
    assert isinstance(found, list)
    return found


def test_a_verdict_about_no_rank() -> None:
    trace = hung()
    assert trace.verdict is not None
    trace = trace._replace(verdict=msgspec.structs.replace(trace.verdict, culprits=(), nodes=(), group=None))
    (told,) = [event for event in events(trace) if event["ph"] == "i"]
    assert (told["name"], told["pid"]) == (f"verdict: {trace.verdict.cause}", 1)


def test_every_slice_is_on_a_track_that_has_a_name() -> None:
    found = events(hung())
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in found if event["name"] == "thread_name"}
    slices = [event for event in found if event["ph"] == "X"]
    assert {(event["pid"], event["tid"]) for event in slices} <= set(names)
    assert sorted(names.values()) == sorted(["steps", "tp@0", "pp@0", "phase"] * 2)
    assert len({event["tid"] for event in slices}) == 8 and min(event["tid"] for event in slices) > 0
    processes = {event["args"]["name"] for event in found if event["name"] == "process_name"}
    assert processes == {"rank 0 on here", "rank 1 on here"}


def test_slices_say_what_was_done() -> None:
    slices = [event for event in events(hung()) if event["ph"] == "X"]
    (gathered, _) = [event for event in slices if event["name"] == "all_gather"]
    args = gathered["args"]
    assert (args["step"], args["sequence"], args["group"], args["shape"]) == (1, 1, "pp@0", "float32 [3, 72] dim=1")
    assert len(args["digest"]) == 16 and "open" not in args
    assert [event["name"] for event in slices if event["cat"] == "step"] == ["step 1", "step 1"]
    (waiting,) = [event for event in slices if event["cat"] == "collective" and "open" in event["args"]]
    assert waiting["pid"] == 2 and waiting["dur"] >= 0


def test_slices_of_a_track_do_not_overlap() -> None:
    tracks = defaultdict(list)
    for event in events(hung()):
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0
            tracks[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for spans in tracks.values():
        spans.sort()
        assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(spans))


def test_members_of_a_collective_are_tied() -> None:
    found = events(hung())
    slices = {(event["pid"], event["tid"], event["ts"]) for event in found if event["ph"] == "X"}
    flows = defaultdict(list)
    for event in found:
        if event["ph"] in "stf":
            assert (event["pid"], event["tid"], event["ts"]) in slices
            flows[event["id"]].append(event["ph"])
    assert list(flows.values()) == [["s", "f"], ["s", "f"]]


def test_the_verdict_is_an_instant_on_the_culprit_s_track() -> None:
    trace = hung()
    assert trace.verdict is not None
    (told,) = [event for event in events(trace) if event["ph"] == "i"]
    assert (told["s"], told["pid"], trace.verdict.culprits) == ("g", 1, (0,))
    assert told["args"]["verdict"] == str(trace.verdict)
