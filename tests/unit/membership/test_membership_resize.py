"""The states of a resize: whatever happens, and in whichever order, it is done as a whole or it has never been."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.errors import ConfigError, PeerDiedError, ResizeRefusedError, ResizeUnderWayError
from phalanx.membership.resize import LineResize, Resizing, Size

BEFORE, ASKED = Size(2, 1), Size(1, 1)
DIED = PeerDiedError("rank 0", 42)


@pytest.fixture
def resizing() -> Resizing:
    return Resizing(BEFORE)


def ready(resizing: Resizing) -> LineResize:
    resize = resizing.begin(ASKED)
    resizing.note_room()
    resizing.prepared()
    return resize


def test_it_is_done_when_the_other_line_takes_a_step(resizing: Resizing) -> None:
    resize = resizing.begin(ASKED)
    assert resize.state == "checking"
    resizing.note_room()
    assert resize.state == "preparing"
    resizing.prepared()
    assert resize.state == "ready" and resizing.size == BEFORE
    resizing.commit()
    assert resize.state == "done" and resizing.size == ASKED and resizing.current is None
    assert resizing.begin(BEFORE).before == ASKED


def test_two_at_once(resizing: Resizing) -> None:
    resizing.begin(ASKED)
    with pytest.raises(ResizeUnderWayError, match="from DP 2, TP 1 to DP 1, TP 1 is under way"):
        resizing.begin(Size(3, 1))
    resizing.cancel()
    with pytest.raises(ResizeUnderWayError):  # its ranks are still there
        resizing.begin(Size(3, 1))


def test_healing_comes_first(resizing: Resizing) -> None:
    resize = ready(resizing)
    resizing.fault(DIED)
    assert resize.state == "undoing" and resize.error is DIED
    resizing.undone()
    assert resize.state == "failed" and resizing.size == BEFORE
    with pytest.raises(ResizeRefusedError, match="after a fault"):
        resizing.begin(ASKED)
    resizing.healed()
    resizing.begin(ASKED)


def test_the_first_reason_counts(resizing: Resizing) -> None:
    resize = ready(resizing)
    assert resizing.cancel() and not resizing.cancel()
    resizing.failed(DIED)
    resizing.fault(DIED)
    resizing.undone()
    assert resize.state == "cancelled" and resize.error is None


def test_a_size_is_a_number_of_ranks() -> None:
    assert BEFORE.changed(None, 4) == Size(2, 4) and BEFORE.changed(None, None) == BEFORE
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        BEFORE.changed(1, 0)


EVENTS = st.sampled_from(
    ["begin", "note_room", "prepared", "failed", "cancel", "fault", "healed", "undone", "step boundary"]
)


@given(st.lists(EVENTS, max_size=40))
def test_any_order_of_events(events: list[str]) -> None:
    """As a formation has them: it commits as soon as it may, and tells `undone` when the other line is gone."""
    resizing, begun, is_healing, serving = Resizing(BEFORE), [], False, BEFORE
    for event in events:
        current = resizing.current
        if event == "begin":
            asked = Size(len(begun) + 3, 1)
            try:
                begun.append(resizing.begin(asked))
                assert current is None and not is_healing
            except ResizeRefusedError:
                assert (current is not None or is_healing) and resizing.current is current
        elif event == "step boundary":
            if current is not None and current.state == "ready":
                resizing.commit()
                assert not is_healing and current.state == "done"
                serving = current.asked
        elif event == "undone":
            if current is not None and current.state == "undoing":
                resizing.undone()
                assert current.state in ("failed", "cancelled") and resizing.current is None
        elif event in ("failed", "fault"):
            getattr(resizing, event)(DIED)
            is_healing = is_healing or event == "fault"
            assert resizing.current is None or resizing.current.state == "undoing"
        else:
            getattr(resizing, event)()
            is_healing = is_healing and event != "healed"
        assert resizing.size == serving, "nothing but a commit changes it"
        assert [one for one in begun if not one.is_over] == ([resizing.current] if resizing.current else [])
        for one in begun:
            assert (one.state == "failed") <= (one.error is DIED)
