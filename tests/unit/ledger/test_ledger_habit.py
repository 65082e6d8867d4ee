"""Of two ranks that differ, the one that does what neither has ever done there is odd."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from ledger_ranks import WritingRank

from phalanx.ledger.habit import first_deviation, form
from phalanx.ledger.journal_layout import NUM_TEXTS
from phalanx.ledger.judge import judge
from phalanx.ledger.look import Look
from phalanx.ledger.record import PlanSize
from phalanx.ledger.uneven import uneven_groups
from phalanx.ledger.verdict import Verdict

GROUP = "tp@0"
STEP = ("reduce f32 [1, {n}, 72]", "reduce f32 [1, {n}, 72]", "gather f32 [1, 136] dim=1", "broadcast i64 [1] src=0")


def two_ranks(num_steps: int = 3) -> list[WritingRank]:
    """After some steps, all alike but for the number of tokens."""
    ranks = [WritingRank(rank, [GROUP]) for rank in (0, 1)]
    for step in range(1, num_steps + 1):
        for rank in ranks:
            run(rank, step, [text.format(n=step) for text in STEP])
    return ranks


def run(rank: WritingRank, step: int, texts: list[str]) -> None:
    rank.begin(step)
    for text in texts:
        rank.collective(GROUP, text)
    rank.end()


def verdict_of(ranks: list[WritingRank]) -> Verdict:
    looks = {rank.rank: rank.look() for rank in ranks}
    verdict = judge(Look(time.monotonic_ns(), looks, {GROUP: (0, 1)}))
    assert verdict is not None
    return verdict


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize(
    ("place", "done"),
    [
        (1, "reduce f32 [1, 9, 71]"),
        (0, "reduce f64 [1, 9, 72]"),
        (1, "reduce f32 [9, 72]"),
        (1, "gather f32 [1, 136] dim=1"),
        (2, "broadcast i64 [1] src=0"),
        (3, "reduce i64 [1]"),
    ],
)
def test_what_was_never_done_at_this_place(culprit: int, place: int, done: str) -> None:
    ranks = two_ranks()
    texts = [text.format(n=9) for text in STEP]
    for rank in ranks:
        rank.begin(4)
        for text in texts[:place]:
            rank.collective(GROUP, text)
        rank.issue(GROUP, done if rank.rank == culprit else texts[place])
    verdict = verdict_of(ranks)
    assert (verdict.cause, verdict.culprits) == ("diverged", (culprit,)), verdict
    assert (verdict.theirs, verdict.peers, verdict.sequence) == (done, texts[place], 12 + place + 1)


@pytest.mark.parametrize("culprit", [0, 1])
def test_who_has_left_the_step_with_one_collective_less_and_goes_on_with_the_same_one(culprit: int) -> None:
    same = ["reduce f32 [1, 1, 72]"] * 3
    ranks = [WritingRank(rank, [GROUP]) for rank in (0, 1)]
    for rank in ranks:
        for step in (1, 2, 3):
            run(rank, step, same)
        if rank.rank == culprit:
            run(rank, 4, same[:2])
            rank.begin(5)
        else:
            rank.begin(4)
            rank.collective(GROUP, same[0])
            rank.collective(GROUP, same[1])
        rank.issue(GROUP, same[2])
    assert verdict_of(ranks).culprits == (culprit,)


@pytest.mark.parametrize("culprit", [0, 1])
def test_that_ranks_are_in_the_next_step_already_says_nothing_of_who_is_right(culprit: int) -> None:
    """Another replica is, as the culprit is: most ranks follow that step's plan, which is another one."""
    texts, other = [text.format(n=1) for text in STEP], "tp@1"
    ranks = [WritingRank(rank, [GROUP if rank < 2 else other]) for rank in range(4)]
    for rank in ranks:
        for step in (1, 2, 3, 4):
            rank.begin(step, f"plan {step}")
            if rank.rank == 1 - culprit and step == 4:
                break
            for text in texts[: -1 if rank.rank == culprit and step == 4 else None]:
                rank.collective(GROUP if rank.rank < 2 else other, text)
            rank.end()
        else:
            rank.begin(5, "plan 5")
    late, early = ranks[1 - culprit], ranks[culprit]
    for text in texts[:-1]:
        late.collective(GROUP, text)
    late.issue(GROUP, texts[-1])
    early.issue(GROUP, texts[0])
    looks = {rank.rank: rank.look() for rank in ranks}
    verdict = judge(Look(time.monotonic_ns(), looks, {GROUP: (0, 1), other: (2, 3)}))
    assert verdict is not None and (verdict.cause, verdict.culprits) == ("diverged", (culprit,)), verdict


