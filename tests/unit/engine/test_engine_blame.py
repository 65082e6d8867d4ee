"""What may be a request's doing, told apart from what is not."""

from __future__ import annotations

import pytest

from phalanx.engine.blame import came_from_outside
from phalanx.errors import DeadlineError, HungError, PeerDiedError, PhalanxError, WorkerError
from phalanx.executor.out_of_memory import OutOfMemoryKills
from phalanx.executor.shared_fate import WITH_FORK_SERVER, describe_exit


def died(code: int, kills_before: OutOfMemoryKills | None = None) -> PeerDiedError:
    return PeerDiedError("rank 1", 7, describe_exit(code, kills_before))


def killed(monkeypatch: pytest.MonkeyPatch, *, num_kills_since: int) -> PeerDiedError:
    """By SIGKILL, when the kernel had ended so many for lack of memory."""
    monkeypatch.setattr(OutOfMemoryKills, "now", lambda: OutOfMemoryKills(None, 3 + num_kills_since))
    return died(-9, OutOfMemoryKills(None, 3))


def test_a_kill_is_from_outside_unless_there_was_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert came_from_outside(killed(monkeypatch, num_kills_since=0))
    assert not came_from_outside(killed(monkeypatch, num_kills_since=1))
    assert not came_from_outside(died(-9)), "nobody knows"
    assert not came_from_outside(PeerDiedError("rank 1", 7)), "nor here"


@pytest.mark.parametrize("error", [died(-15), HungError("rank 1", "stopped"), PeerDiedError("node beta", 7)])
def test_what_somebody_else_does(error: PhalanxError) -> None:
    assert came_from_outside(error)
    assert came_from_outside(PeerDiedError("rank 1", 7, f"{WITH_FORK_SERVER}: killed by SIGKILL"))


@pytest.mark.parametrize(
    "error",
    [
        *(died(-11), died(-6), died(1)),
        HungError("rank 1", "gil"),
        HungError("rank 1", "skipped"),
        WorkerError(1, "here", "RuntimeError", "no kernel", ""),
        DeadlineError("step 7", "rank 0", 60.0),
    ],
)
def test_what_a_request_can_do(error: PhalanxError) -> None:
    assert not came_from_outside(error)
