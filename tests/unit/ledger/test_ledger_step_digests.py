"""Ranks that have issued the same in a step agree, others do not, and it is said who did what."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import msgspec
import pytest
from ledger_ranks import Named

from phalanx.collectives.spec import GroupSpec
from phalanx.config import Config
from phalanx.errors import DivergedError
from phalanx.executor.guarding import Guarding, with_boards
from phalanx.ledger.group_notes import group_notes
from phalanx.ledger.journal import Journal
from phalanx.ledger.journal_layout import JOURNAL_BYTES, NUM_RECORDS
from phalanx.ledger.record import rolled
from phalanx.ledger.step_digests import BOARD_BYTES, NUM_SLOTS, StepDigestReader, StepDigests, count_of, told
from phalanx.protocol.worker import FIRST_EPOCH
from phalanx.transport.shared_memory import SegmentHandle, SharedSegment
from phalanx.worker.spec import WorkerSpec


class Rank:
    """Writes to its board and its journal, as far as it has them, and issues nothing."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.rank = spec.rank
        board = _mapped(spec.board) or memoryview(bytearray(BOARD_BYTES))
        journal = _mapped(spec.journal)
        self.digests = StepDigests(board, len(spec.groups))
        self._journal = Journal(journal, spec.epoch) if journal is not None else None
        self._groups = {
            group.name: group_notes(index, self._journal, self.digests)
            for index, group in enumerate(spec.groups, start=1)
        }

    def begin(self, step: int) -> None:
        self.digests.begin(step)
        if self._journal is not None:
            self._journal.begin_step(step, 0xABC, num_tokens=1)

    def issue(self, *collectives: str, group: str = "tp") -> None:
        for text in collectives:
            collective = Named(int.from_bytes(text.encode()[-8:], "little"), text)
            self._groups[group].explain(collective)
            self._groups[group].issue(collective)

    def leave(self) -> bytes:
        if self._journal is not None:
            self._journal.leave_step()
        return self.digests.leave()

    def run(self, step: int, *collectives: str) -> bytes:
        self.begin(step)
        self.issue(*collectives)
        return self.leave()


class Crew:
    """Ranks of which the first answers."""

    def __init__(
        self, groups: dict[str, tuple[int, ...]], resources: ExitStack, *, boards: bool = True, journals: bool = True
    ) -> None:
        specs = [_spec(rank, groups) for rank in sorted(set().union(*groups.values()))]
        if boards:
            specs = with_boards(specs, [spec.rank for spec in specs], resources)
        if journals:
            specs = [_with_journal(spec, resources) for spec in specs]
        self.guarding = Guarding(specs, resources)
        self.ranks = [Rank(spec) for spec in specs]

    def run(self, step: int, *each: Sequence[str]) -> list[bytes]:
        """What each rank says of a step; all but the first have left it first."""
        said = [rank.run(step, *collectives) for rank, collectives in zip(self.ranks[1:], each[1:], strict=True)]
        return [self.ranks[0].run(step, *each[0]), *said]


def _spec(rank: int, groups: dict[str, tuple[int, ...]]) -> WorkerSpec:
    return WorkerSpec(
        rank=rank,
        local_rank=rank,
        ranks_on_host=2,
        device="cpu",
        config=Config.build(model="m"),
        checkpoint="m",
        epoch=FIRST_EPOCH,
        groups=tuple(
            GroupSpec(name, "shm", ranks, FIRST_EPOCH, 1.0, 1.0) for name, ranks in groups.items() if rank in ranks
        ),
        queue=None,
    )


def _mapped(handle: SegmentHandle | None) -> memoryview | None:
    return SharedSegment.attach(handle).buf if handle is not None else None


def _with_journal(spec: WorkerSpec, resources: ExitStack) -> WorkerSpec:
    journal = resources.enter_context(SharedSegment.create(JOURNAL_BYTES, "journal"))
    return msgspec.structs.replace(spec, journal=journal.handle)


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


SUM, GATHER, TOKENS = "all_reduce float32 [1, 72]", "all_gather float32 [1, 130]", "broadcast int64 [1]"


def test_what_was_written_is_read() -> None:
    memory = memoryview(bytearray(BOARD_BYTES))
    digests, reader = StepDigests(memory, 2), StepDigestReader(memory, 2)
    assert reader.read(9) is None
    digests.begin(9)
    digests.fold(2, 0x11)
    issued = reader.read(9)
    assert issued is not None and not issued.has_left and [count_of(word) for word in issued.words] == [0, 0, 1]
    digests.fold(2, 0x22)
    said = digests.leave()
    assert reader.read(9) == told(said)
    assert [count_of(word) for word in told(said).words] == [0, 0, 2]
    digests.begin(9 + NUM_SLOTS)
    assert reader.read(9) is None and told(digests.leave()).words == (0, 0, 0)