def test_what_both_have_done_there_or_neither_has_cannot_be_told() -> None:
    for texts in (("one f32 [1, 2]", "two f32 [1, 2]"), ("reduce f32 [1, 9, 72]", "reduce f32 [1, 8, 72]")):
        ranks = two_ranks()
        for rank, text in zip(ranks, texts, strict=True):
            rank.begin(4)
            rank.issue(GROUP, text)
        assert verdict_of(ranks).culprits == (0, 1)


SIZES = [PlanSize(60, 4, 4), PlanSize(4, 4, 4), PlanSize(30, 2, 1)]
SIZED = ("reduce f32 [1, {0.num_tokens}, 72]", "gather f32 [{0.num_rows}, 136]", "broadcast i64 [{0.num_samples}]")


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize(
    ("place", "done"),
    [
        (0, "reduce f32 [1, 6, 72]"),
        (0, "reduce f32 [2, 7, 72]"),
        (1, "gather f32 [2, 136]"),
        (2, "broadcast i64 [1]"),
        (2, "broadcast i64 [3]"),
    ],
)
def test_sizes_that_the_plan_does_not_have(culprit: int, place: int, done: str) -> None:
    ranks = sized_ranks(SIZES)
    texts = [text.format(PlanSize(7, 3, 2)) for text in SIZED]
    for rank in ranks:
        rank.begin(4, num_tokens=7, size=PlanSize(7, 3, 2))
        for text in texts[:place]:
            rank.collective(GROUP, text)
        rank.issue(GROUP, done if rank.rank == culprit else texts[place])
    verdict = verdict_of(ranks)
    assert (verdict.culprits, verdict.theirs, verdict.peers) == ((culprit,), done, texts[place])


def sized_ranks(sizes: Sequence[PlanSize]) -> list[WritingRank]:
    """After a step of each size."""
    ranks = [WritingRank(rank, [GROUP]) for rank in (0, 1)]
    for step, size in enumerate(sizes, start=1):
        for rank in ranks:
            rank.begin(step, num_tokens=size.num_tokens, size=size)
            for text in SIZED:
                rank.collective(GROUP, text.format(size))
            rank.end()
    return ranks


@pytest.mark.parametrize(
    ("sizes", "now"),
    [
        ([], PlanSize(7, 3, 2)),
        ([PlanSize(1, 1, 1)], PlanSize(1, 7, 2)),  # the first size may be the number of rows
        ([PlanSize(5, 1, 1), PlanSize(9, 1, 1)], PlanSize(0, 0, 0)),  # the plan is not known
    ],
)
def test_sizes_of_which_it_is_not_known_what_they_depend_on(sizes: Sequence[PlanSize], now: PlanSize) -> None:
    ranks = sized_ranks(sizes)
    for rank, num_tokens in zip(ranks, (7, 1), strict=True):
        rank.begin(len(sizes) + 1, num_tokens=1, size=now)
        rank.issue(GROUP, SIZED[0].format(PlanSize(num_tokens, 1, 1)))
    assert verdict_of(ranks).culprits == (0, 1)


def test_a_size_is_kept_in_a_word() -> None:
    for size in (PlanSize(1, 0, 0), PlanSize(2**20, 77, 2**21 - 1)):
        assert PlanSize.of_word(size.word) == size
    assert PlanSize(2**30, 1, 1).word < 2**63 and PlanSize.of_word(0) is None


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize(
    ("extra", "what"), [(-1, "without broadcast i64 [1]"), (1, "which its peers have left step 4 without")]
)
def test_ranks_that_have_left_a_step_with_another_number_of_collectives(culprit: int, extra: int, what: str) -> None:
    """A source that runs ahead waits for nobody, nor does who leaves out what comes last."""
    ranks = two_ranks()
    usual = [text.format(n=2) for text in STEP]
    unusual = usual[:-1] if extra < 0 else [*usual, usual[-1]]
    for rank in ranks:
        run(rank, 4, unusual if rank.rank == culprit else usual)
    verdict = verdict_of(ranks)
    assert (verdict.cause, verdict.culprits, verdict.step) == ("diverged", (culprit,), 4), verdict
    assert what in str(verdict)
    assert (verdict.group, verdict.sequence) == (GROUP, 16 if extra < 0 else 17)
    assert (verdict.theirs, verdict.peers) == ((None, usual[3]) if extra < 0 else (usual[3], None))


