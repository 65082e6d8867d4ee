from __future__ import annotations

import threading
from typing import Any, cast

import pytest

from phalanx.engine import succession as module
from phalanx.engine.succession import Succession
from phalanx.errors import DeadlineError, EngineDeadError, PeerDiedError
from phalanx.membership.ending import Ending
from phalanx.membership.formation import Healed
from phalanx.protocol.worker import BlockCopies, CopyBlocks

COPIES = (CopyBlocks((BlockCopies(b"", b""),)), CopyBlocks((BlockCopies(b"s", b"t"),)))
FAULT = PeerDiedError("rank 1", 7)


class FakeBrain:
    copies = COPIES
    may_go_on = may_restore = True
    num_restored = 0

    def __init__(self) -> None:
        self.set_aside: list[bool] = []

    def rewind(self, epoch: int, *, sets_aside: bool, **_: object) -> bool:
        self.set_aside.append(sets_aside)
        return self.may_go_on or not sets_aside

    def restore_blocks(self) -> bool:
        self.num_restored += self.may_restore
        return self.may_restore


class FakeFormation:
    error: Exception | None = None

    def __init__(self) -> None:
        self.sent: list[CopyBlocks] = []

    def submit(self, body: CopyBlocks, **_: object) -> None:
        if self.error is not None:
            raise self.error
        self.sent.append(body)


class FakeExecutor:
    def __init__(self) -> None:
        self.may_end = threading.Event()

    def kill(self) -> None:
        self.may_end.wait(10.0)

    def close(self) -> None: ...


class Scene:
    """A fault of ranks that are long about their end."""

    def __init__(self) -> None:
        self.brain, self.formation, self.executor = FakeBrain(), FakeFormation(), FakeExecutor()
        self.succession = Succession(cast(Any, self.brain), cast(Any, self.formation))
        self.ending = Ending(1, cast(Any, self.executor))
        self.healed = Healed(2, True, (self.ending,))

    def end(self) -> None:
        self.executor.may_end.set()
        assert self.ending.wait(10.0)


def test_copies_are_sent_in_turn_and_blocks_come_back_when_those_before_are_gone() -> None:
    scene = Scene()
    scene.succession.go_on(scene.healed, FAULT)
    assert scene.brain.set_aside == [True] and tuple(scene.formation.sent) == COPIES
    scene.succession.look()
    assert not scene.brain.num_restored, "they may write yet"
    scene.end()
    scene.brain.may_restore = False
    scene.succession.look()
    scene.brain.may_restore = True
    for _ in range(3):
        scene.succession.look()
    assert scene.brain.num_restored == 1


def test_nothing_is_set_aside_for_ranks_that_are_gone() -> None:
    scene = Scene()
    scene.end()
    scene.succession.go_on(scene.healed, FAULT)
    assert scene.brain.set_aside == [False]


def test_without_blocks_to_spare_their_end_is_awaited() -> None:
    scene = Scene()
    scene.brain.may_go_on = False
    looks: list[int] = []

    def meanwhile() -> None:
        looks.append(len(scene.formation.sent))
        if len(looks) == 2:
            scene.executor.may_end.set()

    scene.succession.go_on(scene.healed, FAULT, meanwhile)
    assert scene.ending.are_gone and looks[:2] == [0, 0] and tuple(scene.formation.sent) == COPIES


def test_an_end_that_does_not_come_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "END_DEADLINE_S", 0.01)
    scene = Scene()
    scene.brain.may_go_on = False
    with pytest.raises(DeadlineError, match="the line of epoch 1"):
        scene.succession.go_on(scene.healed, FAULT)
    scene.end()


def test_who_cannot_be_told_has_failed_which_the_next_step_says() -> None:
    scene = Scene()
    scene.formation.error = EngineDeadError("rank 0 died")
    scene.succession.go_on(scene.healed, FAULT)
    scene.end()