def test_the_order_counts_and_so_does_every_bit() -> None:
    def word(*collectives: int) -> int:
        digests = StepDigests(memoryview(bytearray(BOARD_BYTES)), 1)
        digests.begin(1)
        rolling = 0
        for digest in collectives:
            rolling = rolled(rolling, digest)
            digests.fold(1, rolling)
        return told(digests.leave()).words[1]

    words = {word(1, 2), word(2, 1), word(1), word(1, 1), word(), *(word(1 << bit, 2) for bit in range(64))}
    assert len(words) == 5 + 64 - 1  # 1 << 0 is there twice
    assert word(1, 2) == word(1, 2)


def test_ranks_that_agree(resources: ExitStack) -> None:
    crew = Crew({"tp": (0, 1, 2)}, resources)
    for step in range(1, 3 * NUM_SLOTS):
        crew.guarding.take(0, crew.run(step, *[[SUM] * (step % 3)] * 3)[0])
    crew.guarding.take(0, b"")  # the answer to something else than a step
    assert not crew.guarding._open


@pytest.mark.parametrize(
    ("each", "ranks", "message"),
    [
        (
            ([SUM, SUM, TOKENS], [SUM, GATHER, TOKENS], [SUM, SUM, TOKENS]),
            (1,),
            f"rank 1 issued {GATHER} where ranks 0, 2 issued {SUM} (step 8, sequence 4 of group tp)",
        ),
        (
            ([SUM, TOKENS], [TOKENS, SUM], [TOKENS, SUM]),
            (0,),
            f"rank 0 issued {SUM} where ranks 1, 2 issued {TOKENS} (step 8, sequence 3 of group tp)",
        ),
        (
            ([SUM, TOKENS], [SUM, TOKENS], [SUM]),
            (2,),
            f"rank 2 issued nothing more where ranks 0, 1 issued {TOKENS} (step 8, sequence 4 of group tp)",
        ),
        (
            ([SUM], [SUM, SUM]),
            (0,),
            f"rank 0 issued nothing more where rank 1 issued {SUM} (step 8, sequence 4 of group tp)",
        ),
        (
            ([SUM, SUM], [SUM, SUM, SUM]),
            (1,),
            f"rank 1 issued {SUM} where rank 0 issued nothing more (step 8, sequence 5 of group tp)",
        ),
        (
            ([TOKENS], [GATHER]),
            (0, 1),
            f"rank 0 issued {TOKENS} and rank 1 issued {GATHER} (step 8, sequence 3 of group tp);"
            " which of them is wrong cannot be told",
        ),
    ],
)
def test_who_diverges_is_named_with_both_sides(
    resources: ExitStack, each: Sequence[Sequence[str]], ranks: tuple[int, ...], message: str
) -> None:
    crew = Crew({"tp": tuple(range(len(each)))}, resources)
    crew.guarding.take(0, crew.run(7, *[[SUM, SUM]] * len(each))[0])
    said = crew.run(8, *each)[0]
    with pytest.raises(DivergedError) as caught:
        crew.guarding.take(0, said)
    assert (str(caught.value), caught.value.ranks) == (message, ranks)
    assert (caught.value.step, caught.value.group) == (8, "tp")


def test_who_may_still_come_does_not_vote(resources: ExitStack) -> None:
    """Two of three are still on their way to what the one has left out that has left the step."""
    crew = Crew({"tp": (0, 1, 2, 3)}, resources)
    crew.guarding.take(0, crew.run(7, *[[SUM, TOKENS]] * 4)[0])
    for rank in crew.ranks[1:]:
        rank.begin(8)
        rank.issue(SUM)
    crew.ranks[1].issue(TOKENS)
    with pytest.raises(DivergedError) as caught:
        crew.guarding.take(0, crew.ranks[0].run(8, SUM))
    message = f"rank 0 issued nothing more where rank 1 issued {TOKENS} (step 8, sequence 4 of group tp)"
    assert (caught.value.ranks, str(caught.value)) == ((0,), message)