def test_collectives_of_a_method_may_be_uneven() -> None:
    ranks = two_ranks()
    ranks[0].journal.leave_step()
    ranks[0].collective(GROUP, "broadcast i64 [1] src=0")
    look = Look(time.monotonic_ns(), {rank.rank: rank.look() for rank in ranks}, {GROUP: (0, 1)})
    assert uneven_groups(look) == {GROUP: (13, 12)} and judge(look) is None


@pytest.mark.parametrize("culprit", [0, 1])
def test_who_is_in_a_collective_that_the_step_does_not_have(culprit: int) -> None:
    ranks = two_ranks()
    for rank in ranks:
        texts = [text.format(n=1) for text in STEP]
        if rank.rank != culprit:
            run(rank, 4, texts)
            continue
        rank.begin(4)
        for text in texts:
            rank.collective(GROUP, text)
        rank.issue(GROUP, "reduce i64 [1]")
    verdict = verdict_of(ranks)
    assert (verdict.cause, verdict.culprits, verdict.theirs) == ("diverged", (culprit,), "reduce i64 [1]")


def test_of_two_groups_in_which_a_rank_is_awaited_the_one_that_it_comes_to_first_is_named() -> None:
    groups = {"tp": (0, 1), "link": (0, 2)}
    ranks = [WritingRank(0, ["tp", "link"]), WritingRank(1, ["tp"]), WritingRank(2, ["link"])]
    for step in (1, 2):
        for rank in ranks:
            rank.begin(step)
        ranks[2].issue("link", "send")  # it waits from the beginning of the step
        for rank in ranks[:1] if step == 2 else ranks[:2]:
            rank.collective("tp", "reduce")
        if step == 1:
            ranks[0].collective("tp", "reduce")
            ranks[1].collective("tp", "reduce")
            ranks[0].collective("link", "send")
            ranks[2].done("link")
            for rank in ranks:
                rank.end()
    ranks[1].collective("tp", "reduce")
    ranks[1].issue("tp", "reduce")
    verdict = judge(Look(time.monotonic_ns(), {rank.rank: rank.look() for rank in ranks}, groups))
    assert verdict is not None and (verdict.culprits, verdict.group, verdict.sequence) == ((0,), "tp", 4)


def test_of_two_steps_in_which_a_rank_is_awaited_the_earlier_one_is_named() -> None:
    groups = {"tp": (0, 1), "ep": (0, 1, 2)}
    ranks = [WritingRank(rank, ["tp", "ep"] if rank < 2 else ["ep"]) for rank in (0, 1, 2)]
    for step in (1, 2):
        for rank in ranks:
            rank.begin(step)
            rank.collective("ep", "dispatch [1, 72]")
    ranks[2].end()
    ranks[2].begin(3)
    ranks[2].issue("ep", "dispatch [1, 72]")  # it waits for longest, if only just
    for rank in ranks[:2]:
        rank.collective("tp", "reduce [1, 72]")
    ranks[1].issue("tp", "gather [1, 72]")
    looks = {rank.rank: rank.look(still_s=9.0) for rank in ranks}
    verdict = judge(Look(time.monotonic_ns() + 9_000_000_000, looks, groups))
    assert verdict is not None and (verdict.culprits, verdict.group, verdict.step) == ((0,), "tp", 2), verdict


@pytest.mark.parametrize("culprit", [0, 1])
def test_what_a_rank_left_out_in_another_group_before_it_met_a_peer(culprit: int) -> None:
    groups = {"dp": (0, 1, 2), "tp": (0, 1)}
    ranks = [WritingRank(0, ["dp", "tp"]), WritingRank(1, ["dp", "tp"]), WritingRank(2, ["dp"])]
    for rank in ranks:
        rank.begin(1)
        rank.collective("dp", "gather [1, 4]")
        if rank.rank < 2:
            rank.collective("tp", "reduce [1, 72]")
            rank.collective("tp", "reduce [1, 1, 72]")
        rank.end()
        rank.begin(2)
        if rank.rank != culprit:
            rank.issue("dp", "gather [1, 4]")
    ranks[culprit].issue("tp", "reduce [1, 1, 72]")
    ranks[1 - culprit].done("dp")
    ranks[1 - culprit].issue("tp", "reduce [1, 72]")
    verdict = judge(Look(time.monotonic_ns(), {rank.rank: rank.look() for rank in ranks}, groups))
    assert verdict is not None and (verdict.culprits, verdict.group, verdict.sequence) == ((culprit,), "dp", 2)
    assert (verdict.theirs, verdict.peers) == ("reduce [1, 1, 72]", "gather [1, 4]")


