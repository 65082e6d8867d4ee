"""When ranks of another size take over from those that serve: between two steps, with none under way."""

from __future__ import annotations

from typing import Any

import pytest
from test_engine_brain import Unanswered, brain_over

from phalanx.config import Config
from phalanx.engine.brain import Brain
from phalanx.engine.resizing import EngineResizing
from phalanx.executor.line_plan import Capacity
from phalanx.membership.formation import Resized
from phalanx.membership.resize import LineResize, Size
from phalanx.protocol.client import EngineMessage, Resize, ResizeBegun, ResizeEnded, Submit
from phalanx.protocol.columns import ints
from phalanx.protocol.sampling import SamplingParams

CAPACITY = Capacity(
    num_blocks=16,
    block_size=4,
    max_model_len=32,
    world_size=2,
    weight_bytes=(1, 1),
    block_bytes=(1, 1),
    device="cpu",
    dtype="float32",
)


class Formation:
    """Its resize is in the state that a test gives it."""

    resize_progress = None

    def __init__(self) -> None:
        self.resize = LineResize(Size(1, 1), Size(1, 2))
        self.has_switched = False

    def begin_resize(self, asked: Size, next_work: object) -> LineResize:
        self.resize.state, self.resize.has_begun = "preparing", True
        return self.resize

    def follow_resize(self) -> None:
        pass

    def switch(self) -> Resized:
        self.has_switched = True
        return Resized(2, Config.build(model="simulated", block_size=4, tensor_parallel_size=2), CAPACITY)


class Bench:
    """A brain with a request, one step of it under way, and ranks that are ready to take over."""

    def __init__(self) -> None:
        self.executor = Unanswered()
        self.brain: Brain = brain_over(self.executor)
        self.formation = Formation()
        self.told: list[EngineMessage] = []
        formation: Any = self.formation
        self.resizing = EngineResizing(formation, self.brain, self.told.append)
        self.brain.submit(Submit(5, ints([1, 2, 3]), SamplingParams(max_tokens=20)))
        self.resizing.begin(Resize(7, 1, 2))
        self.brain.step()
        self.formation.resize.state = "ready"
        assert len(self.executor.under_way) == 1


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_what_is_under_way_is_not_lost(bench: Bench) -> None:
    bench.resizing.follow()
    assert bench.resizing.is_under_way and not bench.formation.has_switched
    batch = bench.brain.step()
    assert batch is not None and len(bench.executor.under_way) == 0, "its tokens leave, and none is planned"
    bench.resizing.follow()
    assert bench.formation.has_switched
    assert isinstance(bench.told[-1], ResizeEnded) and bench.told[-1].ending == "done"
    bench.brain.step()
    assert bench.executor.under_way[0].epoch == 2


def test_one_that_is_undone_then_holds_nobody(bench: Bench) -> None:
    bench.resizing.follow()
    bench.formation.resize.state = "undoing"
    bench.resizing.follow()
    bench.brain.step()
    assert len(bench.executor.under_way) == 1
    bench.formation.resize.state = "cancelled"
    bench.resizing.follow()
    assert isinstance(bench.told[-1], ResizeEnded) and bench.told[-1].ending == "cancelled"


def test_one_that_fails_before_anybody_looks_had_begun(bench: Bench) -> None:
    """It was not refused, whatever happens between two turns of the brain."""
    bench.formation.resize.state, bench.formation.resize.error = "failed", ValueError("too small\n  rank 0 is at")
    bench.resizing.follow()
    assert bench.told == [ResizeBegun(7), ResizeEnded(7, "failed", "too small")]


def test_one_that_fails_before_it_has_begun_is_refused(bench: Bench) -> None:
    bench.formation.resize.has_begun = False
    bench.formation.resize.state, bench.formation.resize.error = "failed", ValueError("no room")
    bench.resizing.follow()
    assert bench.told == [ResizeEnded(7, "refused", "no room")]


def test_one_that_is_cancelled_before_it_has_begun(bench: Bench) -> None:
    bench.formation.resize.has_begun = False
    bench.formation.resize.state = "cancelled"
    bench.resizing.follow()
    assert bench.told == [ResizeEnded(7, "cancelled")]