def test_without_journals_it_is_said_how_many(resources: ExitStack) -> None:
    crew = Crew({"tp": (0, 1, 2)}, resources, journals=False)
    said = crew.run(8, [SUM], [SUM], [SUM, SUM])[0]
    with pytest.raises(DivergedError, match=r"^rank 2 issued 2 collectives .* where ranks 0, 1 issued 1 collective "):
        crew.guarding.take(0, said)


def test_journals_that_have_forgotten_the_step_are_not_asked(resources: ExitStack) -> None:
    crew = Crew({"tp": (0, 1)}, resources)
    said = crew.run(8, [SUM] * NUM_RECORDS, [SUM] * NUM_RECORDS + [GATHER])[0]
    with pytest.raises(DivergedError, match="rank 1 issued 1025 collectives"):
        crew.guarding.take(0, said)


def test_a_rank_that_is_still_in_the_step_is_compared_when_it_can_be(resources: ExitStack) -> None:
    crew = Crew({"tp": (0, 1)}, resources)
    first, second = crew.ranks
    second.begin(1)
    second.issue(SUM)
    crew.guarding.take(0, first.run(1, SUM, TOKENS))  # it may still issue the other one
    second.issue(TOKENS)
    crew.guarding.take(0, b"")
    second.issue(GATHER)  # more than there are: it has not left, and need not
    with pytest.raises(DivergedError, match=f"rank 0 issued nothing more and rank 1 issued {GATHER[:10]}"):
        crew.guarding.take(0, b"")


def test_another_collective_is_seen_before_the_step_is_left(resources: ExitStack) -> None:
    crew = Crew({"tp": (0, 1)}, resources)
    crew.ranks[1].begin(1)
    crew.ranks[1].issue(GATHER)
    with pytest.raises(DivergedError):
        crew.guarding.take(0, crew.ranks[0].run(1, SUM))


def test_a_rank_that_has_not_begun_is_waited_for_while_others_go_on(resources: ExitStack) -> None:
    crew = Crew({"tp": (0, 1, 2)}, resources)
    first, second, third = crew.ranks
    for step in (1, 2, 3):
        second.run(step, SUM)
        crew.guarding.take(0, first.run(step, SUM))
    third.run(1, SUM)
    crew.guarding.take(0, b"")
    third.run(2, GATHER)
    with pytest.raises(DivergedError) as caught:
        crew.guarding.take(0, first.run(4, SUM))
    assert (caught.value.ranks, caught.value.step) == ((2,), 2)


def test_skipped_and_made_up_for_in_the_next_step(resources: ExitStack) -> None:
    crew = Crew({"tp": (0, 1)}, resources)
    said = crew.run(1, [SUM, TOKENS], [SUM])
    with pytest.raises(DivergedError, match=f"rank 0 issued {TOKENS[:9]}.* and rank 1 issued nothing more"):
        crew.guarding.take(0, said[0])


def test_stages_are_compared_each_by_itself_and_the_earliest_is_named(resources: ExitStack) -> None:
    crew = Crew({"tp@0": (0, 1), "tp@1": (2, 3), "pp@0": (0, 2), "pp@1": (1, 3)}, resources)
    for rank in crew.ranks:
        rank.begin(5)
    for group, odd in (("tp@0", 1), ("tp@1", 2)):
        for rank in crew.ranks:
            if group in rank._groups:
                rank.issue(SUM if rank.rank != odd else GATHER, group=group)
    said = [rank.leave() for rank in crew.ranks]
    with pytest.raises(DivergedError, match="group tp@0") as caught:
        crew.guarding.take(2, said[2])
    assert caught.value.ranks == (0, 1)


def test_ranks_without_boards_say_it_in_messages(resources: ExitStack) -> None:
    crew = Crew({"tp": (0, 1)}, resources, boards=False, journals=False)
    said = crew.run(1, [SUM], [SUM])
    crew.guarding.take(1, said[1])
    crew.guarding.take(0, said[0])
    said = crew.run(2, [SUM], [GATHER])
    crew.guarding.take(0, said[0])
    with pytest.raises(DivergedError):
        crew.guarding.take(1, said[1])


def test_without_memory_for_boards_ranks_say_it_in_messages_too(
    resources: ExitStack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def create(*_: object) -> SharedSegment:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(SharedSegment, "create", create)
    crew = Crew({"tp": (0, 1)}, resources, journals=False)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "no memory" in caplog.text
    said = crew.run(1, [SUM], [GATHER])
    crew.guarding.take(0, said[0])
    with pytest.raises(DivergedError):
        crew.guarding.take(1, said[1])