def test_what_is_found_first_is_told_there() -> None:
    groups = {"dp": (0, 1), "tp": (0, 2)}
    ranks = [WritingRank(0, ["dp", "tp"]), WritingRank(1, ["dp"]), WritingRank(2, ["tp"])]
    for rank in ranks:
        rank.begin(1)
        for group, what in (("dp", "gather [1, 4]"), ("tp", "reduce [1, 72]"), ("dp", "scatter [1, 4]")):
            if rank.rank in groups[group]:
                rank.collective(group, what)
        rank.end()
        rank.begin(2)
        if rank.rank in groups["dp"]:
            rank.collective("dp", "gather [1, 4]")
    ranks[0].issue("dp", "one more [1]")
    ranks[1].issue("dp", "scatter [1, 4]")
    ranks[2].issue("tp", "reduce [1, 72]")
    verdict = judge(Look(time.monotonic_ns(), {rank.rank: rank.look() for rank in ranks}, groups))
    assert verdict is not None and (verdict.culprits, verdict.group, verdict.sequence) == ((0,), "dp", 4)


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize(
    ("done", "group"), [("gather", "a"), ("one more", "b")], ids=["what comes later", "what does not come"]
)
def test_in_a_circle_who_has_changed_the_order(culprit: int, done: str, group: str) -> None:
    groups = {"a": (0, 1), "b": (0, 1)}
    ranks = [WritingRank(rank, ["a", "b"]) for rank in (0, 1)]
    for rank in ranks:
        rank.begin(1)
        rank.collective("a", "reduce")
        rank.collective("b", "gather")
        rank.end()
        rank.begin(2)
        rank.issue("b" if rank.rank == culprit else "a", done if rank.rank == culprit else "reduce")
    verdict = judge(Look(time.monotonic_ns(), {rank.rank: rank.look() for rank in ranks}, groups))
    assert verdict is not None and (verdict.cause, verdict.culprits) == ("circle", (culprit,))
    assert (verdict.group, verdict.sequence, verdict.theirs) == (group, 2, done)


def test_a_rank_that_nobody_waits_for_but_the_engine() -> None:
    ranks = two_ranks()
    for rank in ranks:
        rank.begin(4)
        for text in STEP:
            rank.collective(GROUP, text.format(n=1))
    ranks[0].end()
    verdict = verdict_of(ranks)
    assert (verdict.cause, verdict.culprits, verdict.step) == ("late", (1,), 4)
    ranks[1].end()
    assert judge(Look(time.monotonic_ns(), {rank.rank: rank.look() for rank in ranks}, {GROUP: (0, 1)})) is None


def test_form() -> None:
    assert form("all_gather float32 [3, 72] dim=1") == form("all_gather float32 [1, 72] dim=1")
    assert form("all_gather float32 [3, 72] dim=1") != form("all_gather float32 [3, 71] dim=1")
    assert form("all_reduce int64 [1]") == form("all_reduce int64 [7]") != form("all_reduce int64 [1, 7]")
    assert form("barrier") == "barrier"


@pytest.mark.parametrize("culprit", [0, 1])
def test_what_the_journal_has_no_room_to_describe_tells_nothing(culprit: int) -> None:
    ranks = two_ranks()
    right, wrong = "reduce f32 [1, 9, 72]", "reduce f64 [1, 9, 72]"
    for rank in ranks:
        for number in range(NUM_TEXTS):
            rank.journal.explain(number + 1, lambda: "something else")
        rank.begin(4)
        rank.issue(GROUP, wrong if rank.rank == culprit else right)
    verdict = verdict_of(ranks)
    assert (verdict.cause, verdict.culprits) == ("diverged", (0, 1)), verdict


REDUCE, GATHER = "reduce f32 [{n}, 72]", "gather f32 [{n}, 65]"


@pytest.mark.parametrize("culprit", [0, 1])
def test_the_first_step_that_samples_is_not_compared_with_those_that_do_not(culprit: int) -> None:
    """Who gathers there does what neither has ever done, and is right; who has gone on without it does as always."""
    ranks = [WritingRank(rank, [GROUP]) for rank in (0, 1)]
    for rank in ranks:
        for step in (1, 2, 3):
            rank.begin(step, f"chunk {step}", 8, PlanSize(8, 1, 0))
            rank.collective(GROUP, REDUCE.format(n=8))
            rank.end()
        rank.begin(4, "the last chunk", 8, PlanSize(8, 1, 1))
        rank.collective(GROUP, REDUCE.format(n=8))
    ranks[1 - culprit].issue(GROUP, GATHER.format(n=1))
    ranks[culprit].end()
    ranks[culprit].begin(5, "a token", 1, PlanSize(1, 1, 1))
    ranks[culprit].issue(GROUP, REDUCE.format(n=1))
    assert verdict_of(ranks).culprits == (0, 1), "it cannot be told"


@pytest.mark.parametrize("is_next_begun", [True, False])
@pytest.mark.parametrize("culprit", [0, 1])
def test_the_first_step_that_does_not_sample_is_not_compared_with_those_that_do(
    culprit: int, is_next_begun: bool
) -> None:
    ranks = [WritingRank(rank, [GROUP]) for rank in (0, 1)]
    for rank in ranks:
        for step in (1, 2, 3):
            rank.begin(step, f"token {step}", 1, PlanSize(1, 1, 1))
            rank.collective(GROUP, REDUCE.format(n=1))
            rank.collective(GROUP, GATHER.format(n=1))
            rank.end()
        rank.begin(4, "a chunk", 8, PlanSize(8, 1, 0))
        rank.collective(GROUP, REDUCE.format(n=8))
    right = ranks[1 - culprit]
    right.end()
    if is_next_begun:
        right.begin(5, "another chunk", 8, PlanSize(8, 1, 0))
        right.issue(GROUP, REDUCE.format(n=8))
    ranks[culprit].issue(GROUP, GATHER.format(n=1))
    assert culprit in verdict_of(ranks).culprits


@pytest.mark.parametrize("culprit", [0, 1])
def test_after_steps_of_both_kinds_the_odd_one_is_told(culprit: int) -> None:
    ranks = [WritingRank(rank, [GROUP]) for rank in (0, 1)]
    for rank in ranks:
        for step in range(1, 7):
            samples = step % 2
            rank.begin(step, f"plan {step}", 8, PlanSize(8, 1, samples))
            rank.collective(GROUP, REDUCE.format(n=8))
            if samples:
                rank.collective(GROUP, GATHER.format(n=1))
            rank.end()
        rank.begin(7, "plan 7", 8, PlanSize(8, 1, 1))
        rank.collective(GROUP, REDUCE.format(n=8))
    ranks[1 - culprit].issue(GROUP, GATHER.format(n=1))
    ranks[culprit].end()
    ranks[culprit].begin(8, "plan 8", 8, PlanSize(8, 1, 0))
    ranks[culprit].issue(GROUP, REDUCE.format(n=8))
    assert verdict_of(ranks).culprits == (culprit,)


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_circle_because_of_a_collective_after_the_last_one_of_the_step(culprit: int) -> None:
    groups = {"tp@0": (0, 1), "ep@0": (0, 1)}
    ranks = [WritingRank(rank, list(groups)) for rank in (0, 1)]
    for rank in ranks:
        for step in range(1, 5):
            rank.begin(step, f"plan {step}", 1, PlanSize(1, 1, 1))
            rank.collective("tp@0", REDUCE.format(n=1))
            rank.collective("ep@0", GATHER.format(n=1))
            if step < 4:
                rank.end()
    right = ranks[1 - culprit]
    right.end()
    right.begin(5, "plan 5", 1, PlanSize(1, 1, 1))
    right.issue("tp@0", REDUCE.format(n=1))
    ranks[culprit].issue("ep@0", GATHER.format(n=1))
    verdict = judge(Look(time.monotonic_ns(), {rank.rank: rank.look() for rank in ranks}, groups))
    assert verdict is not None and (verdict.cause, verdict.culprits) == ("circle", (culprit,))
    assert (verdict.step, verdict.group, verdict.sequence) == (4, "ep@0", 5)


def test_a_step_as_long_as_some_before_has_nothing_too_much() -> None:
    """Of one kind some are replayed from graphs, which have more in them."""
    rank = WritingRank(0, [GROUP])
    for step, length in enumerate((3, 2, 3), start=1):
        rank.begin(step, f"plan {step}", 1, PlanSize(1, 1, 1))
        for _ in range(length):
            rank.collective(GROUP, REDUCE.format(n=1))
        rank.end()
    assert first_deviation(rank.look(), 3) is None
    rank.begin(4, "plan 4", 1, PlanSize(1, 1, 1))
    for _ in range(4):
        rank.collective(GROUP, REDUCE.format(n=1))
    deviation = first_deviation(rank.look(), 4)
    assert deviation is not None and (deviation.group, deviation.sequence) == (GROUP, 12)
